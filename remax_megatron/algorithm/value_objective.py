"""The objective of PPO's critic (arXiv 1707.06347; as in verl's `compute_value_loss`, core_algos.py). Pure.

    loss of a token = weight x 1/2 max((V - R)^2, (V_clipped - R)^2),   V_clipped = V_old + clip(V - V_old, -c, c)

R is the return that the critic is taught, V_old its value before the updates of the batch: a value may move by c at
most in them, as far as that is towards the return. The weights are those of algorithm/aggregation.py, as the policy's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from remax_megatron.algorithm.objective import Terms

SUMS = ("loss", "value", "squared_error", "num_clipped")


class TaughtTokens(Protocol):
    """What the objective reads of a micro-batch, see batching.packed.PackedBatch; [R] float32 on one device."""

    value_R: Tensor | None
    return_R: Tensor | None
    weight_R: Tensor


@dataclass(frozen=True)
class ValueObjective:
    """The setting of the loss: how far a value may move in the updates of a batch."""

    cliprange: float = 0.5

    def __call__(self, batch: TaughtTokens, value_R: Tensor) -> Terms:
        """The terms of a micro-batch from the critic's values, [R] float32. Nothing is read back from a GPU."""
        if batch.value_R is None or batch.return_R is None:
            assert value_R.numel() == 0, "the critic learns from values and returns"
            old_R = return_R = value_R.detach()
        else:
            old_R, return_R = batch.value_R, batch.return_R
        clipped_R = old_R + (value_R - old_R).clamp(-self.cliprange, self.cliprange)
        error_R, clipped_error_R = (value_R - return_R).square(), (clipped_R - return_R).square()
        loss_R = 0.5 * error_R.maximum(clipped_error_R) * batch.weight_R
        total = loss_R.sum()
        sums = (total, value_R.sum(), error_R.sum(), (clipped_error_R > error_R).sum())
        return Terms(
            total,
            loss_R.detach().isfinite(),
            {name: value.detach().double() for name, value in zip(SUMS, sums, strict=True)},
            {},
        )

    @property
    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The names of all sums and of all maxima, in order."""
        return SUMS, ()

    def metrics(self, sums: Mapping[str, float], maxima: Mapping[str, float], num_tokens: int) -> dict[str, float]:
        """The metrics of an update with `num_tokens` response tokens, from the sums over all of them."""
        return {
            "critic/loss": sums["loss"],
            "critic/value_mean": sums["value"] / num_tokens,
            "critic/squared_error": sums["squared_error"] / num_tokens,
            "critic/clip_share": sums["num_clipped"] / num_tokens,
        }
