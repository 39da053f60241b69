"""The frequencies of the rotary embedding (arXiv 2104.09864), also where YaRN (arXiv 2309.00071) stretches them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from remax_megatron.model_facts import ModelFacts, Yarn


def inverse_frequencies(facts: ModelFacts) -> Tensor:
    """[head_dim / 2] float32, radians per position: as transformers 5 computes them (modeling_rope_utils.py)."""
    dim = facts.head_dim
    wavelengths = facts.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    plain = 1.0 / wavelengths
    if facts.yarn is None:
        return plain
    # Where many turns fit the original length the frequency stays, where few do it is divided by the factor.
    low, high = _ramp(facts.yarn, dim, facts.rope_theta)
    stretched = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - stretched
    return (1.0 / (facts.yarn.factor * wavelengths)) * (1 - kept) + plain * kept


def softmax_scale(facts: ModelFacts) -> float | None:
    """What the scores are multiplied by, None: 1 / sqrt(head_dim). YaRN multiplies queries and keys by its attention
    factor; Transformer Engine's rotation cannot, and so the scores are multiplied by its square."""
    return None if facts.yarn is None else facts.yarn.attention_factor**2 / math.sqrt(facts.head_dim)


def _ramp(yarn: Yarn, dim: int, theta: float) -> tuple[float, float]:
    """Between which pairs of dimensions the stretching rises from none to all of it."""

    def pair_of(turns: float) -> float:
        """The pair that turns `turns` times over the original length."""
        length = yarn.original_max_position_embeddings
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(yarn.beta_fast), pair_of(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return low, high + 0.001 if low == high else high
