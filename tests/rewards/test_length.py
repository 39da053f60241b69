"""What the length of an answer does to its reward, by hand."""

from __future__ import annotations

import pytest

from remax_megatron.algorithm.advantages import training_rows
from remax_megatron.algorithm.estimators import get_estimator
from remax_megatron.rewards.length import LengthRules
from remax_megatron.types import CUT_ANSWERS, Completion, Prompt, Rollout


def answer(num_tokens: int, reward: float = 1.0, finished: bool = True) -> Completion:
    return Completion([7] * num_tokens, [-1.0] * num_tokens, finished, 0, reward=reward)


@pytest.mark.parametrize(
    ("num_tokens", "price"), [(0, 0.0), (80, 0.0), (81, 0.025), (90, 0.25), (100, 0.5), (101, 0.5)]
)
def test_the_price_rises_linearly_over_the_buffer(num_tokens: int, price: float) -> None:
    assert LengthRules("score", 100, 20, 0.5).price(num_tokens) == pytest.approx(price)
    assert LengthRules("score", 100).price(num_tokens) == 0.0


@pytest.mark.parametrize(
    ("cut_answers", "reward", "masked"), [("score", 1.0, False), ("zero", 0.0, False), ("mask", 1.0, True)]
)
def test_cut_answers(cut_answers: str, reward: float, masked: bool) -> None:
    assert cut_answers in CUT_ANSWERS
    rules = LengthRules(cut_answers, 4)
    whole, cut = answer(4), answer(4, finished=False)
    for one in (whole, cut):
        rules.apply(one)
    assert (whole.reward, whole.masked) == (1.0, False)
    assert (cut.reward, cut.masked) == (reward, masked)


def test_a_masked_answer_has_advantage_0_and_stays_in_the_batch() -> None:
    samples = [answer(2, 1.0), answer(3, 1.0, finished=False)]
    rollouts = [Rollout(Prompt(0, (1,), "s", "1"), samples, answer(1, 0.0))]
    LengthRules("mask", 3).apply(samples[1])
    rows = training_rows(rollouts, get_estimator("remax"))
    assert [row.advantages for row in rows] == [[1.0, 1.0], [0.0, 0.0, 0.0]]
