"""Floating-point operations of an update, counted from the shapes that were computed, and what devices can do at most.

A product of matrices [m, k] and [k, n] is 2 m k n operations; nothing else is counted: no norms, softmax, embedding
look-ups, padding. Two counts, as the field has them:

    model FLOPs      forward once, backward twice (gradients of inputs and of weights). Recomputation is left out, as in
                     Megatron-LM's throughput and PaLM's MFU (arXiv 2204.02311, appendix B): a setting that computes a
                     thing twice must not look faster for it. `perf/tflops` and `perf/mfu` are made of these.
    hardware FLOPs   what runs: recomputed layers once more, and the head's logits, which its backward pass always
                     makes again (algorithm/logprob.py). `perf/hardware_tflops`.

Pure: sizes and lengths in, numbers out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from remax_megatron.model_facts import ModelFacts
from remax_megatron.types import Recompute

# Dense bfloat16 TFLOP/s of one device, without sparsity, from NVIDIA's data sheets. The first entry whose words are all
# in the name that torch.cuda.get_device_name gives ("NVIDIA H100 80GB HBM3" is the SXM card) is the device's.
PEAK_BF16_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100 HBM3": 989.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "GH200": 990.0,
    "H800 PCIe": 756.0,
    "H800": 989.0,
    "H20": 148.0,
    "GB200": 2500.0,
    "B200": 2250.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A10": 125.0,
}


def peak_bf16_tflops(device_name: str) -> float | None:
    """The entry of PEAK_BF16_TFLOPS for a device, None for one that is not there, or is a part of a device (MIG)."""
    words = set(device_name.replace("-", " ").split())
    if "MIG" in words:
        return None
    return next((peak for name, peak in PEAK_BF16_TFLOPS.items() if set(name.split()) <= words), None)


class RowGroup(NamedTuple):
    """Rows as they are packed: answers of `response_tokens` behind one copy of a prompt; a row alone is one answer."""

    prompt_tokens: int
    response_tokens: Sequence[int]

    @property
    def tokens(self) -> int:
        """Count the tokens that are computed."""
        return self.prompt_tokens + sum(self.response_tokens)

    @property
    def squares(self) -> int:
        """Twice the pairs of a token and one before it that it attends to: l^2 for a row of l tokens."""
        return self.prompt_tokens**2 + sum(r * (r + 2 * self.prompt_tokens) for r in self.response_tokens)


@dataclass(frozen=True)
class ForwardFlops:
    """Operations of a forward pass: of one layer per token (`projections`: query, key, value, output; `mlp`) and per
    square of `RowGroup.squares` (`attention`), and of the `head` per scored position."""

    num_layers: int
    projections: int
    mlp: int
    attention: int
    head: int

    @classmethod
    def of(cls, facts: ModelFacts) -> ForwardFlops:
        """A matrix of n weights costs 2 n per token; the gated MLP has three. Causal attention multiplies l^2 / 2 pairs
        twice (scores, values), at 2 operations per pair and element of heads x head_dim."""
        query, key = facts.num_attention_heads * facts.head_dim, facts.num_key_value_heads * facts.head_dim
        return cls(
            num_layers=facts.num_layers,
            projections=2 * facts.hidden_size * (2 * query + 2 * key),
            mlp=2 * facts.hidden_size * 3 * facts.ffn_hidden_size,
            attention=2 * query,
            head=2 * facts.hidden_size * (1 if facts.value_head else facts.vocab_size),
        )

    def layers(self, groups: Sequence[RowGroup]) -> int:
        """Count the operations of all layers."""
        tokens, squares = sum(group.tokens for group in groups), sum(group.squares for group in groups)
        return self.num_layers * ((self.projections + self.mlp) * tokens + self.attention * squares)

    def logits(self, groups: Sequence[RowGroup]) -> int:
        """Of the head, which sees only positions whose next token is one of an answer."""
        return self.head * sum(sum(group.response_tokens) for group in groups)


@dataclass(frozen=True)
class UpdateFlops:
    """Counts updates of the model in `facts` on `num_devices` devices, in `num_chunks` consecutive parts of its layers
    (pipeline stages x virtual stages). `peak_tflops` is that of one device, None where it is not known."""

    facts: ModelFacts
    recompute: Recompute = Recompute()
    num_devices: int = 1
    num_chunks: int = 1
    peak_tflops: float | None = None

    def model(self, groups: Sequence[RowGroup]) -> int:
        """Of forward and backward, without recomputation."""
        forward = ForwardFlops.of(self.facts)
        return 3 * (forward.layers(groups) + forward.logits(groups))

    def hardware(self, groups: Sequence[RowGroup]) -> int:
        """Of all that runs: `model`, the recomputed parts of the layers, and the logits a second time."""
        return self.model(groups) + self._recomputed(groups) + ForwardFlops.of(self.facts).logits(groups)

    def _recomputed(self, groups: Sequence[RowGroup]) -> int:
        """Megatron's `block` recomputes the first `num_layers` layers of each chunk, `uniform` all of them."""
        forward, recompute = ForwardFlops.of(self.facts), self.recompute
        if recompute.granularity == "full":
            per_chunk = self.facts.num_layers // self.num_chunks
            layers = min(recompute.num_layers, per_chunk) if recompute.method == "block" else per_chunk
            return forward.layers(groups) * layers * self.num_chunks // self.facts.num_layers
        if recompute.granularity == "selective":
            tokens, squares = sum(group.tokens for group in groups), sum(group.squares for group in groups)
            per_layer = ("mlp" in recompute.modules) * forward.mlp * tokens
            per_layer += ("core_attn" in recompute.modules) * forward.attention * squares
            return self.facts.num_layers * per_layer
        return 0

    def metrics(self, groups: Sequence[RowGroup], seconds: float) -> dict[str, float]:
        """`perf/*` of updates on `groups` that took `seconds`, per device; nothing when nothing was computed."""
        if not groups:
            return {}
        device_seconds = max(seconds, 1e-9) * self.num_devices
        metrics = {
            "perf/tflops": self.model(groups) / device_seconds / 1e12,
            "perf/hardware_tflops": self.hardware(groups) / device_seconds / 1e12,
        }
        if self.peak_tflops is not None:
            metrics["perf/mfu"] = metrics["perf/tflops"] / self.peak_tflops
        return metrics
