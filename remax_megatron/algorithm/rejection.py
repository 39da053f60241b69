"""Rejection of whole answers on which engine and trainer agree too little: by the geometric mean of the token ratios.

    g = exp(mean_t (logprob_t - rollout_logprob_t)),   an answer is kept where L <= g <= U

Unlike the product of the ratios, g does not drift away with the length of an answer (verl's `rollout_rs` of
`seq_mean_k1`, formerly `geometric`, trainer/ppo/rollout_corr_helper.py; https://richardli.xyz/rl-collapse). It is no
importance weight: a kept answer keeps its full weight, or that of algorithm/importance.py. All terms of a rejected
answer are 0, the entropy and the KL among them. An answer without tokens is never rejected.

What the sum of the losses is divided by is one of REJECTION_DENOMINATORS:

    all     all answers of the update, rejected ones included: each of them has the loss 0. The decision is made in the
            update's own pass; rows that are left out because their advantage is 0 would have added 0 either way.
    kept    the answers that are kept, as in verl, whose rejection takes tokens out of the response mask: the gradient
            is larger by all / kept. Every answer has to be scored before the weights of the tokens are known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from remax_megatron.algorithm.bounds import Bounds
from remax_megatron.algorithm.importance import log_ratios, rows_of

SUMS = ("num_rows", "num_rejected", "num_tokens", "num_rejected_tokens", "total")


def kept_rows(
    logprob_R: Tensor, rollout_logprob_R: Tensor, lengths: Sequence[int], bounds: Bounds
) -> tuple[Tensor, Tensor]:
    """(whether each row with a token is kept [rows] bool, SUMS over these rows [5] float64).

    Inputs [R] in nats under the sampling temperature; `lengths` [rows] cuts R into whole rows, in order. `bounds` has
    both bounds. Nothing is read back from a GPU. ValueError when the sizes do not fit.
    """
    assert bounds.lower is not None, bounds
    means = [part.mean() for part in rows_of(log_ratios(logprob_R, rollout_logprob_R, lengths), lengths)]
    if not means:
        return logprob_R.new_zeros(0, dtype=torch.bool), logprob_R.new_zeros(len(SUMS), dtype=torch.float64)
    ratio = torch.stack(means).clamp(-20.0, 20.0).exp()
    kept = (ratio >= bounds.lower) & (ratio <= bounds.upper)
    counts = [length for length in lengths if length]
    filled = torch.stack([torch.full_like(mean, n) for mean, n in zip(means, counts, strict=True)]).double()
    num_rows = torch.full_like(filled[0], len(means))
    sums = [num_rows, (~kept).sum().double(), filled.sum(), (filled * ~kept).sum(), ratio.double().sum()]
    return kept, torch.stack(sums)


def rejection_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Shares of the answers and of the tokens that were rejected, and the mean of g; `sums` by SUMS. Empty without
    answers."""
    if not sums["num_rows"]:
        return {}
    return {
        "rejection/answer_share": sums["num_rejected"] / sums["num_rows"],
        "rejection/token_share": sums["num_rejected_tokens"] / sums["num_tokens"],
        "rejection/ratio_mean": sums["total"] / sums["num_rows"],
    }
