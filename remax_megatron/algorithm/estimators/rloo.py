"""RLOO, REINFORCE leave-one-out (arXiv 2402.14740; Kool et al. 2019): each answer against the mean of the others.

    A_i = r_i - 1 / (n - 1) sum_{j != i} r_j  =  n / (n - 1) (r_i - mean(r))

Assumes that the n answers to a prompt are independent samples of the same policy. The baseline of answer i does not
depend on answer i, so the gradient is unbiased. The advantages of a prompt sum to 0.

Degenerate cases. n = 1: there is no other answer: refused (verl's `compute_rloo_outcome_advantage`, core_algos.py,
then trains REINFORCE without saying so, and its vectorised form trains nothing). All rewards equal: A is exactly 0.
There is no division by a standard deviation.
"""

from __future__ import annotations

from collections.abc import Sequence

from remax_megatron.algorithm.estimators.groups import require_two, summed_differences


def advantages(rewards: Sequence[Sequence[float]], greedy: Sequence[float] | None = None) -> list[list[float]]:
    """[prompts][n] advantages of rewards [prompts][n]; `greedy` is not used. ValueError where n < 2."""
    require_two("rloo", rewards)
    return [[difference / (len(group) - 1) for difference in summed_differences(group)] for group in rewards]
