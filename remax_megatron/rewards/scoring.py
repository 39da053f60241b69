"""Which scorer a run uses: the built-in rule of the row's data source, or the user's own (custom.py)."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

from remax_megatron.rewards.custom import load_custom
from remax_megatron.rewards.scorer import ONE, RewardError, Scorer, ScoreRequest, ScoreResult, as_result

# The built-in rules: modules with `score(solution_str, ground_truth)` and `ground_truth(value)`, which gives the form
# that the rule takes or raises ValueError. They are imported where and when they are needed.
BUILT_IN: dict[str, str] = {
    "openai/gsm8k": "remax_megatron.rewards.gsm8k",
    "word_problems": "remax_megatron.rewards.gsm8k",
    "DigitalLearningGmbH/MATH-lighteval": "remax_megatron.rewards.math",
    "code": "remax_megatron.rewards.code",
}


def load_scorer(
    path: str | None, name: str = "compute_score", kwargs: Mapping[str, Any] | None = None, source: bytes | None = None
) -> Scorer:
    """The scorer by data source when `path` is None, else what `name` is in the Python file `path` (its code runs).

    `kwargs` are more arguments for it, `source` is the file's content if it is known. RewardError when the file or the
    name is missing, the file does not import, or the signature does not fit.
    """
    if path is None:
        return BySource()
    return load_custom(path, name, kwargs or {}, source)


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
