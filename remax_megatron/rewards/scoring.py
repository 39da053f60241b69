"""Which scorer a run uses: by the row's data source, or the user's own function (`custom_reward_function.path/name`).

A custom function has verl's signature and returns a finite number, or a dict with the number under "score":

    def compute_score(data_source, solution_str, ground_truth, extra_info=None): ...

It is called with those four keyword arguments, one sample at a time. Whatever it raises is raised here with the sample
named: an error must not turn into a reward of 0 unseen. There is no deadline per sample here: pool.py has one, runs
these functions in processes of its own, and counts what fails.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import math
import numbers
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from remax_megatron.errors import UserError

# (data_source, solution_str, ground_truth, extra_info) -> reward, and the scorer's other numbers by name
Scorer = Callable[[str, str, str, dict[str, Any]], tuple[float, dict[str, float]]]

# The built-in rules: "module:function" of (solution_str, ground_truth), imported where and when it is needed.
BUILT_IN: dict[str, str] = {
    "openai/gsm8k": "remax_megatron.rewards.gsm8k:score",
    "word_problems": "remax_megatron.rewards.gsm8k:score",
    "DigitalLearningGmbH/MATH-lighteval": "remax_megatron.rewards.math:score",
    "code": "remax_megatron.rewards.code:score",
}


class RewardError(UserError):
    """A scorer that cannot be loaded or used; the message names the file or the sample, and the fix."""


def load_scorer(path: str | None, name: str = "compute_score") -> Scorer:
    """The scorer by data source when `path` is None, else function `name` of the Python file `path` (its code runs).

    It returns the reward, and the finite numbers beside "score" of a dict. RewardError when the file or the function
    is missing, the file does not import, or the signature does not fit.
    """
    if path is None:
        return _score_by_data_source
    function = _load_function(Path(path).expanduser(), name)

    def score(
        data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]
    ) -> tuple[float, dict[str, float]]:
        sample = f"data_source={data_source!r}, ground_truth={ground_truth!r}, extra_info={str(extra_info)[:200]}, "
        sample += f"solution ends {solution_str[-200:]!r}"
        try:
            result = function(
                data_source=data_source, solution_str=solution_str, ground_truth=ground_truth, extra_info=extra_info
            )
        except Exception as error:  # the user's code may raise anything; it is named and raised again, never scored
            raise RewardError(f"{path}: {name} raised {type(error).__name__}: {error}; sample: {sample}") from error
        value = result.get("score") if isinstance(result, dict) else result
        if not _is_finite_number(value):
            raise RewardError(
                f"{path}: {name} returned {result!r}; a finite number, or a dict with one under 'score', is needed; "
                f"sample: {sample}"
            )
        return float(value), _other_numbers(result)

    return score


def _is_finite_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, numbers.Real | np.bool_) and math.isfinite(value)


def _other_numbers(result: Any) -> dict[str, float]:
    if not isinstance(result, Mapping):
        return {}
    return {str(k): float(v) for k, v in result.items() if k != "score" and _is_finite_number(v)}


@functools.cache
def built_in_rule(data_source: str) -> Callable[[str, str], float | dict[str, float]]:
    """The rule of BUILT_IN for the data source, imported; RewardError for an unknown one."""
    check_data_sources({data_source})
    module, name = BUILT_IN[data_source].split(":")
    return getattr(importlib.import_module(module), name)


def _score_by_data_source(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]
) -> tuple[float, dict[str, float]]:
    result = built_in_rule(data_source)(solution_str, ground_truth)
    return float(result["score"] if isinstance(result, dict) else result), _other_numbers(result)


def check_data_sources(data_sources: set[str]) -> None:
    """RewardError naming the data sources without a built-in scorer. For a start-up check when no path is set."""
    if unknown := sorted(data_sources - BUILT_IN.keys()):
        raise RewardError(
            f"no scorer for data_source {', '.join(map(repr, unknown))}; known: {', '.join(BUILT_IN)}; "
            "set custom_reward_function.path to a Python file with your own"
        )


def _load_function(path: Path, name: str) -> Callable[..., Any]:
    if not path.is_file():
        raise RewardError(f"custom_reward_function.path={path} is not a file")
    spec = importlib.util.spec_from_file_location(f"custom_reward_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise RewardError(f"custom_reward_function.path={path} is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's module may raise anything while it is imported
        message = f"custom_reward_function.path={path} does not import: {type(error).__name__}: {error}"
        raise RewardError(message) from error
    function = getattr(module, name, None)
    if not callable(function):
        functions = [n for n, f in vars(module).items() if inspect.isfunction(f)]
        raise RewardError(
            f"custom_reward_function.name={name!r} is not a function of {path}; found: {', '.join(functions) or 'none'}"
        )
    try:
        inspect.signature(function).bind(data_source="", solution_str="", ground_truth="", extra_info={})
    except TypeError as error:
        raise RewardError(
            f"{path}: {name}{inspect.signature(function)} does not fit: {error}; needed: "
            f"{name}(data_source, solution_str, ground_truth, extra_info=None)"
        ) from error
    return function
