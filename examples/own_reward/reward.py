"""A reward of your own: the right number after the last `####`, and a little less for a long answer.

    torchrun ... -m remax_megatron custom_reward_function.path=examples/own_reward/reward.py

The trainer calls `compute_score` with these four keyword arguments, once per answer, in a process of its own with a
deadline (`reward.timeout_s`). An exception counts as reward 0 and in `reward/error_share`.
"""

from __future__ import annotations

import re
from typing import Any

NUMBER = re.compile(r"####\s*(-?[0-9.,]+)")
LONG = 60  # characters


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None
) -> dict[str, float]:
    """The reward is "score"; every other number of the dict is averaged in `metrics.jsonl`, here as `reward/right`.

    data_source: the row's column, for functions that score several data sets. solution_str: the answer as text,
    without the prompt. ground_truth: `reward_model.ground_truth` of the row. extra_info: the row's column, else {}.
    """
    numbers = NUMBER.findall(solution_str)
    right = bool(numbers) and numbers[-1].rstrip(".,").replace(",", "") == ground_truth
    penalty = 0.1 if len(solution_str) > LONG else 0.0
    return {"score": float(right) - penalty, "right": float(right)}
