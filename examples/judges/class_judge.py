"""A judge with a state: a class, of which each reward process makes one object from `reward_kwargs`.

    torchrun ... -m remax_megatron custom_reward_function.path=examples/judges/class_judge.py \
      custom_reward_function.name=Judge '+custom_reward_function.reward_kwargs={separator: "####", partial: 0.2}'
"""

from __future__ import annotations

import re
from typing import Any


class Judge:
    """Rewards the right number after a separator, and partly any number after it."""

    def __init__(self, separator: str = "####", partial: float = 0.2):
        """What takes time is done here, once: a model or a table is loaded, a connection opened."""
        self.partial = partial
        self._number = re.compile(rf"{re.escape(separator)}\s*(-?[0-9.,]+)")

    def __call__(self, data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any]) -> float:
        """Score one answer; it may also be `async def`, or be named `compute_score_batch` and take lists."""
        numbers = self._number.findall(solution_str)
        if not numbers:
            return 0.0
        return 1.0 if numbers[-1].rstrip(".,") == str(ground_truth) else self.partial
