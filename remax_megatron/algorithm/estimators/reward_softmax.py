"""Softmax reward weighting: what the verl ReMax guide writes under the name of ReMax, sum_i w_i grad log pi(y_i).

    w_i = exp(r_i / T) / sum_j exp(r_j / T) over the n answers of a prompt;   A_i = n w_i

A loss that is a mean over the n answers divides by n, so A_i = n w_i makes its gradient the guide's sum: exactly
under aggregation "seq-mean-token-sum"; under "token-mean", for answers of equal length, up to that length. The mean
of A over a prompt is 1.

This is not ReMax and not a policy gradient of the expected reward: as n grows it tends to the gradient of
log E[exp(r / T)], which favours the best answers, like reward-weighted regression (Peters and Schaal 2007, and
arXiv 1910.00177). At small n it is biased even for that. There is no baseline and no negative advantage: every
sampled answer is pushed up, the worse ones less. Hardly a row has a zero advantage, so none are left out.

Assumes that the n answers to a prompt are independent samples of the same policy, and that T suits the scale of the
rewards: T -> 0 trains only on the best answer, T -> infinity on all alike.

`effective_sample_size` says how many answers of a prompt carry the update: n when all weights are equal, 1 when one
has all the weight.

Degenerate cases. n = 1: w = 1 whatever the reward, so nothing could be learnt from it: refused. All rewards equal:
w = 1 / n, A = 1, a push that is 0 in expectation only. There is no standard deviation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from remax_megatron.algorithm.estimators.groups import require_two


def advantages(
    rewards: Sequence[Sequence[float]], greedy: Sequence[float] | None = None, *, temperature: float = 1.0
) -> list[list[float]]:
    """[prompts][n] advantages n w_i of rewards [prompts][n]; `greedy` is not used.

    `temperature` is above 0, in units of the reward. ValueError where n < 2.
    """
    require_two("reward_softmax", rewards)
    check_temperature(temperature)
    return [[len(group) * weight for weight in _weights(group, temperature)] for group in rewards]


def effective_sample_size(rewards: Sequence[Sequence[float]], temperature: float = 1.0) -> float:
    """Mean over the prompts of 1 / sum_i w_i^2, from 1 to n. ValueError for what `advantages` refuses and when
    there is no prompt."""
    require_two("reward_softmax", rewards)
    check_temperature(temperature)
    if not rewards:
        raise ValueError("the effective sample size of no prompt is not defined")
    return sum([1.0 / sum([w * w for w in _weights(group, temperature)]) for group in rewards]) / len(rewards)


def check_temperature(temperature: float) -> None:
    """Asserts that a temperature is above 0."""
    assert 0.0 < temperature < math.inf, temperature


def _weights(group: Sequence[float], temperature: float) -> list[float]:
    best = max(group)
    exps = [math.exp((reward - best) / temperature) for reward in group]
    total = sum(exps)
    return [e / total for e in exps]
