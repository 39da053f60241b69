"""Importance weights, truncated and masked, and their metrics by hand tables."""

from __future__ import annotations

import pytest
import torch

from remax_megatron.algorithm.bounds import Bounds, read_bounds, rejection_bounds
from remax_megatron.algorithm.importance import SUMS, ImportanceStats, importance_weights

LENGTHS = [2, 0, 3]
# Ratios of the tokens: 0.5 and 4, then 1.5, 1 and 0.5; of the rows: 2 and 0.75.
RATIO_R = torch.tensor([0.5, 4.0, 1.5, 1.0, 0.5])
TRUNCATES = Bounds(1.0)
ROLLOUT_R = torch.tensor([-0.5, -3.0, -1.0, -0.2, -0.1])


def weights(
    level: str, upper: float, lower: float | None = None, lengths: list[int] = LENGTHS
) -> tuple[torch.Tensor, ImportanceStats]:
    logprob_R = (ROLLOUT_R + RATIO_R.log()).requires_grad_()
    bounds = Bounds(upper, lower)
    return with_stats(importance_weights(logprob_R, ROLLOUT_R, lengths, level=level, bounds=bounds))


def with_stats(found: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ImportanceStats]:
    weight_R, sums, largest = found
    assert sums.dtype == largest.dtype == torch.float64
    return weight_R, ImportanceStats(**dict(zip(SUMS, sums.tolist(), strict=True)), largest=float(largest))


def test_token_level() -> None:
    weight_R, stats = weights("token", 2.0)
    torch.testing.assert_close(weight_R, torch.tensor([0.5, 2.0, 1.5, 1.0, 0.5]))
    assert weight_R.dtype == torch.float32 and not weight_R.requires_grad
    # Before the cut 7.5 / 5 on average and at most 4; one of five cut;
    # after it the sum is 5.5, the squares .25 + 4 + 2.25 + 1 + .25 = 7.75: 5.5^2 / (5 x 7.75).
    assert stats.metrics(TRUNCATES) == pytest.approx(
        {
            "importance/mean": 1.5,
            "importance/max": 4.0,
            "importance/truncated_share": 0.2,
            "importance/effective_sample_share": 30.25 / 38.75,
        },
        rel=1e-6,
    )


def test_sequence_level() -> None:
    weight_R, stats = weights("sequence", 1.25)
    torch.testing.assert_close(weight_R, torch.tensor([1.25, 1.25, 0.75, 0.75, 0.75]))
    assert weight_R.dtype == torch.float32 and not weight_R.requires_grad
    # Two rows (the empty one has no weight): (2 + 0.75) / 2, one of two cut, 2^2 / (2 x (1.5625 + 0.5625)).
    assert stats.metrics(TRUNCATES) == pytest.approx(
        {
            "importance/mean": 1.375,
            "importance/max": 2.0,
            "importance/truncated_share": 0.5,
            "importance/effective_sample_share": 4.0 / 4.25,
        },
        rel=1e-6,
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_no_mismatch_is_a_weight_of_one(level: str) -> None:
    found = importance_weights(ROLLOUT_R, ROLLOUT_R.clone(), LENGTHS, level=level, bounds=Bounds(1.0))
    weight_R, stats = with_stats(found)
    assert torch.equal(weight_R, torch.ones(5))
    assert list(stats.metrics(TRUNCATES).values()) == [1.0, 1.0, 0.0, 1.0]  # a weight at the threshold is not cut


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_statistics_of_parts_are_those_of_the_whole(level: str) -> None:
    whole = weights(level, 1.25)[1]
    cut = [(slice(0, 2), [2]), (slice(2, 2), [0]), (slice(2, 5), [3])]
    parts = [
        with_stats(
            importance_weights((ROLLOUT_R + RATIO_R.log())[p], ROLLOUT_R[p], n, level=level, bounds=Bounds(1.25))
        )[1]
        for p, n in cut
    ]
    assert {name: sum(getattr(part, name) for part in parts) for name in SUMS} == {n: getattr(whole, n) for n in SUMS}
    assert max(part.largest for part in parts) == whole.largest
    assert parts[1] == ImportanceStats() and parts[1].metrics(TRUNCATES) == {}  # a micro-batch without a token


def test_an_extreme_ratio_stays_finite() -> None:
    logprob_R, rollout_R = torch.tensor([0.0, -300.0]), torch.tensor([-300.0, 0.0])
    for lengths in ([1, 1], [2]):
        for level in ("token", "sequence"):
            weight_R, stats = with_stats(
                importance_weights(logprob_R, rollout_R, lengths, level=level, bounds=Bounds(2.0))
            )
            assert weight_R.isfinite().all() and weight_R.max() <= 2.0
            assert stats.largest <= 4.86e8  # exp(20)


@pytest.mark.parametrize(
    ("level", "bounds", "expected", "above", "below", "effective"),
    [
        # Masked importance sampling: 4 is above 2. Left: 0.5 + 1.5 + 1 + 0.5 = 3.5, squares 3.75.
        ("token", (2.0, 0.0), [0.5, 0.0, 1.5, 1.0, 0.5], 0.2, 0.0, 3.5**2 / (5 * 3.75)),
        # IcePop: 0.5 twice is below 0.8 too. Left: 1.5 + 1 = 2.5, squares 3.25.
        ("token", (2.0, 0.8), [0.0, 0.0, 1.5, 1.0, 0.0], 0.2, 0.4, 2.5**2 / (5 * 3.25)),
        # A weight at a bound is kept.
        ("token", (4.0, 0.5), [0.5, 4.0, 1.5, 1.0, 0.5], 0.0, 0.0, 7.5**2 / (5 * 19.75)),
        # Rows of 2 and 0.75: the first above 1.25, the second in between.
        ("sequence", (1.25, 0.5), [0.0, 0.0, 0.75, 0.75, 0.75], 0.5, 0.0, 0.5),
        ("sequence", (1.25, 0.8), [0.0] * 5, 0.5, 0.5, 0.0),  # nothing is left
    ],
)
def test_masking(
    level: str, bounds: tuple[float, float], expected: list[float], above: float, below: float, effective: float
) -> None:
    weight_R, stats = weights(level, *bounds)
    torch.testing.assert_close(weight_R, torch.tensor(expected))
    assert weight_R.dtype == torch.float32 and not weight_R.requires_grad
    found = stats.metrics(Bounds(*bounds))
    assert found == pytest.approx(
        {
            "importance/mean": 1.5 if level == "token" else 1.375,  # before the mask
            "importance/max": 4.0 if level == "token" else 2.0,
            "importance/masked_above_share": above,
            "importance/masked_below_share": below,
            "importance/effective_sample_share": effective,
        },
        rel=1e-6,
    )


def test_bounds_are_read_as_they_are_written() -> None:
    assert read_bounds("2.0") == Bounds(2.0) == read_bounds("2")
    assert read_bounds("0.5_5") == Bounds(5.0, 0.5)
    assert read_bounds("0_2.0") == Bounds(2.0, 0.0)
    for text in ("", "x", "-1", "0", "nan", "inf", "2_1", "0_0", "_2", "2_", "1_2_3", "-1_2"):
        with pytest.raises(ValueError):
            read_bounds(text)
    # Of trainer over engine; verl's k1 is of engine over trainer.
    assert rejection_bounds("geometric", "0.5_4") == Bounds(4.0, 0.5)
    assert rejection_bounds("seq_mean_k1", "0.5_4") == Bounds(2.0, 0.25)
    assert rejection_bounds("geometric", "4") == rejection_bounds("seq_mean_k1", "4") == Bounds(4.0, 0.25)
    for text in ("0_2", "0.5"):
        with pytest.raises(ValueError, match=f"{text} leaves no ratio between"):
            rejection_bounds("geometric", text)


def test_refusals() -> None:
    with pytest.raises(AssertionError, match="row"):
        weights("row", 2.0)
    for threshold in (0.0, float("nan")):
        with pytest.raises(AssertionError, match=str(threshold)):
            weights("token", threshold)
    with pytest.raises(AssertionError, match="lower=3.0"):
        weights("token", 2.0, 3.0)
    with pytest.raises(ValueError, match="5 log-probabilities of the trainer, 5 of the engine, and rows of 4 tokens"):
        weights("token", 2.0, lengths=[4])
