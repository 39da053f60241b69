"""Refilling: which prompts teach, where the drawing stops, and that the estimate is that of all prompts."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence

import pytest

from remax_megatron.algorithm.advantages import are_informative
from remax_megatron.algorithm.estimators import get_estimator
from remax_megatron.algorithm.refill import next_round, num_used, weight_factor
from remax_megatron.rollout.refill import refill
from remax_megatron.types import Completion, Prompt, Rollout
from tests.algorithm.test_estimators import POLICY, TRUE_GRADIENT, gradient


def rollout(rewards: Sequence[float], greedy: float, masked: bool = False, index: int = 0) -> Rollout:
    samples = [Completion([1], [-1.0], True, 0, reward=reward, masked=masked) for reward in rewards]
    return Rollout(Prompt(index, (1,), "s", ""), samples, Completion([1], [-1.0], True, 0, reward=greedy))


def test_a_prompt_is_informative_when_an_advantage_is_not_0() -> None:
    rollouts = [
        rollout([1.0, 1.0], 1.0),  # all tie with the greedy answer
        rollout([1.0, 1.0], 0.0),  # equal, but better than it
        rollout([0.1, 1.0], 1.0),
        rollout([0.1, 1.0], 1.0, masked=True),
    ]
    assert are_informative(rollouts, get_estimator("remax")) == [False, True, True, False]
    for name in ("rloo", "grpo"):
        assert are_informative(rollouts, get_estimator(name)) == [False, False, True, False]


def test_where_the_drawing_stops() -> None:
    draws = [False, True, False, True, True]
    assert [num_used(draws, wanted, limit=5) for wanted in (1, 2, 3, 4)] == [2, 4, 5, 5]
    assert [num_used(draws, 2, limit) for limit in (1, 3, 4, 9)] == [1, 3, 4, 4]
    # Rounds: the batch; 2 of 4 found, so 2 more take 4; none found; at the limit; enough.
    assert next_round([], 4, 16) == 4 and next_round([], 4, 3) == 3
    assert next_round([True, False, False, True], 4, 16) == 4
    assert next_round([False] * 4, 4, 64) == 16 and next_round([False] * 4, 4, 16) == 12
    assert next_round([False] * 4, 4, 4) == next_round([True] * 4, 4, 16) == next_round([True] * 5, 4, 16) == 0


def test_weights_by_hand() -> None:
    assert weight_factor(4, 4, wanted=4) == 1.0  # nothing was refilled
    # 4 of 10: over all ten a mean has 1/10 of each; it shall be 3/9 of the mean over four, which is 1/12.
    assert weight_factor(4, 10, wanted=4) / 10 == pytest.approx(1 / 12)
    assert weight_factor(3, 16, wanted=4) == weight_factor(0, 16, wanted=4) == 1.0  # the limit ended it
    for wrong in ((5, 10, 4), (2, 1, 4), (1, 1, 1)):
        with pytest.raises(AssertionError):
            weight_factor(*wrong)


def test_rounds_and_surplus() -> None:
    """Every third prompt is informative: three of the first round of 3 are asked for, one is found, and so on."""
    prompts = [Prompt(i, (1,), "s", "") for i in range(40)]
    asked: list[int] = []

    def answered(batch: Sequence[Prompt]) -> list[Rollout]:
        asked.append(len(batch))
        return [rollout([float(prompt.index % 3 == 2)], 0.0, index=prompt.index) for prompt in batch]

    found = refill(iter(prompts), answered, get_estimator("remax"), wanted=3, limit=12)
    assert asked == [3, 6] and found.num_answered == 9
    assert [one.prompt.index for one in found.rollouts] == list(range(9))
    asked.clear()
    found = refill(iter(prompts[2:]), answered, get_estimator("remax"), wanted=3, limit=12)
    assert asked == [3, 6] and found.num_answered == 9  # 2, 5 and 8 teach: two were surplus
    assert [one.prompt.index for one in found.rollouts] == [2, 3, 4, 5, 6, 7, 8]
    asked.clear()
    found = refill(iter(prompts), answered, get_estimator("remax"), wanted=3, limit=5)
    assert asked == [3, 2] and len(found.rollouts) == 5


# On the three-armed policy of test_estimators: the greedy answer is arm 0, with which half of the answers tie.
WANTED, LIMIT = 2, 5
Draw = tuple[int, ...]  # the arms of a prompt's answers


def estimate(draws: Sequence[Draw], rewards: Sequence[float], factor: Callable[[int, int, int], float]) -> list[float]:
    """The gradient from the draws that are used: each 1 / D, times `factor`."""
    rollouts = [rollout([rewards[arm] for arm in arms], rewards[0]) for arms in draws]
    flags = are_informative(rollouts, get_estimator("remax"))
    used = num_used(flags, WANTED, LIMIT)
    scale = factor(sum(flags[:used]), used, WANTED) / used
    parts = [gradient(arms, [rewards[arm] - rewards[0] for arm in arms]) for arms in draws[:used]]
    return [scale * sum(part[k] for part in parts) for k in range(3)]


def kept_by_accuracy(draws: Sequence[Draw], rewards: Sequence[float]) -> list[float]:
    """As a filter by the mean accuracy does it, the dropped ones counted: all right or all wrong has no weight."""
    kept = [arms for arms in draws if 0.0 < sum(rewards[arm] for arm in arms) / len(arms) < 1.0]
    parts = [gradient(arms, [rewards[arm] - rewards[0] for arm in arms]) for arms in kept]
    return [sum(part[k] for part in parts) / len(draws) for k in range(3)]


def true_gradient(rewards: Sequence[float]) -> list[float]:
    mean = sum(p * r for p, r in zip(POLICY, rewards, strict=True))
    return [p * (r - mean) for p, r in zip(POLICY, rewards, strict=True)]


ARMS = [0.4, 1.0, 0.0]  # those of test_estimators


def test_the_toy_is_that_of_the_estimators() -> None:
    assert true_gradient(ARMS) == pytest.approx(TRUE_GRADIENT)


def expectation(of: Callable[[Sequence[Draw]], list[float]]) -> list[float]:
    """Over all sequences of LIMIT draws of one answer each, exactly."""
    total = [0.0] * 3
    for arms in itertools.product(range(3), repeat=LIMIT):
        probability = math.prod(POLICY[arm] for arm in arms)
        total = [t + probability * g for t, g in zip(total, of([(arm,) for arm in arms]), strict=True)]
    return total


def test_the_refilled_estimate_is_unbiased_exactly_and_a_plain_count_is_not() -> None:
    assert expectation(lambda draws: estimate(draws, ARMS, weight_factor)) == pytest.approx(TRUE_GRADIENT, abs=1e-12)
    for factor in (lambda k, d, wanted: 1.0, lambda k, d, wanted: d / max(k, 1)):
        # K / D is too large by some; dividing by the informative alone by 1 / P(informative), about.
        found = expectation(lambda draws, factor=factor: estimate(draws, ARMS, factor))
        assert found[1] > 1.1 * TRUE_GRADIENT[1]


def worst_standard_errors(of: Callable[[Sequence[Draw]], list[float]], rewards: Sequence[float]) -> float:
    """How many standard errors the mean over 20000 batches of LIMIT draws of two answers is off, at worst."""
    generator, num = random.Random(11), 20_000
    found = [of([tuple(generator.choices(range(3), POLICY, k=2)) for _ in range(LIMIT)], rewards) for _ in range(num)]
    off = []
    for k, truth in enumerate(true_gradient(rewards)):
        mean = sum(one[k] for one in found) / num
        variance = sum((one[k] - mean) ** 2 for one in found) / (num - 1)
        off.append(abs(mean - truth) / math.sqrt(variance / num))
    return max(off)


@pytest.mark.parametrize("rewards", [ARMS, [1.0, 1.0, 0.0]])
def test_sampled_refills_are_within_four_standard_errors_and_a_filter_by_accuracy_is_not(
    rewards: list[float],
) -> None:
    assert worst_standard_errors(lambda draws, r: estimate(draws, r, weight_factor), rewards) < 4.0
    assert worst_standard_errors(lambda draws, r: estimate(draws, r, lambda k, d, wanted: 1.0), rewards) > 4.0
    assert worst_standard_errors(kept_by_accuracy, rewards) > 4.0
