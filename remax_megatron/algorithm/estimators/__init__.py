"""Advantage estimators by name, and the variances that those not chosen would have had. Plain Python, no torch.

Every estimator turns rewards [prompts][n], and the rewards of the greedy answers [prompts] where it needs them, into
one advantage per answer, [prompts][n]. What a KL in the reward adds per token is in `algorithm/kl.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from remax_megatron.algorithm.estimators import gae, grpo, reinforce, remax, reward_softmax, rloo

Advantages = Callable[[Sequence[Sequence[float]], Sequence[float] | None], list[list[float]]]


@dataclass(frozen=True)
class Estimator:
    """`advantages(rewards, greedy)` with its options bound.

    `needs_greedy`: the engine must also answer greedily. `min_samples`: the fewest sampled answers per prompt.
    `unbiased`: the expectation of mean_i A_i grad log pi(y_i) is the gradient of the expected reward, exactly.
    `needs_critic`: what it gives are outcomes, of which a critic's values make advantages (algorithm/gae.py).
    """

    name: str
    advantages: Advantages
    needs_greedy: bool
    min_samples: int
    unbiased: bool
    needs_critic: bool = False


_ESTIMATORS = (
    Estimator("remax", remax.advantages, needs_greedy=True, min_samples=1, unbiased=True),
    Estimator("rloo", rloo.advantages, needs_greedy=False, min_samples=2, unbiased=True),
    Estimator("grpo", grpo.advantages, needs_greedy=False, min_samples=2, unbiased=False),
    Estimator("reinforce", reinforce.advantages, needs_greedy=False, min_samples=1, unbiased=True),
    Estimator("gae", gae.advantages, needs_greedy=False, min_samples=1, unbiased=False, needs_critic=True),
    Estimator("reward_softmax", reward_softmax.advantages, needs_greedy=False, min_samples=2, unbiased=False),
)
NAMES = tuple(estimator.name for estimator in _ESTIMATORS)


def get_estimator(name: str, *, norm_by_std: bool = True, temperature: float = 1.0) -> Estimator:
    """The estimator `name`, one of NAMES; `norm_by_std` is grpo's option, `temperature` reward_softmax's."""
    assert name in NAMES, name
    estimator = _ESTIMATORS[NAMES.index(name)]
    if name == "grpo":
        return replace(estimator, advantages=partial(grpo.advantages, norm_by_std=norm_by_std))
    if name == "reward_softmax":
        reward_softmax.check_temperature(temperature)
        return replace(estimator, advantages=partial(reward_softmax.advantages, temperature=temperature))
    return estimator


def estimator_variances(rewards: Sequence[Sequence[float]], greedy: Sequence[float] | None) -> dict[str, float]:
    """Variance over all answers of the batch of the advantages under remax, rloo, grpo (without std) and reinforce.

    Rewards [prompts][n]. Only what can be computed: remax where greedy rewards are given, rloo and grpo where every
    prompt has two answers. It is the variance of the advantages (mean removed, divided by the number of answers), a
    proxy for that of the gradient. grpo's is ((n - 1) / n)^2 times rloo's, and so is its gradient's: compare rloo's.
    ValueError when there is no answer.
    """
    groups = [group for group in rewards if group]
    if not groups:
        raise ValueError("the variance of no advantage is not defined")
    found = {"reinforce": _variance(reinforce.advantages(rewards))}
    if greedy is not None:
        found["remax"] = _variance(remax.advantages(rewards, greedy))
    if all(len(group) >= 2 for group in rewards):
        found["rloo"] = _variance(rloo.advantages(rewards))
        found["grpo"] = _variance(grpo.advantages(rewards, norm_by_std=False))
    return found


def _variance(advantages: Sequence[Sequence[float]]) -> float:
    values = [value for group in advantages for value in group]
    mean = sum(values) / len(values)
    return sum([(value - mean) ** 2 for value in values]) / len(values)
