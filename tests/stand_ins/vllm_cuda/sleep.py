"""The sleep allocator of vLLM 0.24 (device_allocator/cumem.py), on storages of the device.

Memory that is thrown away is filled with NaN, so that nobody reads it by luck; waking up gives it back as it lies.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tests.stand_ins.vllm_cuda.tensors import GPU


class Allocator:
    """The four calls of vllm.device_allocator.MemAllocator."""

    @contextmanager
    def use_memory_pool(self, tag: str | None = None) -> Iterator[None]:
        before, GPU.pool = GPU.pool, tag or "default"
        try:
            yield
        finally:
            GPU.pool = before

    def get_current_usage(self) -> int:
        return sum(block.num_bytes for block in GPU.blocks.values() if block.pool)

    def sleep(self, offload_tags: Sequence[str] | None = None) -> None:
        GPU.events.append(f"sleep, kept: {list(offload_tags or ())}")
        for key, block in GPU.blocks.items():
            storage = block.storage()
            if block.pool and key not in GPU.asleep and storage is not None:
                GPU.asleep.add(key)
                GPU.used_bytes -= block.num_bytes
                if block.num_bytes and block.pool not in (offload_tags or ()):
                    ctypes.memset(storage.data_ptr(), 0xFF, block.num_bytes)  # NaN in every floating point format

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        GPU.events.append(f"wake {tags}")
        for key in list(GPU.asleep):
            if tags is None or GPU.blocks[key].pool in tags:
                GPU.asleep.discard(key)
                GPU.used_bytes += GPU.blocks[key].num_bytes


def connect() -> None:
    """Hand this allocator to vLLM."""
    import vllm.device_allocator
    import vllm.v1.worker.gpu_worker

    allocator = Allocator()
    for module in (vllm.device_allocator, vllm.v1.worker.gpu_worker):
        module.get_mem_allocator_instance = lambda: allocator
