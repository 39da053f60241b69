"""The pieces of a `torch_dist` checkpoint that are not the tensors' own bytes; torch_dist.py has the format.

What torch.save writes around a tensor, the objects Megatron asks for, the index, and the two small files. The tensors'
bytes are copied by convert/copying.py into the places that an `Item` names.
"""

from __future__ import annotations

import functools
import io
import json
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch

from remax_megatron.model_facts import ModelFacts
from remax_megatron.weights.torch_dist import extra_states
from remax_megatron.weights.weight_table import FINAL_NORM

ITEM_ALIGNMENT = 64  # bytes; torch.save aligns the data to it within an item


def extra_state_keys(facts: ModelFacts) -> list[str]:
    """Return the names of Megatron's extra states, which hold no weights."""
    layers = [
        f"decoder.layers.{name}._extra_state/shard_{layer}_{facts.num_layers}"
        for layer in range(facts.num_layers)
        for name in extra_states(facts)
    ]
    return [*layers, f"{FINAL_NORM.removesuffix('.weight')}._extra_state/shard_0_1"]


@dataclass(frozen=True)
class Item:
    """One chunk of the tensor `key` and where it is written: bytes `start` to `end` of `file`."""

    key: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    end: int


class _Sink(io.RawIOBase):
    """Keeps what is written and where; torch.save steps over the tensor's own bytes by seeking."""

    def __init__(self) -> None:
        self.position = 0
        self.writes: list[tuple[int, bytes]] = []

    def write(self, data: Any) -> int:
        self.writes.append((self.position, bytes(data)))
        self.position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = offset + (self.position if whence == io.SEEK_CUR else 0)
        return self.position

    def tell(self) -> int:
        return self.position


@functools.cache
def item_wrapper(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """What torch.save writes before and after the bytes of a tensor."""
    sink = _Sink()
    with torch.serialization.skip_data():
        torch.save(torch.empty(shape, dtype=dtype), cast(Any, sink))  # never touched, so it takes no memory
    size = torch.Size(shape).numel() * dtype.itemsize
    before, after = bytearray(), bytearray()
    for position, data in sink.writes:
        part = before if position == len(before) else after
        assert position == len(before) + (size + len(after) if part is after else 0), (position, shape)
        part += data
    return bytes(before), bytes(after)


def object_item(value: object) -> bytes:
    """A ShardedObject's bytes: Megatron pickles the list of a rank's objects."""
    buffer = io.BytesIO()
    torch.save([value], buffer)
    return buffer.getvalue()


def import_metadata_classes() -> None:
    """Import what `metadata` needs: it brings all of torch.distributed.checkpoint, 2 s of it."""
    import torch.distributed.checkpoint.filesystem
    import torch.distributed.checkpoint.metadata  # noqa: F401


def metadata(items: Iterable[Item], objects: Iterable[tuple[str, str, int, int]], dtype: torch.dtype) -> bytes:
    """The content of `.metadata` for chunks of type `dtype` and for objects (key, file, start, size)."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    tensors: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    for item in items:
        offsets, shape = torch.Size(item.offsets), torch.Size(item.shape)
        whole = torch.Size(item.global_shape)
        tensors.setdefault(item.key, TensorStorageMetadata(TensorProperties(dtype=dtype), whole, []))
        tensors[item.key].chunks.append(ChunkStorageMetadata(offsets, shape))
        places[MetadataIndex(item.key, offsets)] = _StorageInfo(item.file, item.start, item.end - item.start)
    for key, file, start, size in objects:
        tensors[key] = BytesStorageMetadata()
        places[MetadataIndex(key)] = _StorageInfo(file, start, size)
    return pickle.dumps(Metadata(state_dict_metadata=tensors, planner_data={}, storage_data=places))


def common_files() -> dict[str, bytes]:
    """`metadata.json` and `common.pt`, as Megatron-LM reads them (training/checkpointing.py, core_r0.15 and later)."""
    formats = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    formats |= {"common_backend": "torch", "common_backend_version": 1}
    common = io.BytesIO()
    content = {
        "checkpoint_version": 3.0,  # below 2.0 the QKV rows would be put in another order
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"singleton_local_shards": False},  # layers stacked, gate and up in one tensor
    }
    torch.save(content, common)
    return {"metadata.json": json.dumps(formats).encode(), "common.pt": common.getvalue()}
