"""Policy losses as sums over tokens, and the one place that divides them.

A loss here is a sum over the response tokens of a micro-batch. `LossScale` divides it once, by a denominator counted
over the whole update (all ranks, all micro-batches) before the first of them runs; so neither packing nor any layout
can change the gradient. Megatron is told not to scale anything (`calculate_per_token_loss`, gradients summed).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from remax_megatron.types import Row


@dataclass(frozen=True)
class Clip:
    """PPO's clip range [1 - low, 1 + high] (arXiv 1707.06347) and the dual clip c > 1 (arXiv 1912.09729)."""

    low: float = 0.2
    high: float = 0.2
    dual: float = 3.0


@dataclass(frozen=True)
class PolicyLoss:
    """Sums over the R tokens of a micro-batch; `loss` carries the gradient."""

    loss: Tensor
    num_clipped: Tensor
    num_dual_clipped: Tensor
    sum_old_minus_new: Tensor


def clipped_policy_loss(logprob_R: Tensor, old_logprob_R: Tensor | None, advantage_R: Tensor, clip: Clip) -> PolicyLoss:
    """PPO's clipped objective, negated, with dual clip; all inputs [R] float32.

    With `old_logprob_R` None the ratio is exactly 1 and its gradient is that of the log-probability: REINFORCE.
    Per token, with ratio w and advantage A: -min(w A, clip(w) A), and for A < 0 at most -c A.
    """
    old = logprob_R.detach() if old_logprob_R is None else old_logprob_R
    log_ratio = logprob_R - old
    ratio = log_ratio.clamp(-20.0, 20.0).exp()
    plain = -advantage_R * ratio
    clipped = -advantage_R * ratio.clamp(1.0 - clip.low, 1.0 + clip.high)
    pessimistic = torch.maximum(plain, clipped)
    ceiling = -advantage_R * clip.dual
    dual = torch.minimum(pessimistic, ceiling)
    loss = torch.where(advantage_R < 0, dual, pessimistic)
    return PolicyLoss(
        loss=loss.sum(),
        num_clipped=(clipped > plain).sum(),
        num_dual_clipped=((advantage_R < 0) & (pessimistic > ceiling)).sum(),
        sum_old_minus_new=-log_ratio.detach().sum(),
    )


@dataclass(frozen=True)
class LossScale:
    """Divides sums over tokens by the number of response tokens of the whole update ("token-mean")."""

    num_tokens: int

    @classmethod
    def of(cls, rows: Sequence[Row]) -> LossScale:
        """From all rows of the update, on every rank alike; ValueError when they hold no response token."""
        num_tokens = sum(len(row.response_ids) for row in rows)
        if num_tokens == 0:
            raise ValueError("the update has no response token to learn from")
        return cls(num_tokens)

    def __call__(self, total: Tensor) -> Tensor:
        return total / self.num_tokens
