"""ReMax's advantage by a hand table, the check of weight versions, and the rows made of it."""

from __future__ import annotations

import pytest

from remax_megatron.algorithm.advantages import advantages, training_rows
from remax_megatron.algorithm.estimators import get_estimator
from remax_megatron.types import Completion, Prompt, Rollout

REMAX = get_estimator("remax")


def completion(reward: float, tokens: list[int] | None = None, version: int = 4) -> Completion:
    token_ids = [7] if tokens is None else tokens
    return Completion(token_ids, [-0.5 * t for t in token_ids], True, version, reward=reward)


def rollout(index: int, rewards: list[float], greedy: float, version: int = 4) -> Rollout:
    """Sample i has i tokens: 10 index + i, + i + 1, ..."""
    samples = [completion(r, list(range(10 * index + i, 10 * index + 2 * i)), version) for i, r in enumerate(rewards)]
    return Rollout(Prompt(index, (index, 1), "source", "18"), samples, completion(greedy, version=version))


def test_reward_minus_the_greedy_reward() -> None:
    rollouts = [
        rollout(0, [1.0, 0.0, 1.0], greedy=0.0),  # win, tie, win
        rollout(1, [1.0, 0.0, 0.0], greedy=1.0),  # tie, lose, lose
        rollout(2, [0.25, -1.5], greedy=0.5),  # any number of samples, any reward
        rollout(3, [], greedy=1.0),
    ]
    assert advantages(rollouts, REMAX) == [[1.0, 0.0, 1.0], [0.0, -1.0, -1.0], [-0.25, -2.0], []]
    assert advantages([], REMAX) == []


def test_a_baseline_of_other_weights_is_refused() -> None:
    mixed = rollout(12, [1.0, 0.0], greedy=0.0, version=4)
    mixed.samples[1].weight_version = 5
    for function in (advantages, training_rows):
        with pytest.raises(ValueError, match="prompt 12: the baseline comes from weight version 4, a sample from 5"):
            function([rollout(0, [1.0], greedy=0.0), mixed], REMAX)
    # Different prompts may come from different weights: each baseline is that of its own samples.
    assert advantages([rollout(0, [1.0], 0.0, version=4), rollout(1, [1.0], 0.0, version=5)], REMAX) == [[1.0], [1.0]]


def test_rows_keep_order_and_carry_the_advantage_on_every_token() -> None:
    rollouts = [rollout(1, [1.0, 0.0, 1.0], greedy=1.0), rollout(0, [0.0, 0.5], greedy=0.25)]
    rows = training_rows(rollouts, REMAX)
    assert [(row.prompt_ids, row.response_ids, row.advantages) for row in rows] == [
        ((1, 1), [], []),
        ((1, 1), [11], [-1.0]),
        ((1, 1), [12, 13], [0.0, 0.0]),
        ((0, 1), [], []),
        ((0, 1), [1], [0.25]),
    ]
    assert [row.rollout_logprobs for row in rows] == [[], [-5.5], [-6.0, -6.5], [], [-0.5]]
    assert all(row.old_logprobs is None for row in rows)  # one update per batch: every ratio is 1
    assert [row.num_tokens for row in rows] == [2, 3, 4, 2, 3]
