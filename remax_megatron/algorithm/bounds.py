"""The thresholds of a correction of the mismatch, as they are written: a number, or LOWER_UPPER. Plain Python.

    2.0        truncates a weight at 2
    0.5_5.0    masks a weight outside 0.5 to 5 (IcePop)
    0_2.0      masks a weight above 2 (masked importance sampling)

The texts are verl's (`rollout_is_threshold`, `rollout_rs_threshold` in trainer/ppo/rollout_corr_helper.py), which asks
for a lower bound above 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from remax_megatron.algorithm.names import REJECTIONS


@dataclass(frozen=True)
class Bounds:
    """The largest value, and the smallest; `lower` None: no smallest, and what is above `upper` is cut to it."""

    upper: float
    lower: float | None = None

    def __post_init__(self) -> None:
        assert 0.0 < self.upper < math.inf and 0.0 <= (self.lower or 0.0) <= self.upper, self


def read_bounds(text: str) -> Bounds:
    """What `text` stands for: a number above 0, or two with a _ between them. ValueError for anything else."""
    numbers = [float(part) for part in text.split("_")]
    if len(numbers) > 2 or not all(0.0 <= number < math.inf for number in numbers) or numbers[-1] == 0.0:
        raise ValueError(f"{text} is neither a number above 0 nor two of them")
    if numbers != sorted(numbers):
        raise ValueError(f"{text} has its lower bound above its upper one")
    return Bounds(numbers[-1], numbers[0] if len(numbers) == 2 else None)


def rejection_bounds(rejection: str, text: str) -> Bounds:
    """The bounds on the geometric mean of trainer over engine that `text` asks for under `rejection`, of REJECTIONS.

    A single number U stands for 1/U to U. `geometric` bounds that mean itself; `seq_mean_k1` its reciprocal, for verl's
    k1 is the logarithm of engine over trainer. ValueError where a bound is not above 0, or a single number below 1.
    """
    assert rejection in REJECTIONS, rejection
    bounds = read_bounds(text)
    lower, upper = 1.0 / bounds.upper if bounds.lower is None else bounds.lower, bounds.upper
    if not 0.0 < lower <= upper:
        raise ValueError(f"{text} leaves no ratio between {lower:g} and {upper:g}")
    return Bounds(upper, lower) if rejection == "geometric" else Bounds(1.0 / lower, 1.0 / upper)
