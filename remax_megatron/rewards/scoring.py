"""Which scorer a run uses: by the row's data source, or the user's own function (`custom_reward_function.path/name`).

A custom function has verl's signature and returns a finite number, or a dict with the number under "score":

    def compute_score(data_source, solution_str, ground_truth, extra_info=None): ...

It is called in this process, one sample at a time, with those four keyword arguments. Whatever it raises ends the run
with the sample named: an error must not turn into a reward of 0. There is no deadline per sample here.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import numbers
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from remax_megatron.errors import UserError
from remax_megatron.rewards.gsm8k import strict_score

# (data_source, solution_str, ground_truth, extra_info) -> reward
Scorer = Callable[[str, str, str, dict[str, Any]], float]

BY_DATA_SOURCE: dict[str, Callable[[str, str], float]] = {"openai/gsm8k": strict_score, "word_problems": strict_score}


class RewardError(UserError):
    """A scorer that cannot be loaded or used; the message names the file or the sample, and the mend."""


def load_scorer(path: str | None, name: str = "compute_score") -> Scorer:
    """The scorer by data source when `path` is None, else function `name` of the Python file `path` (its code runs).

    RewardError when the file or the function is missing, the file does not import, or the signature does not fit.
    """
    if path is None:
        return score_by_data_source
    function = _load_function(Path(path).expanduser(), name)

    def score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]) -> float:
        sample = f"data_source={data_source!r}, ground_truth={ground_truth!r}, extra_info={str(extra_info)[:200]}, "
        sample += f"solution ends {solution_str[-200:]!r}"
        try:
            result = function(
                data_source=data_source, solution_str=solution_str, ground_truth=ground_truth, extra_info=extra_info
            )
        except Exception as error:  # the user's code may raise anything; it is named and raised again, never scored
            raise RewardError(f"{path}: {name} raised {type(error).__name__}: {error}; sample: {sample}") from error
        value = result.get("score") if isinstance(result, dict) else result
        if not isinstance(value, numbers.Real | np.bool_) or not math.isfinite(value):
            raise RewardError(
                f"{path}: {name} returned {result!r}; a finite number, or a dict with one under 'score', is needed; "
                f"sample: {sample}"
            )
        return float(value)

    return score


def check_data_sources(data_sources: set[str]) -> None:
    """RewardError naming the data sources without a built-in scorer. For a start-up check when no path is set."""
    if unknown := sorted(data_sources - BY_DATA_SOURCE.keys()):
        raise RewardError(
            f"no scorer for data_source {', '.join(map(repr, unknown))}; known: {', '.join(BY_DATA_SOURCE)}; "
            "set custom_reward_function.path to a Python file with your own"
        )


def score_by_data_source(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None
) -> float:
    """The built-in rule of the data source; RewardError for an unknown one."""
    check_data_sources({data_source})
    return BY_DATA_SOURCE[data_source](solution_str, ground_truth)


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
