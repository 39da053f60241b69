"""Policy losses per token. What weighs and sums the tokens is algorithm/aggregation.py, and nothing else scales a loss.

Weights are counted over the whole update (all ranks, all micro-batches) before the first of them runs; so neither
packing nor any layout can change the gradient. Megatron is told not to scale anything (`calculate_per_token_loss`,
gradients summed).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Clip:
    """PPO's clip range [1 - low, 1 + high] (arXiv 1707.06347; high above low is clip-higher, arXiv 2503.14476) and the
    dual clip c > 1 (arXiv 1912.09729)."""

    low: float = 0.2
    high: float = 0.2
    dual: float = 3.0


@dataclass(frozen=True)
class TokenLoss:
    """All [R]: `loss_R` carries the gradient, the masks are bool, `old_minus_new_R` is in nats."""

    loss_R: Tensor
    clipped_R: Tensor
    dual_clipped_R: Tensor
    old_minus_new_R: Tensor


def clipped_policy_loss(logprob_R: Tensor, old_logprob_R: Tensor | None, advantage_R: Tensor, clip: Clip) -> TokenLoss:
    """PPO's clipped objective, negated, with dual clip; all inputs [R] float32.

    With `old_logprob_R` None the ratio is exactly 1 and its gradient is that of the log-probability: REINFORCE.
    Per token, with ratio w and advantage A: -min(w A, clip(w) A), and for A < 0 at most -c A. A token is "clipped"
    where the clip made its loss larger, "dual clipped" where the ceiling made it smaller.
    """
    old_R = logprob_R.detach() if old_logprob_R is None else old_logprob_R
    log_ratio_R = logprob_R - old_R
    ratio_R = log_ratio_R.clamp(-20.0, 20.0).exp()
    plain_R = -advantage_R * ratio_R
    clipped_R = -advantage_R * ratio_R.clamp(1.0 - clip.low, 1.0 + clip.high)
    pessimistic_R = torch.maximum(plain_R, clipped_R)
    ceiling_R = -advantage_R * clip.dual
    return TokenLoss(
        loss_R=torch.where(advantage_R < 0, torch.minimum(pessimistic_R, ceiling_R), pessimistic_R),
        clipped_R=clipped_R > plain_R,
        dual_clipped_R=(advantage_R < 0) & (pessimistic_R > ceiling_R),
        old_minus_new_R=-log_ratio_R.detach(),
    )


def reinforce_loss(logprob_R: Tensor, advantage_R: Tensor) -> Tensor:
    """-A log pi(a) per token, [R] float32: plain REINFORCE (Williams 1992), no ratio, nothing clipped.

    At ratio 1 its gradient is that of `clipped_policy_loss`; its value is not.
    """
    return -advantage_R * logprob_R
