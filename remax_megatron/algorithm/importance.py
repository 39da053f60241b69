"""Truncated importance weights: the trainer's probabilities over the engine's, which sampled, cut at a threshold.

Engine and trainer give the same weights slightly different log-probabilities, so samples of the engine are off-policy
for the trainer. With w the ratio of probabilities and C the threshold, the token losses are multiplied by

    token       w_t = min(exp(logprob_t - rollout_logprob_t), C)              per token: low variance, some bias
    sequence    w   = min(exp(sum_t (logprob_t - rollout_logprob_t)), C)      per row: no bias but C's, high variance

(F. Yao et al. 2025, https://fengyao.notion.site/off-policy-rl; verl's `rollout_is` and `rollout_is_threshold` in
trainer/ppo/rollout_corr_helper.py, whose default C is 2. The cut is that of V-trace, arXiv 1802.01561.) Logarithms are
held to +-20 before exp, as in verl. The weights carry no gradient: they change the measure, not the objective.

`logprob_R` is that of the policy before the update (old log-probabilities, or the current ones detached where only one
update is made). Where the pass for the old ones is bypassed and PPO's ratio is taken against the engine's
log-probabilities, that ratio is already the importance weight: use none of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from remax_megatron.algorithm.names import IMPORTANCE_LEVELS

SUMS = ("count", "total", "total_cut", "total_cut_squared", "num_truncated")


@dataclass(frozen=True)
class ImportanceStats:
    """Sums over weights (tokens, or rows with a token at level "sequence"), so that those of micro-batches and ranks
    can be put together exactly. "Cut" weights are those after the threshold."""

    count: float = 0.0
    total: float = 0.0
    total_cut: float = 0.0
    total_cut_squared: float = 0.0
    num_truncated: float = 0.0
    largest: float = 0.0

    def metrics(self) -> dict[str, float]:
        """Mean and maximum before the cut (the mean is 1 in expectation), the share that was cut, and the effective
        sample size of the cut weights, (sum w)^2 / sum w^2, as a share of their number. Empty without weights."""
        if self.count == 0:
            return {}
        return {
            "importance/mean": self.total / self.count,
            "importance/max": self.largest,
            "importance/truncated_share": self.num_truncated / self.count,
            "importance/effective_sample_share": self.total_cut**2 / (self.count * self.total_cut_squared),
        }


def importance_weights(
    logprob_R: Tensor, rollout_logprob_R: Tensor, lengths: Sequence[int], *, level: str, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(weight of each token [R] float32 without gradient, SUMS over the weights [5] float64, the largest one float64).

    Inputs [R] in nats under the sampling temperature; `lengths` [rows] cuts R into whole rows, in order. A row's
    tokens all carry its one weight at level "sequence". `level` is one of IMPORTANCE_LEVELS, `threshold` above 0.
    Nothing is read back from a GPU. ValueError when the sizes do not fit.
    """
    assert level in IMPORTANCE_LEVELS, level
    assert threshold > 0.0, threshold
    if logprob_R.shape != rollout_logprob_R.shape or sum(lengths) != logprob_R.numel():
        raise ValueError(
            f"{logprob_R.numel()} log-probabilities of the trainer, {rollout_logprob_R.numel()} of the engine, and "
            f"rows of {sum(lengths)} tokens do not fit"
        )
    log_ratio_R = logprob_R.detach().float() - rollout_logprob_R.detach().float()
    if level == "token":
        weight = log_ratio_R.clamp(-20.0, 20.0).exp()
        cut = weight_R = weight.clamp(max=threshold)
    else:
        filled = [length for length in lengths if length]
        sums = [part.sum() for part in log_ratio_R.split(filled)] if filled else []
        weight = torch.stack(sums).clamp(-20.0, 20.0).exp() if sums else log_ratio_R
        cut = weight.clamp(max=threshold)
        weight_R = torch.cat([one.expand(length) for one, length in zip(cut, filled, strict=True)]) if sums else cut
    return weight_R, *_sums(weight, cut, threshold)


def _sums(weight: Tensor, cut: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    if weight.numel() == 0:
        return weight.new_zeros(len(SUMS), dtype=torch.float64), weight.new_zeros((), dtype=torch.float64)
    weight, cut = weight.double(), cut.double()
    count = torch.full_like(weight[0], weight.numel())
    truncated = (weight > threshold).sum().double()
    return torch.stack([count, weight.sum(), cut.sum(), cut.square().sum(), truncated]), weight.max()
