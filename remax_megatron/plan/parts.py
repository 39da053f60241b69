"""What a modelled time is made of: parts, each of counted work and one efficiency. Pure; step_time.py makes them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import NamedTuple


@dataclass(frozen=True)
class Efficiencies:
    """What a run reaches of the data sheets' rates, 0 to 1, and seconds (_s) that come with a count.

    Each default says where it comes from. None was measured with this code on a GPU.
    """

    # Of the dense bfloat16 peak, packed updates without their communication: between the 0.52 of pretraining (Qwen3-8B,
    # TP 1, Megatron-Bridge's card) and the 0.36 to 0.39 of whole RL updates (8B, NeMo-RL issue 959, derived).
    update_flops: float = 0.45
    # Of the same, prompts in the engine: assumed as the update's.
    prefill_flops: float = 0.45
    # Of the memory's rate, while tokens are written one after another: assumed.
    decode_bandwidth: float = 0.65
    # Of the links' rate, collectives of training: what NCCL's tests are known to reach of NVLink, assumed for networks.
    exchange_bandwidth: float = 0.75
    # Of the memory's rate, Adam's step, and weights and gradients that every micro-batch passes over: assumed.
    optimizer_bandwidth: float = 0.7
    # Of the memory's rate, weights on their way into the engine: the target of docs/gpu.md.
    stream_bandwidth: float = 0.5
    # Of PCIe, copies of offloads between page-locked memory and the device: assumed.
    host_bandwidth: float = 0.8
    # A step of the engine beside its kernels (scheduling, sampling, hand-over of tokens): assumed.
    decode_step_s: float = 2e-3
    # A tensor-parallel all-reduce of few tokens in the engine, of which a layer has two: assumed.
    small_collective_s: float = 12e-6
    # A collective or a message of an update, beside its bytes: assumed, as that of the engine.
    collective_s: float = 12e-6
    # A forward pass over one layer, beside its arithmetic: assumed; 24 kernels of Megatron's layers (docs/gpu.md).
    layer_s: float = 50e-6
    # A micro-batch, beside its layers (packing, copies to the device): assumed.
    microbatch_s: float = 2e-3
    # An optimizer step, beside its memory traffic (norms, reductions of numbers): assumed.
    optimizer_step_s: float = 20e-3
    # A Hugging Face tensor that the engine loads: assumed; peers load 8B in 5 s by tensors (NeMo-RL issue 959).
    tensor_s: float = 1e-3
    # Putting the engine to sleep and waking it: 0.3 s and up to 6.5 s were published for 8B (vLLM issue 48337).
    sleep_s: float = 1.0
    # Scoring an answer in one of a replica's processes: assumed.
    reward_s: float = 1e-3

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """List the names."""
        return tuple(field.name for field in fields(cls))


class Part(NamedTuple):
    """`work` in seconds at the data sheet's rate, or a count, and the efficiency that makes seconds of it."""

    name: str
    work: float
    field: str

    @property
    def is_count(self) -> bool:
        """Tell whether the efficiency multiplies."""
        return self.field.endswith("_s")

    def seconds(self, efficiencies: Efficiencies) -> float:
        """Compute the seconds of this part."""
        value = getattr(efficiencies, self.field)
        return self.work * value if self.is_count else self.work / value


@dataclass(frozen=True)
class Phase:
    """A phase of a step: its parts follow each other."""

    parts: tuple[Part, ...]

    @classmethod
    def of(cls, parts: Iterable[Part]) -> Phase:
        """Make a phase of the parts that have work."""
        return cls(tuple(part for part in parts if part.work > 0))

    def seconds(self, efficiencies: Efficiencies) -> float:
        """Compute the seconds of all parts."""
        return sum(part.seconds(efficiencies) for part in self.parts)

    def bound(self, efficiencies: Efficiencies) -> str:
        """Name the part that takes longest; nothing of an empty phase."""
        return max(self.parts, key=lambda part: part.seconds(efficiencies)).name if self.parts else ""
