"""How the losses of an update's tokens become one number: the weight of each token, from global counts alone.

One of MODES, with S rows that have response tokens, row i having l_i of them, N = sum l_i:

    token-mean            1 / N          every token alike; long answers count more (arXiv 2503.14476, DAPO)
    seq-mean-token-sum    1 / S          mean over answers of the sum over tokens: the policy gradient of the papers;
                                         Dr. GRPO up to a constant (arXiv 2503.20783)
    seq-mean-token-mean   1 / (S l_i)    every answer alike; a token of a long answer counts less (arXiv 2402.03300)

The loss is sum over tokens of weight x token loss. S and N are counted over all rows of the update, on all ranks and
in all micro-batches, those included that are left out of the passes because their advantage is 0; so neither packing,
nor layout, nor leaving rows out changes the gradient. (verl's `agg_loss`, core_algos.py, has the same three modes.)

A row without response tokens has no loss; it counts in neither N nor S, as in verl, and its weight is 0.
"""

from __future__ import annotations

from collections.abc import Sequence

from remax_megatron.types import Row

MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")


def token_weights(lengths: Sequence[int], mode: str) -> list[float]:
    """The weight of each token of row i, [rows], from the numbers of response tokens of all rows of the update.

    `mode` is one of MODES. ValueError when the update has no response token.
    """
    assert mode in MODES, mode
    num_tokens = sum(lengths)
    if num_tokens == 0:
        raise ValueError("the update has no response token to learn from")
    num_rows = sum(length > 0 for length in lengths)
    if mode == "token-mean":
        return [1.0 / num_tokens if length else 0.0 for length in lengths]
    if mode == "seq-mean-token-sum":
        return [1.0 / num_rows if length else 0.0 for length in lengths]
    return [1.0 / (num_rows * length) if length else 0.0 for length in lengths]


def weigh_rows(rows: Sequence[Row], mode: str) -> None:
    """Set the `weight` of all rows of an update; call it before any of them is left out."""
    for row, weight in zip(rows, token_weights([len(row.response_ids) for row in rows], mode), strict=True):
        row.weight = weight
