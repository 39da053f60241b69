"""Truncated importance weights and their metrics by a hand table."""

from __future__ import annotations

import pytest
import torch

from remax_megatron.algorithm.importance import SUMS, ImportanceStats, importance_weights

LENGTHS = [2, 0, 3]
# Ratios of the tokens: 0.5 and 4, then 1.5, 1 and 0.5; of the rows: 2 and 0.75.
RATIO_R = torch.tensor([0.5, 4.0, 1.5, 1.0, 0.5])
ROLLOUT_R = torch.tensor([-0.5, -3.0, -1.0, -0.2, -0.1])


def weights(level: str, threshold: float, lengths: list[int] = LENGTHS) -> tuple[torch.Tensor, ImportanceStats]:
    logprob_R = (ROLLOUT_R + RATIO_R.log()).requires_grad_()
    return with_stats(importance_weights(logprob_R, ROLLOUT_R, lengths, level=level, threshold=threshold))


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
    assert stats.metrics() == pytest.approx(
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
    assert stats.metrics() == pytest.approx(
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
    found = importance_weights(ROLLOUT_R, ROLLOUT_R.clone(), LENGTHS, level=level, threshold=1.0)
    weight_R, stats = with_stats(found)
    assert torch.equal(weight_R, torch.ones(5))
    assert list(stats.metrics().values()) == [1.0, 1.0, 0.0, 1.0]  # a weight at the threshold is not cut


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_statistics_of_parts_are_those_of_the_whole(level: str) -> None:
    whole = weights(level, 1.25)[1]
    cut = [(slice(0, 2), [2]), (slice(2, 2), [0]), (slice(2, 5), [3])]
    parts = [
        with_stats(importance_weights((ROLLOUT_R + RATIO_R.log())[p], ROLLOUT_R[p], n, level=level, threshold=1.25))[1]
        for p, n in cut
    ]
    assert {name: sum(getattr(part, name) for part in parts) for name in SUMS} == {n: getattr(whole, n) for n in SUMS}
    assert max(part.largest for part in parts) == whole.largest
    assert parts[1] == ImportanceStats() and parts[1].metrics() == {}  # a micro-batch without a token


def test_an_extreme_ratio_stays_finite() -> None:
    logprob_R, rollout_R = torch.tensor([0.0, -300.0]), torch.tensor([-300.0, 0.0])
    for lengths in ([1, 1], [2]):
        for level in ("token", "sequence"):
            weight_R, stats = with_stats(importance_weights(logprob_R, rollout_R, lengths, level=level, threshold=2.0))
            assert weight_R.isfinite().all() and weight_R.max() <= 2.0
            assert stats.largest <= 4.86e8  # exp(20)


def test_refusals() -> None:
    with pytest.raises(AssertionError, match="row"):
        weights("row", 2.0)
    for threshold in (0.0, float("nan")):
        with pytest.raises(AssertionError, match=str(threshold)):
            weights("token", threshold)
    with pytest.raises(ValueError, match="5 log-probabilities of the trainer, 5 of the engine, and rows of 4 tokens"):
        weights("token", 2.0, [4])
