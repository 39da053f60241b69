"""Importance weights: the trainer's probabilities over the engine's, which sampled, cut or masked at a threshold.

Engine and trainer give the same weights slightly different log-probabilities, so samples of the engine are off-policy
for the trainer. With w the ratio of probabilities, the token losses are multiplied by f(w), where

    token       w_t = exp(logprob_t - rollout_logprob_t)              per token: low variance, some bias
    sequence    w   = exp(sum_t (logprob_t - rollout_logprob_t))      per row: no bias but f's, high variance

    truncated   f(w) = min(w, U)                                      truncated importance sampling
    masked      f(w) = w where L <= w <= U, else 0                    IcePop; with L = 0 masked importance sampling

(Truncation: F. Yao et al. 2025, https://fengyao.notion.site/off-policy-rl; the cut is that of V-trace, arXiv
1802.01561. IcePop: arXiv 2510.18855, whose bounds are 0.5 and 5. Both as in verl's `rollout_is` and
`rollout_is_threshold`, trainer/ppo/rollout_corr_helper.py.) Logarithms are held to +-20 before exp, as in verl. The
weights carry no gradient: they change the measure, not the objective.

A masked token stays in the denominator of the loss: it is a weight of 0, so that every variant estimates the same sum
over the same count, and masking can only take away what truncation keeps. Terms of the entropy and the KL stay.

`logprob_R` is that of the policy before the update (old log-probabilities, or the current ones detached where only one
update is made). Where the pass for the old ones is bypassed and PPO's ratio is taken against the engine's
log-probabilities, that ratio is already the importance weight: use none of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from remax_megatron.algorithm.bounds import Bounds
from remax_megatron.algorithm.names import IMPORTANCE_LEVELS

SUMS = ("count", "total", "total_cut", "total_cut_squared", "num_above", "num_below")


@dataclass(frozen=True)
class ImportanceStats:
    """Sums over weights (tokens, or rows with a token at level "sequence"), so that those of micro-batches and ranks
    can be put together exactly. "Cut" weights are those after the threshold; `num_above` and `num_below` were outside
    of it."""

    count: float = 0.0
    total: float = 0.0
    total_cut: float = 0.0
    total_cut_squared: float = 0.0
    num_above: float = 0.0
    num_below: float = 0.0
    largest: float = 0.0

    def metrics(self, bounds: Bounds) -> dict[str, float]:
        """Mean and maximum before the cut (the mean is 1 in expectation), the share that was truncated or, above and
        below, masked, and the effective sample size of the cut weights, (sum w)^2 / sum w^2, as a share of their
        number (0 where all are masked). Empty without weights."""
        if self.count == 0:
            return {}
        above = "truncated_share" if bounds.lower is None else "masked_above_share"
        shares = {f"importance/{above}": self.num_above / self.count}
        if bounds.lower is not None:
            shares["importance/masked_below_share"] = self.num_below / self.count
        effective = self.total_cut**2 / (self.count * self.total_cut_squared) if self.total_cut_squared else 0.0
        return {
            "importance/mean": self.total / self.count,
            "importance/max": self.largest,
            **shares,
            "importance/effective_sample_share": effective,
        }


def importance_weights(
    logprob_R: Tensor, rollout_logprob_R: Tensor, lengths: Sequence[int], *, level: str, bounds: Bounds
) -> tuple[Tensor, Tensor, Tensor]:
    """(weight of each token [R] float32 without gradient, SUMS over the weights [6] float64, the largest one float64).

    Inputs [R] in nats under the sampling temperature; `lengths` [rows] cuts R into whole rows, in order. A row's
    tokens all carry its one weight at level "sequence". `level` is one of IMPORTANCE_LEVELS; weights above
    `bounds.upper` are cut to it, or, where there is a `bounds.lower`, those outside both are 0. Nothing is read back
    from a GPU. ValueError when the sizes do not fit.
    """
    assert level in IMPORTANCE_LEVELS, level
    log_ratio_R = log_ratios(logprob_R, rollout_logprob_R, lengths)
    if level == "token":
        weight = log_ratio_R.clamp(-20.0, 20.0).exp()
        cut = weight_R = _cut(weight, bounds)
    else:
        sums = [part.sum() for part in rows_of(log_ratio_R, lengths)]
        weight = torch.stack(sums).clamp(-20.0, 20.0).exp() if sums else log_ratio_R
        cut = _cut(weight, bounds)
        weight_R = for_tokens(cut, lengths)
    return weight_R, *_sums(weight, cut, bounds)


def log_ratios(logprob_R: Tensor, rollout_logprob_R: Tensor, lengths: Sequence[int]) -> Tensor:
    """Trainer minus engine, [R] float32 without gradient. ValueError when the sizes do not fit each other or
    `lengths` [rows]."""
    if logprob_R.shape != rollout_logprob_R.shape or sum(lengths) != logprob_R.numel():
        raise ValueError(
            f"{logprob_R.numel()} log-probabilities of the trainer, {rollout_logprob_R.numel()} of the engine, and "
            f"rows of {sum(lengths)} tokens do not fit"
        )
    return logprob_R.detach().float() - rollout_logprob_R.detach().float()


def rows_of(value_R: Tensor, lengths: Sequence[int]) -> Sequence[Tensor]:
    """The parts of `value_R` that belong to each row with a token, in order."""
    filled = [length for length in lengths if length]
    return value_R.split(filled) if filled else ()


def for_tokens(value: Tensor, lengths: Sequence[int]) -> Tensor:
    """[R] from one value for each row with a token."""
    filled = [length for length in lengths if length]
    return torch.cat([one.expand(length) for one, length in zip(value, filled, strict=True)]) if filled else value


def _cut(weight: Tensor, bounds: Bounds) -> Tensor:
    if bounds.lower is None:
        return weight.clamp(max=bounds.upper)
    return weight * ((weight >= bounds.lower) & (weight <= bounds.upper))


def _sums(weight: Tensor, cut: Tensor, bounds: Bounds) -> tuple[Tensor, Tensor]:
    if weight.numel() == 0:
        return weight.new_zeros(len(SUMS), dtype=torch.float64), weight.new_zeros((), dtype=torch.float64)
    above, below = (weight > bounds.upper).sum(), (weight < (bounds.lower or 0.0)).sum()
    weight, cut = weight.double(), cut.double()
    count = torch.full_like(weight[0], weight.numel())
    sums = [count, weight.sum(), cut.sum(), cut.square().sum(), above.double(), below.double()]
    return torch.stack(sums), weight.max()
