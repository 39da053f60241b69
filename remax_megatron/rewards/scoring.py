"""What a scorer is asked and answers, and which one a run uses: by the row's data source, or the user's (custom.py).

There is no deadline per answer here: pool.py has one, runs scorers in processes of its own, and counts what fails.
"""

from __future__ import annotations

import functools
import importlib
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Protocol, TypeGuard

import numpy as np

from remax_megatron.errors import UserError

# The built-in rules: modules with `score(solution_str, ground_truth)` and `ground_truth(value)`, which gives the form
# that the rule takes or raises ValueError. They are imported where and when they are needed.
BUILT_IN: dict[str, str] = {
    "openai/gsm8k": "remax_megatron.rewards.gsm8k",
    "word_problems": "remax_megatron.rewards.gsm8k",
    "DigitalLearningGmbH/MATH-lighteval": "remax_megatron.rewards.math",
    "code": "remax_megatron.rewards.code",
}
ONE, ASYNC, BATCH = "one", "async", "batch"  # how a scorer takes answers: each, each without waiting, or many at once


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


def load_scorer(path: str | None, name: str = "compute_score", kwargs: Mapping[str, Any] | None = None) -> Scorer:
    """The scorer by data source when `path` is None, else what `name` is in the Python file `path` (its code runs).

    `kwargs` are more arguments for it. RewardError when the file or the name is missing, the file does not import, or
    the signature does not fit.
    """
    if path is None:
        return BySource()
    from remax_megatron.rewards.custom import load_custom

    return load_custom(path, name, kwargs or {})


class BySource:
    """The built-in rules, by the row's data source."""

    kind = ONE
    wants: frozenset[str] = frozenset()

    def score(self, request: ScoreRequest) -> ScoreResult:
        """Score one answer by the rule of its source."""
        return as_result(built_in_rule(request.data_source).score(request.solution_str, request.ground_truth))

    async def score_async(self, request: ScoreRequest) -> ScoreResult:
        """Score one answer; nothing is waited for."""
        return self.score(request)

    def score_batch(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """Score one answer after the other."""
        return [self.score(request) for request in requests]


@functools.cache
def built_in_rule(data_source: str) -> ModuleType:
    """The module of BUILT_IN for the data source, imported; RewardError for an unknown one."""
    check_data_sources({data_source})
    return importlib.import_module(BUILT_IN[data_source])


def built_in_ground_truth(data_source: str, value: Any) -> Any:
    """A row's ground truth in the form that its built-in rule takes; RewardError when no answer could ever equal it,
    or the source has no rule."""
    try:
        return built_in_rule(data_source).ground_truth(value)
    except ValueError as error:
        raise error if isinstance(error, RewardError) else RewardError(f"{data_source}: {error}") from error


def check_data_sources(data_sources: Iterable[str]) -> None:
    """RewardError naming the data sources without a built-in rule."""
    if unknown := sorted(set(data_sources) - BUILT_IN.keys()):
        raise RewardError(
            f"no scorer for data_source {', '.join(map(repr, unknown))}; known: {', '.join(BUILT_IN)}; "
            "set custom_reward_function.path to a Python file with your own"
        )


def as_result(value: Any) -> ScoreResult:
    """What a scorer returned, as a result: a finite number, or a dict with one under "score". ValueError for another.

    Other finite numbers of the dict are kept as `extra`, texts as `texts`.
    """
    score = _plain(value.get("score") if isinstance(value, Mapping) else value)
    if not _is_finite_number(score):
        raise ValueError(f"{value!r}; a finite number, or a dict with one under 'score', is needed")
    others = {str(k): _plain(v) for k, v in value.items() if k != "score"} if isinstance(value, Mapping) else {}
    return ScoreResult(
        float(score),
        extra={name: float(other) for name, other in others.items() if _is_finite_number(other)},
        texts={name: other for name, other in others.items() if isinstance(other, str)},
    )


def _plain(value: Any) -> Any:
    """A tensor or an array of one number as that number; anything else as it is."""
    if getattr(value, "shape", None) in ((), (1,)) and hasattr(value, "item"):
        return value.item()
    return value


def _is_finite_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, numbers.Real | np.bool_) and math.isfinite(value)
