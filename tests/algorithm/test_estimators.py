"""Estimators by hand tables, by exact expectations and by sampling on a three-armed policy whose gradient is known."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remax_megatron.algorithm.estimators import NAMES, estimator_variances, get_estimator
from remax_megatron.algorithm.estimators.reward_softmax import effective_sample_size

# Two prompts of three answers: sums 1 and 6, means 1/3 and 2.
REWARDS = [[1.0, 0.0, 0.0], [1.0, 2.0, 3.0]]
GREEDY = [0.0, 2.5]


def close(expected: list[list[float]]) -> list:
    return [pytest.approx(group, abs=1e-12) for group in expected]


def test_remax_is_the_reward_minus_the_greedy_reward() -> None:
    assert get_estimator("remax").advantages(REWARDS, GREEDY) == [[1.0, 0.0, 0.0], [-1.5, -0.5, 0.5]]
    assert get_estimator("remax").advantages([[1.0], []], [1.0, 0.0]) == [[0.0], []]  # any n
    with pytest.raises(ValueError, match="needs the reward of each prompt's greedy answer"):
        get_estimator("remax").advantages(REWARDS, None)
    with pytest.raises(ValueError, match="2 prompts, 1 rewards"):
        get_estimator("remax").advantages(REWARDS, [0.0])


def test_reinforce_is_the_reward() -> None:
    found = get_estimator("reinforce").advantages(REWARDS, None)
    assert found == REWARDS and found[0] is not REWARDS[0]


def test_rloo_against_the_mean_of_the_others() -> None:
    # 1 - (0 + 0) / 2, 0 - (1 + 0) / 2, the same;  1 - (2 + 3) / 2, 2 - (1 + 3) / 2, 3 - (1 + 2) / 2
    assert get_estimator("rloo").advantages(REWARDS, None) == [[1.0, -0.5, -0.5], [-1.5, 0.0, 1.5]]


def test_grpo_against_the_mean_of_all() -> None:
    without = get_estimator("grpo", norm_by_std=False).advantages(REWARDS, None)
    assert without == close([[2 / 3, -1 / 3, -1 / 3], [-1.0, 0.0, 1.0]])
    # Bessel: (4/9 + 1/9 + 1/9) / 2 = 1/3, std 0.5773502692;  (1 + 0 + 1) / 2 = 1, std 1. Then + 1e-6.
    first, second = 0.5773502691896258 + 1e-6, 1.0 + 1e-6
    normed = get_estimator("grpo").advantages(REWARDS, None)
    assert normed == close([[2 / 3 / first, -1 / 3 / first, -1 / 3 / first], [-1 / second, 0.0, 1 / second]])
    # The epsilon tells: rewards 1e-6 apart have std 1e-6 / sqrt 2, so A = 0.5e-6 / (0.7071e-6 + 1e-6), not 0.7071.
    tiny = get_estimator("grpo").advantages([[0.0, 1e-6]], None)
    assert tiny == close([[-0.5 / (math.sqrt(0.5) + 1), 0.5 / (math.sqrt(0.5) + 1)]])


def test_reward_softmax_is_n_times_the_softmax() -> None:
    # T = 1 / ln 2 turns exp(r / T) into 2^r: 2, 1, 1 of 4 and 2, 4, 8 of 14; times n = 3.
    estimator = get_estimator("reward_softmax", temperature=1 / math.log(2))
    assert estimator.advantages(REWARDS, None) == close([[1.5, 0.75, 0.75], [3 / 7, 6 / 7, 12 / 7]])
    # 1 / sum w^2: 16 / (4 + 1 + 1) = 8/3 and 196 / (4 + 16 + 64) = 7/3; their mean is 2.5.
    assert effective_sample_size(REWARDS, 1 / math.log(2)) == pytest.approx(2.5)
    assert effective_sample_size([[0.3] * 4]) == pytest.approx(4.0)  # all alike: all of them
    # A cold softmax trains on the best answer alone, and large rewards do not overflow.
    cold = get_estimator("reward_softmax", temperature=1e-3)
    assert cold.advantages([[1e6, 1e6 - 10.0]], None) == [[2.0, 0.0]]
    assert effective_sample_size([[1e6, 1e6 - 10.0]], 1e-3) == 1.0


@pytest.mark.parametrize(
    ("name", "expected"),
    [("remax", 0.0), ("rloo", 0.0), ("grpo", 0.0), ("reinforce", 0.1), ("reward_softmax", 1.0)],
)
def test_all_rewards_equal(name: str, expected: float) -> None:
    # Exactly, not up to rounding: three times 0.1 has a mean of 0.10000000000000002.
    assert get_estimator(name).advantages([[0.1] * 3], [0.1]) == [[expected] * 3]


def test_too_few_answers_are_refused() -> None:
    for name in NAMES:
        estimator = get_estimator(name)
        if estimator.min_samples == 1:
            assert len(estimator.advantages([[0.5]], [0.0])) == 1
            continue
        with pytest.raises(ValueError, match=rf"{name} .* needs at least 2, but prompt 1 of the batch has 1"):
            estimator.advantages([[0.0, 1.0], [0.5]], None)
    with pytest.raises(ValueError, match="needs at least 2"):
        effective_sample_size([[1.0]])
    with pytest.raises(ValueError, match="of no prompt"):
        effective_sample_size([])


def test_unknown_options_are_refused() -> None:
    with pytest.raises(AssertionError, match="opo"):
        get_estimator("opo")
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(AssertionError, match=str(temperature)):
            get_estimator("reward_softmax", temperature=temperature)
        with pytest.raises(AssertionError, match=str(temperature)):
            effective_sample_size(REWARDS, temperature)
    assert [get_estimator(name).name for name in NAMES] == list(NAMES)
    assert [name for name in NAMES if get_estimator(name).needs_greedy] == ["remax"]
    assert [name for name in NAMES if get_estimator(name).needs_critic] == ["gae"]


def test_variances_of_the_other_estimators() -> None:
    # remax      1 0 0 -1.5 -0.5 0.5      mean -1/12: 3.75/6 - 1/144 = 0.618055...
    # rloo       1 -.5 -.5 -1.5 0 1.5     mean 0:     6/6 = 1
    # grpo       2/3 of rloo's            mean 0:     4/9
    # reinforce  1 0 0 1 2 3              mean 7/6:   15/6 - 49/36 = 41/36
    found = estimator_variances(REWARDS, GREEDY)
    assert found == pytest.approx({"remax": 3.75 / 6 - 1 / 144, "rloo": 1.0, "grpo": 4 / 9, "reinforce": 41 / 36})
    assert set(estimator_variances([[1.0], [0.0]], [0.0, 0.0])) == {"remax", "reinforce"}  # n = 1
    assert set(estimator_variances(REWARDS, None)) == {"rloo", "grpo", "reinforce"}  # no greedy answers
    with pytest.raises(ValueError, match="of no advantage"):
        estimator_variances([[]], [1.0])


groups = st.lists(st.lists(st.floats(-10.0, 10.0), min_size=2, max_size=8), min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(groups)
def test_group_estimators_sum_to_zero_and_softmax_to_n(rewards: list[list[float]]) -> None:
    for estimator in (get_estimator("rloo"), get_estimator("grpo"), get_estimator("grpo", norm_by_std=False)):
        for group in estimator.advantages(rewards, None):
            assert abs(sum(group)) <= 1e-9 * max(1.0, *map(abs, group))
    for group in get_estimator("reward_softmax").advantages(rewards, None):
        assert sum(group) == pytest.approx(len(group)) and min(group) >= 0.0
    for group in rewards:
        assert 1.0 - 1e-9 <= effective_sample_size([group]) <= len(group) + 1e-9


# A policy over three answers of one token: pi = softmax(theta), grad_theta log pi(a) = e_a - pi, and
# d/d theta_k sum_a pi_a r_a = pi_k (r_k - sum_a pi_a r_a), the true gradient. The greedy answer is arm 0, and the mean
# reward 0.5 x 0.4 + 0.3 x 1 + 0.2 x 0 = 0.5.
POLICY = [0.5, 0.3, 0.2]
ARM_REWARDS = [0.4, 1.0, 0.0]
TRUE_GRADIENT = [-0.05, 0.15, -0.10]  # 0.5 x -0.1, 0.3 x 0.5, 0.2 x -0.5
NUM_ANSWERS = 4


def gradient(arms: Sequence[int], advantages: Sequence[float]) -> list[float]:
    """mean_i A_i (e_{a_i} - pi)"""
    pull = [0.0] * 3
    for arm, advantage in zip(arms, advantages, strict=True):
        pull[arm] += advantage
    return [(pull[k] - sum(advantages) * POLICY[k]) / len(arms) for k in range(3)]


def estimate(name: str, **options: bool) -> Callable[[Sequence[int]], list[float]]:
    advantages = get_estimator(name, **options).advantages
    return lambda arms: gradient(arms, advantages([[ARM_REWARDS[a] for a in arms]], [ARM_REWARDS[0]])[0])


def expectation(name: str, num_answers: int, **options: bool) -> list[float]:
    """Over all 3^n outcomes, exactly."""
    total = [0.0] * 3
    of = estimate(name, **options)
    for arms in itertools.product(range(3), repeat=num_answers):
        probability = math.prod(POLICY[arm] for arm in arms)
        total = [t + probability * g for t, g in zip(total, of(arms), strict=True)]
    return total


@pytest.mark.parametrize(("name", "n"), [("remax", 1), ("remax", 3), ("reinforce", 1), ("rloo", 2), ("rloo", 4)])
def test_unbiased_exactly(name: str, n: int) -> None:
    assert get_estimator(name).unbiased
    assert expectation(name, n) == pytest.approx(TRUE_GRADIENT, abs=1e-12)


def test_the_others_are_biased_exactly_so() -> None:
    # The mean with the answer itself: (n - 1) / n of the gradient. With the std even the direction differs.
    expected = [0.75 * g for g in TRUE_GRADIENT]
    assert expectation("grpo", 4, norm_by_std=False) == pytest.approx(expected, abs=1e-12)
    for name in ("grpo", "reward_softmax"):
        assert not get_estimator(name).unbiased
        found = expectation(name, 4)
        ratios = [f / g for f, g in zip(found, TRUE_GRADIENT, strict=True)]
        assert max(ratios) - min(ratios) > 0.01 * abs(ratios[0])


def worst_standard_errors(name: str, **options: bool) -> float:
    """How many standard errors the mean over 40000 sampled prompts is off, in the worst of the three components."""
    generator = random.Random(7)
    of, num = estimate(name, **options), 40_000
    draws = [of(generator.choices(range(3), POLICY, k=NUM_ANSWERS)) for _ in range(num)]
    off = []
    for k, truth in enumerate(TRUE_GRADIENT):
        mean = sum(draw[k] for draw in draws) / num
        variance = sum((draw[k] - mean) ** 2 for draw in draws) / (num - 1)
        off.append(abs(mean - truth) / math.sqrt(variance / num))
    return max(off)


def test_sampled_gradients_are_within_four_standard_errors_and_a_batch_dependent_baseline_is_not() -> None:
    assert worst_standard_errors("remax") < 4.0
    assert worst_standard_errors("rloo") < 4.0
    assert worst_standard_errors("reinforce") < 4.0
    # The mean of the batch, the answer itself included: a quarter of the gradient is missing.
    assert worst_standard_errors("grpo", norm_by_std=False) > 4.0
