"""Generalised advantage estimation (arXiv 1506.02438): one advantage per token, from rewards and a critic's values.

The state of token t is the prompt and the tokens before it, V_t its value; after the last token it is 0, also of an
answer that the length limit cut (as in verl's `compute_gae_advantage_return`, core_algos.py). With rewards r_t,

    delta_t  = r_t + gamma V_{t+1} - V_t
    A_t      = delta_t + gamma lambda A_{t+1}
    return_t = A_t + V_t                           what the critic is taught

gamma = lambda = 1 and V = 0 give the undiscounted reward to go. lambda = 1 does not trust the values beyond their use
as a baseline: the estimate is unbiased whatever they are. A smaller lambda trades bias for variance.

The policy's advantages are whitened over all response tokens of a rollout batch: mean 0, standard deviation 1, with
Bessel's correction, as in verl. That makes their scale that of no reward, and moves tokens that did neither good nor
harm away from 0. Plain Python, so that every rank has the same numbers, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

EPSILON = 1e-8  # added to the variance


def token_rewards(outcome: float, length: int, kl: Sequence[float] | None = None, beta: float = 0.0) -> list[float]:
    """The reward of each of an answer's `length` tokens: minus `beta` times its KL, and the outcome on the last one.

    Example: token_rewards(1.0, 3, [0.0, 0.5, 0.5], beta=0.1) == [0.0, -0.05, 0.95]
    """
    rewards = [0.0] * length if kl is None else [-beta * one for one in kl]
    if rewards:
        rewards[-1] += outcome
    return rewards


def gae(rewards: Sequence[float], values: Sequence[float], gamma: float, lam: float) -> tuple[list[float], list[float]]:
    """(advantages, returns) of the tokens of one answer, whose `rewards` and `values` are given in order.

    Example: gae([0.0, 1.0], [0.5, 0.5], gamma=1.0, lam=0.5) == ([0.25, 0.5], [0.75, 1.0])
    """
    advantages: list[float] = []
    later_value = later_advantage = 0.0
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        later_advantage = reward + gamma * later_value - value + gamma * lam * later_advantage
        later_value = value
        advantages.append(later_advantage)
    advantages.reverse()
    return advantages, [advantage + value for advantage, value in zip(advantages, values, strict=True)]


def whitened(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    """The numbers of all `rows` with mean 0 and standard deviation 1. A single number becomes 0.

    Example: whitened([[1.0], [3.0]]) is about [[-0.7071], [0.7071]]
    """
    numbers = [one for row in rows for one in row]
    if not numbers:
        return [[] for _ in rows]
    mean = math.fsum(numbers) / len(numbers)
    variance = math.fsum([(one - mean) ** 2 for one in numbers]) / max(len(numbers) - 1, 1)
    scale = 1.0 / math.sqrt(variance + EPSILON)
    return [[(one - mean) * scale for one in row] for row in rows]


def explained_variance(values: Sequence[float], returns: Sequence[float]) -> float:
    """1 - Var(return - value) / Var(return): 1 when the values are the returns, 0 or less when a constant would do as
    well; 0 where the returns do not vary."""
    spread = _variance(returns)
    errors = [given - value for given, value in zip(returns, values, strict=True)]
    return 1.0 - _variance(errors) / spread if spread else 0.0


def _variance(numbers: Sequence[float]) -> float:
    mean = math.fsum(numbers) / max(len(numbers), 1)
    return math.fsum([(one - mean) ** 2 for one in numbers]) / max(len(numbers), 1)
