"""GRPO (arXiv 2402.03300, section 4.1.2): each answer against the mean of its group, divided by the group's std.

    A_i = (r_i - mean(r)) / (std(r) + 1e-6)    norm_by_std=True, as in the paper
    A_i =  r_i - mean(r)                       norm_by_std=False, Dr. GRPO (arXiv 2503.20783)

std has Bessel's correction (n - 1), epsilon is 1e-6: as in verl's `compute_grpo_outcome_advantage` (core_algos.py).

Assumes that the n answers to a prompt are independent samples of the same policy. The mean contains r_i itself, so
the baseline depends on the sampled answer: without the std the expected gradient is (n - 1) / n times the true one
(right direction, short by a factor that a learning rate can take up); with the std it has another direction, for the
division weighs prompts by how seldom or how surely they are solved. The advantages of a prompt sum to 0.

Degenerate cases. n = 1: the mean is the reward itself: refused (verl then takes mean 0 and std 1, which is REINFORCE).
All rewards equal: std is 0, A is exactly 0. Rewards that differ by far less than 1e-6: A shrinks to
(r_i - mean) / 1e-6 instead of being blown up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from remax_megatron.algorithm.estimators.groups import require_two, summed_differences

EPSILON = 1e-6


def advantages(
    rewards: Sequence[Sequence[float]], greedy: Sequence[float] | None = None, *, norm_by_std: bool = True
) -> list[list[float]]:
    """[prompts][n] advantages of rewards [prompts][n]; `greedy` is not used. ValueError where n < 2."""
    require_two("grpo", rewards)
    centred = [[difference / len(group) for difference in summed_differences(group)] for group in rewards]
    if not norm_by_std:
        return centred
    scales = [_std(group) + EPSILON for group in centred]
    return [[a / scale for a in group] for group, scale in zip(centred, scales, strict=True)]


def _std(centred: Sequence[float]) -> float:
    return math.sqrt(sum([a * a for a in centred]) / (len(centred) - 1))
