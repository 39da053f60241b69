"""Token weights of the three aggregations by hand tables, and that they do what the names say."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remax_megatron.algorithm.aggregation import MODES, token_weights

# Three rows of 2, 1 and 5 tokens, token losses as given: N = 8, S = 3.
LOSSES = [[1.0, 3.0], [6.0], [1.0, 1.0, 1.0, 1.0, 6.0]]


@pytest.mark.parametrize(
    ("mode", "weights", "loss"),
    [
        ("token-mean", [1 / 8, 1 / 8, 1 / 8], 20 / 8),  # 4 + 6 + 10 over 8 tokens
        ("seq-mean-token-sum", [1 / 3, 1 / 3, 1 / 3], 20 / 3),  # (4 + 6 + 10) / 3
        ("seq-mean-token-mean", [1 / 6, 1 / 3, 1 / 15], 10 / 3),  # (2 + 6 + 2) / 3
    ],
)
def test_table(mode: str, weights: list[float], loss: float) -> None:
    found = token_weights([len(row) for row in LOSSES], mode)
    assert found == pytest.approx(weights)
    assert sum(w * sum(row) for w, row in zip(found, LOSSES, strict=True)) == pytest.approx(loss)
    # A row without tokens has no weight and changes no other's.
    assert token_weights([2, 0, 1, 5], mode) == [found[0], 0.0, found[1], found[2]]


def test_refusals() -> None:
    for mode in MODES:
        for lengths in ([], [0, 0]):
            with pytest.raises(ValueError, match="the update has no response token to learn from"):
                token_weights(lengths, mode)
    with pytest.raises(AssertionError, match="mean"):
        token_weights([1], "mean")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 4096), min_size=1, max_size=50).filter(any))
def test_weights_sum_to_a_mean(lengths: list[int]) -> None:
    def total(mode: str) -> float:
        return sum(n * w for n, w in zip(lengths, token_weights(lengths, mode), strict=True))

    assert total("token-mean") == pytest.approx(1.0)
    assert total("seq-mean-token-mean") == pytest.approx(1.0)
    assert total("seq-mean-token-sum") == pytest.approx(sum(lengths) / sum(n > 0 for n in lengths))
