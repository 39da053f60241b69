"""The objective of an update: the loss of every scored token, and the metrics that come with it. Pure.

    loss of a token = weight x (policy loss x importance weight - entropy_coeff x entropy + kl_coef x KL)

and 0 in an answer that is rejected (algorithm/rejection.py).

An `Objective` is called on each micro-batch; its sums and maxima are added up over micro-batches and ranks, and
`metrics` makes the numbers of metrics.jsonl of them. So a new metric is a sum in `__call__` and a line in `metrics`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from remax_megatron.algorithm.bounds import Bounds
from remax_megatron.algorithm.importance import SUMS as IMPORTANCE_SUMS
from remax_megatron.algorithm.importance import ImportanceStats, for_tokens, importance_weights
from remax_megatron.algorithm.kl import token_kl
from remax_megatron.algorithm.losses import Clip, clipped_policy_loss, reinforce_loss
from remax_megatron.algorithm.rejection import SUMS as REJECTION_SUMS
from remax_megatron.algorithm.rejection import kept_rows, rejection_metrics

MISMATCH = "rollout/logprob_diff_mean"  # the metric that guards look at, in nats


class ScoredTokens(Protocol):
    """What the objective reads of a micro-batch, see batching.packed.PackedBatch; [R] float32 on one device."""

    advantage_R: Tensor
    weight_R: Tensor
    rollout_logprob_R: Tensor
    old_logprob_R: Tensor | None
    ref_logprob_R: Tensor | None
    response_lengths: list[int]


@dataclass(frozen=True)
class Terms:
    """The objective on one micro-batch: `total`, a scalar with its gradient; where the loss of a token is finite, [R]
    bool; and float64 scalars to be added up (`sums`) or compared (`maxima`) over micro-batches and ranks."""

    total: Tensor
    finite_R: Tensor
    sums: dict[str, Tensor]
    maxima: dict[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """The settings of the loss.

    policy_loss           one of POLICY_LOSSES
    clip                  the clip range of ppo_clip
    entropy_coeff         weight of the entropy bonus, 0: none
    kl_kind               the KL in the loss (algorithm.kl), None: none; "full": the caller brings the KL of each token
    kl_coef               weight of that KL
    importance_level      weights against the engine's log-probabilities, "token" or "sequence", None: none
    importance_bounds     where those weights are cut or masked
    rejection_bounds      answers whose geometric mean of ratios is outside are rejected, None: none
    """

    policy_loss: str = "ppo_clip"
    clip: Clip = field(default_factory=Clip)
    entropy_coeff: float = 0.0
    kl_kind: str | None = None
    kl_coef: float = 0.0
    importance_level: str | None = None
    importance_bounds: Bounds = Bounds(2.0)
    rejection_bounds: Bounds | None = None

    def __call__(
        self, batch: ScoredTokens, logprob_R: Tensor, entropy_R: Tensor, full_kl_R: Tensor | None = None
    ) -> Terms:
        """The terms of a micro-batch from the policy's log-probabilities and entropies (nats, [R] float32).

        Nothing is read back from a GPU. `full_kl_R` is needed where `kl_kind` is "full".
        """
        tokens = clipped_policy_loss(logprob_R, batch.old_logprob_R, batch.advantage_R, self.clip)
        clips = self.policy_loss == "ppo_clip"
        loss_R = tokens.loss_R if clips else reinforce_loss(logprob_R, batch.advantage_R)
        weights: dict[str, Tensor] = {}
        largest: dict[str, Tensor] = {}
        if self.importance_level is not None:
            weight_R, sums, largest["importance"] = self._importance(batch, logprob_R)
            weights |= _named("importance", IMPORTANCE_SUMS, sums)
            loss_R = loss_R * weight_R
        if self.entropy_coeff:
            loss_R = loss_R - self.entropy_coeff * entropy_R
        kl_R = self._kl(batch, logprob_R, full_kl_R)
        if kl_R is not None:
            loss_R = loss_R + self.kl_coef * kl_R
        if self.rejection_bounds is not None:
            before_R, engine_R, lengths = _before(batch, logprob_R), batch.rollout_logprob_R, batch.response_lengths
            kept, sums = kept_rows(before_R, engine_R, lengths, self.rejection_bounds)
            weights |= _named("rejection", REJECTION_SUMS, sums)
            loss_R = loss_R * for_tokens(kept, lengths)
        loss_R = loss_R * batch.weight_R
        total = loss_R.sum()
        mismatch_R = logprob_R.detach() - batch.rollout_logprob_R
        of_tokens = {
            "loss": total,
            "entropy": entropy_R.sum(),
            "num_clipped": clips * tokens.clipped_R.sum(),
            "num_dual_clipped": clips * tokens.dual_clipped_R.sum(),
            "old_minus_new": tokens.old_minus_new_R.sum(),
            "kl": total.new_zeros(()) if kl_R is None else kl_R.sum(),
            "mismatch_abs": mismatch_R.abs().sum(),
            "mismatch_rollout_minus_policy": -mismatch_R.sum(),
        }
        largest["mismatch_abs"] = mismatch_R.abs().max() if mismatch_R.numel() else total.new_zeros(())
        return Terms(
            total,
            loss_R.detach().isfinite(),
            {name: value.detach().double() for name, value in (of_tokens | weights).items()},
            {name: value.detach().double() for name, value in largest.items()},
        )

    def metrics(self, sums: Mapping[str, float], maxima: Mapping[str, float], num_tokens: int) -> dict[str, float]:
        """The metrics of an update with `num_tokens` response tokens, from the sums and maxima over all of them.

        Those of "actor/" are means over the updates of a batch; the others compare the policy with the engine that
        wrote the answers, and are of a batch's first update.
        """
        mean = {name: value / num_tokens for name, value in sums.items()}
        metrics = {
            "actor/loss": sums["loss"],
            "actor/entropy": mean["entropy"],
            "actor/clip_share": mean["num_clipped"],
            "actor/dual_clip_share": mean["num_dual_clipped"],
            "actor/approx_kl": mean["old_minus_new"],
            "actor/kl": mean["kl"],
            MISMATCH: mean["mismatch_abs"],
            "rollout/logprob_diff_signed_mean": mean["mismatch_rollout_minus_policy"],
            "rollout/logprob_diff_max": maxima["mismatch_abs"],
        }
        if self.importance_level is not None:
            weights = {name: sums[f"importance_{name}"] for name in IMPORTANCE_SUMS}
            metrics |= ImportanceStats(**weights, largest=maxima["importance"]).metrics(self.importance_bounds)
        if self.rejection_bounds is not None:
            metrics |= rejection_metrics({name: sums[f"rejection_{name}"] for name in REJECTION_SUMS})
        return metrics

    @cached_property
    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The names of all sums and of all maxima, in order; for ranks that score nothing themselves."""
        nothing_R = torch.zeros(0)
        terms = self(_Nothing(), nothing_R, nothing_R)
        return tuple(terms.sums), tuple(terms.maxima)

    def _importance(self, batch: ScoredTokens, logprob_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert self.importance_level is not None
        return importance_weights(
            _before(batch, logprob_R),
            batch.rollout_logprob_R,
            batch.response_lengths,
            level=self.importance_level,
            bounds=self.importance_bounds,
        )

    def _kl(self, batch: ScoredTokens, logprob_R: Tensor, full_kl_R: Tensor | None) -> Tensor | None:
        if self.kl_kind is None or not logprob_R.numel():
            return None
        if self.kl_kind == "full":
            assert full_kl_R is not None, "the full KL comes from the caller"
            return full_kl_R
        assert batch.ref_logprob_R is not None, "a KL loss needs the reference's log-probabilities"
        return token_kl(logprob_R, batch.ref_logprob_R, self.kl_kind)


def _before(batch: ScoredTokens, logprob_R: Tensor) -> Tensor:
    """The policy's log-probabilities before the update, [R]."""
    return logprob_R.detach() if batch.old_logprob_R is None else batch.old_logprob_R


def _named(prefix: str, names: tuple[str, ...], sums: Tensor) -> dict[str, Tensor]:
    return {f"{prefix}_{name}": value for name, value in zip(names, sums.unbind(), strict=True)}


@dataclass
class _Nothing:
    """A micro-batch without a scored token."""

    advantage_R: Tensor = field(default_factory=lambda: torch.zeros(0))
    weight_R: Tensor = field(default_factory=lambda: torch.zeros(0))
    rollout_logprob_R: Tensor = field(default_factory=lambda: torch.zeros(0))
    old_logprob_R: Tensor | None = None
    ref_logprob_R: Tensor | None = None
    response_lengths: list[int] = field(default_factory=list)
