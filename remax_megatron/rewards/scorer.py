"""What a scorer is asked, what it answers, and how it takes answers.

There is no deadline per answer here: pool.py has one, runs scorers in processes of its own, and counts what fails.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Protocol, TypeGuard

import numpy as np

from remax_megatron.errors import UserError

ONE, ASYNC, BATCH = "one", "async", "batch"  # how a scorer takes answers: each, each without waiting, or many at once

LARGEST = 1e6  # the largest size of a score: the variance of larger ones is no longer a float


class RewardError(UserError):
    """A scorer that cannot be loaded or used; the message names the file or the sample, and the fix."""


@dataclass(frozen=True)
class ScoreRequest:
    """One answer to score: the arguments of a scorer.

    data_source, ground_truth, extra_info  of the row; the last two are the values in the file
    solution_str                           the answer's text
    prompt                                 the turns of the prompt, each {role, content}
    token_ids                              of the answer, its end-of-sequence token included
    finished                               False when the length limit cut the answer
    """

    data_source: str
    solution_str: str
    ground_truth: Any
    extra_info: dict[str, Any] = field(default_factory=dict)
    prompt: list[dict[str, str]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finished: bool = True

    @property
    def num_tokens(self) -> int:
        """Count the tokens of the answer."""
        return len(self.token_ids)


@dataclass(frozen=True)
class ScoreResult:
    """`outcome` is "ok", or why there is no score and `score` is 0: "error" (the scorer raised), "timeout" (killed at
    the deadline) or "crash" (the worker died); `message` then says what happened. `extra` holds the scorer's other
    numbers, such as `flexible` of GSM8K, and `texts` its texts."""

    score: float
    outcome: str = "ok"
    message: str = ""
    extra: dict[str, float] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


class Scorer(Protocol):
    """Scores answers in one of three ways, the one that `kind` names; RewardError names the sample that failed.

    `wants` are the names of a request's fields that it reads beside the first four; what it does not want need not be
    sent to it.
    """

    kind: str
    wants: frozenset[str]

    def score(self, request: ScoreRequest) -> ScoreResult:
        """Score one answer (ONE)."""

    async def score_async(self, request: ScoreRequest) -> ScoreResult:
        """Score one answer while others wait (ASYNC)."""

    def score_batch(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """Score many answers (BATCH)."""


def as_result(value: Any) -> ScoreResult:
    """What a scorer returned, as a result: a finite number, or a dict with one under "score". ValueError for another.

    Other finite numbers of the dict are kept as `extra`, texts as `texts`.
    """
    score = _plain(value.get("score") if isinstance(value, Mapping) else value)
    if not _is_finite_number(score):
        raise ValueError(f"{value!r}; a finite number, or a dict with one under 'score', is needed")
    if abs(score) > LARGEST:
        raise ValueError(f"{value!r}; a score between -{LARGEST:g} and {LARGEST:g} is needed")
    others = {str(k): _plain(v) for k, v in value.items() if k != "score"} if isinstance(value, Mapping) else {}
    return ScoreResult(
        float(score),
        extra={name: float(other) for name, other in others.items() if _is_finite_number(other)},
        texts={name: str.__str__(other) for name, other in others.items() if isinstance(other, str)},
    )


def _plain(value: Any) -> Any:
    """A tensor or an array of one number as that number; anything else as it is."""
    shape = getattr(value, "shape", None)
    return value.item() if shape is not None and math.prod(shape) == 1 and hasattr(value, "item") else value


def _is_finite_number(value: Any) -> TypeGuard[float]:
    try:
        return isinstance(value, numbers.Real | np.bool_ | Decimal) and math.isfinite(value)
    except OverflowError:  # an integer above all floats
        return False
