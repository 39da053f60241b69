"""Rejection of answers by the geometric mean of their ratios, by a hand table."""

from __future__ import annotations

import pytest
import torch

from remax_megatron.algorithm.bounds import Bounds
from remax_megatron.algorithm.rejection import SUMS, kept_rows, rejection_metrics

# Ratios 4 and 1; none; 0.5, 0.5 and 0.5; 1: geometric means 2, 0.5 and 1.
RATIO_R = torch.tensor([4.0, 1.0, 0.5, 0.5, 0.5, 1.0])
LENGTHS = [2, 0, 3, 1]
ENGINE_R = torch.tensor([-2.0, -1.0, -0.5, -0.7, -0.9, -0.3])


def kept(upper: float, lower: float | None) -> tuple[list[bool], dict[str, float]]:
    logprob_R = (ENGINE_R + RATIO_R.log()).requires_grad_()
    found, sums = kept_rows(logprob_R, ENGINE_R, LENGTHS, Bounds(upper, lower))
    assert found.dtype == torch.bool and sums.dtype == torch.float64 and not sums.requires_grad
    return found.tolist(), rejection_metrics(dict(zip(SUMS, sums.tolist(), strict=True)))


@pytest.mark.parametrize(
    ("bounds", "expected", "answers", "tokens"),
    [
        ((2.5, 0.4), [True, True, True], 0.0, 0.0),
        ((1.5, 0.4), [False, True, True], 1 / 3, 2 / 6),  # the product of the first is 4, its mean 2
        ((2.5, 0.6), [True, False, True], 1 / 3, 3 / 6),
        ((1.5, 0.6), [False, False, True], 2 / 3, 5 / 6),
    ],
)
def test_answers_outside_are_rejected(
    bounds: tuple[float, float], expected: list[bool], answers: float, tokens: float
) -> None:
    found, metrics = kept(*bounds)
    assert found == expected
    assert metrics == pytest.approx(
        {"rejection/answer_share": answers, "rejection/token_share": tokens, "rejection/ratio_mean": 3.5 / 3}
    )


def test_the_length_of_an_answer_does_not_matter() -> None:
    """Ratios of 1.1 throughout: the product of 64 of them is 445, the geometric mean stays 1.1."""
    for length in (1, 8, 64):
        logprob_R = torch.full((length,), 1.1).log()
        assert kept_rows(logprob_R, torch.zeros(length), [length], Bounds(1.2, 0.9))[0].tolist() == [True]
        assert kept_rows(logprob_R, torch.zeros(length), [length], Bounds(1.05, 0.9))[0].tolist() == [False]


def test_what_is_no_number_is_rejected_and_nothing_is_nothing() -> None:
    assert kept_rows(torch.tensor([float("nan")]), torch.zeros(1), [1], Bounds(2.0, 0.5))[0].tolist() == [False]
    found, sums = kept_rows(torch.zeros(0), torch.zeros(0), [0, 0], Bounds(2.0, 0.5))
    assert found.tolist() == [] and rejection_metrics(dict(zip(SUMS, sums.tolist(), strict=True))) == {}
    with pytest.raises(AssertionError, match="lower=None"):
        kept(2.0, None)
