"""Which tensors of the weight table travel together in a weight sync, and what a pass over them holds. No torch.

`model.live_weights.WeightStream` sends these buckets; the planner counts them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from remax_megatron.model_facts import ModelFacts
from remax_megatron.weights.weight_table import WeightEntry, owner, shard_shape, weight_table


class Slot(NamedTuple):
    """A tensor of a bucket: its entry, where its owner keeps it, the shape of a shard, and the shard's offset."""

    entry: WeightEntry
    chunk: int
    name: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Bucket:
    """Consecutive tensors of one pipeline stage; `numel` elements are one tensor-parallel rank's share of them."""

    stage: int
    numel: int
    slots: tuple[Slot, ...]

    @property
    def hf_tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        """Name and shape of the Hugging Face tensors that it becomes, in the order in which they come."""
        return [one for slot in self.slots for one in zip(slot.entry.hf_names, slot.entry.hf_shapes, strict=True)]


@cache
def plan_buckets(facts: ModelFacts, tp: int, pp: int, vpp: int, itemsize: int, bucket_bytes: int) -> tuple[Bucket, ...]:
    """Cut the model into buckets whose whole tensors and share fit `bucket_bytes`, and beside the largest tensor, which
    may have a bucket of its own, twice that: the last tensor of the bucket before may be alive, and with it the bucket.

    facts         sizes of the whole model
    tp, pp, vpp   its layout
    itemsize      bytes of an element of what is sent
    bucket_bytes  whole tensors that are gathered at once
    """
    by_stage: dict[int, list[tuple[WeightEntry, int, str, tuple[int, ...], int]]] = {stage: [] for stage in range(pp)}
    for entry in weight_table(facts):
        stage, chunk, name = owner(entry, facts.num_layers, pp, vpp)
        shape = shard_shape(entry, facts, tp)
        by_stage[stage].append((entry, chunk, name, shape, math.prod(shape)))
    room = bucket_bytes // itemsize // (tp + (tp > 1))  # for a share and all that are gathered
    largest = max(size for items in by_stage.values() for *_, size in items)
    limit = min(room, 2 * room - largest)
    buckets = []
    for stage, items in by_stage.items():
        slots: list[Slot] = []
        numel = 0
        for entry, chunk, name, shape, size in items:
            if slots and numel + size > limit:
                buckets.append(Bucket(stage, numel, tuple(slots)))
                slots, numel = [], 0
            slots.append(Slot(entry, chunk, name, shape, numel))
            numel += size
        buckets.append(Bucket(stage, numel, tuple(slots)))
    return tuple(buckets)


@cache
def num_stream_elements(facts: ModelFacts) -> int:
    """Count the elements of the Hugging Face tensors of one pass."""
    return sum(math.prod(shape) for entry in weight_table(facts) for shape in entry.hf_shapes)


@cache
def peak_elements(buckets: tuple[Bucket, ...], tp: int, pp: int) -> int:
    """Count the elements that a pass holds at most: a bucket while its consumer still has the last tensor of the one
    before, or while a tensor is put together from shards that were gathered."""
    peak = alive = 0
    for bucket in buckets:
        alone = len(bucket.slots) == 1
        gathered = tp * bucket.numel if tp > 1 else 0
        own = bucket.numel if tp == 1 or pp > 1 or not alone else 0  # its owner gathers from the weight itself
        peak = max(peak, alive + own + gathered)
        kept, last = gathered or own, 0
        for slot in bucket.slots:
            while_made, made = _put_together(slot.entry.kind, tp * math.prod(slot.shape), tp > 1, alone)
            peak = max(peak, kept + last + while_made)
            last = made
        alive = last or kept
    return peak


def _put_together(kind: str, whole: int, cut: bool, alone: bool) -> tuple[int, int]:
    """(elements made on the way to the tensors of an entry, elements of them that stay), as shards.to_hf makes them;
    none where they are views."""
    if kind == "qkv":  # query, key and value are interleaved, so they are always copied
        return (2 if cut and not alone else 1) * whole, whole
    if kind == "replicated" or not cut or (kind == "vocab" and alone):
        return 0, 0
    return whole, whole
