"""Generalised advantage estimation by hand."""

from __future__ import annotations

import pytest

from remax_megatron.algorithm.gae import explained_variance, gae, token_rewards, whitened

# rewards, values, gamma, lambda -> advantages, returns
TABLE = {
    # lambda = gamma = 1: the return is the reward to go, 1 at every token.
    "no discount": ([0.0, 0.0, 1.0], [0.5, 0.6, 0.8], 1.0, 1.0, [0.5, 0.4, 0.2], [1.0, 1.0, 1.0]),
    # delta = 0.9 x 0.6 - 0.5 = 0.04, 0.9 x 0.8 - 0.6 = 0.12, 1 - 0.8 = 0.2; gamma lambda = 0.45
    "discount": ([0.0, 0.0, 1.0], [0.5, 0.6, 0.8], 0.9, 0.5, [0.1345, 0.21, 0.2], [0.6345, 0.81, 1.0]),
    # The KL of 0.1 and -0.2 nats at 0.5 per nat, an outcome of -1: delta = -0.05 - 0.4 - 0.2 = -0.65, -0.9 + 0.4 = -0.5
    "KL per token": (token_rewards(-1.0, 2, [0.1, -0.2], 0.5), [0.2, -0.4], 1.0, 0.8, [-1.05, -0.5], [-0.85, -0.9]),
    "one step": ([0.0, 0.0, 1.0], [0.5, 0.6, 0.8], 1.0, 0.0, [0.1, 0.2, 0.2], [0.6, 0.8, 1.0]),
    "nothing": ([], [], 1.0, 1.0, [], []),
}


@pytest.mark.parametrize(("rewards", "values", "gamma", "lam", "advantages", "returns"), TABLE.values(), ids=TABLE)
def test_by_hand(rewards, values, gamma, lam, advantages, returns) -> None:
    found = gae(rewards, values, gamma, lam)
    assert found == (pytest.approx(advantages, abs=1e-12), pytest.approx(returns, abs=1e-12))


def test_rewards_of_tokens() -> None:
    assert token_rewards(1.0, 3) == [0.0, 0.0, 1.0]
    assert token_rewards(1.0, 3, [0.0, 0.5, 0.5], 0.1) == pytest.approx([0.0, -0.05, 0.95])
    assert token_rewards(1.0, 0) == token_rewards(1.0, 0, [], 0.1) == []


def test_without_values_it_is_the_reward_to_go() -> None:
    """As a KL in the reward has it, and as REINFORCE does without one."""
    from remax_megatron.algorithm.kl import with_kl_in_reward

    kl = [0.3, -0.1, 0.2]
    advantages, _ = gae(token_rewards(1.0, 3, kl, 0.5), [0.0] * 3, 1.0, 1.0)
    assert advantages == pytest.approx(with_kl_in_reward(1.0, kl, 0.5, "to_go"))


def test_whitening_is_over_all_tokens() -> None:
    # Mean 4; variance (9 + 1 + 1 + 9) / 3 with Bessel's correction.
    std = (20 / 3) ** 0.5
    expected = [[-3 / std], [], [-1 / std, 1 / std, 3 / std]]
    assert [pytest.approx(row, rel=1e-7) for row in expected] == whitened([[1.0], [], [3.0, 5.0, 7.0]])
    assert whitened([[5.0]]) == [[0.0]] and whitened([[], []]) == [[], []] and whitened([]) == []
    assert whitened([[2.0, 2.0]]) == [[0.0, 0.0]]


def test_explained_variance() -> None:
    returns = [1.0, 2.0, 3.0]
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance([7.0, 7.0, 7.0], returns) == pytest.approx(0.0)
    assert explained_variance([3.0, 2.0, 1.0], returns) == pytest.approx(-3.0)  # errors -2, 0, 2: variance 4 to 1
    assert explained_variance([0.0, 1.0], [1.0, 1.0]) == 0.0 == explained_variance([], [])
