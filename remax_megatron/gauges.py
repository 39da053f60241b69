"""What the ranks hold: resident memory, open files, threads, their children's memory, and on CUDA the device's memory.

A number that rises from step to step is a leak. Linux only (/proc). Watching a run from the outside is
benchmarks/growth.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

_GIB = 2**30
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def process_gauges(device: torch.device, mine: Mapping[str, float]) -> dict[str, float]:
    """`memory/*` for metrics.jsonl, each the largest over all ranks; `mine` are more of this rank's, the same keys on
    all. Collective over the world, one all-reduce.

    GiB are those of resident memory, mapped files included; `children` are all processes below a rank (the reward
    workers) together. On CUDA `device_allocated` and `device_reserved` are torch's, `device_used` is what all processes
    on the device take, vLLM's own mappings included.
    """
    gauges = {
        **mine,
        "memory/rss_max_gib": resident_bytes("self") / _GIB,
        "memory/children_max_gib": sum(resident_bytes(pid) for pid in descendants(os.getpid())) / _GIB,
        "memory/open_files_max": num_open_files("self"),
        "memory/threads_max": num_threads("self"),
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        gauges |= {
            "memory/device_allocated_max_gib": torch.cuda.memory_allocated(device) / _GIB,
            "memory/device_reserved_max_gib": torch.cuda.memory_reserved(device) / _GIB,
            "memory/device_used_max_gib": (total - free) / _GIB,
        }
    largest = torch.tensor(list(gauges.values()), dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return dict(zip(gauges, largest.tolist(), strict=True))


def resident_bytes(pid: int | str) -> int:
    """Resident memory of a process, 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
    except (FileNotFoundError, ProcessLookupError):
        return 0


def num_open_files(pid: int | str) -> int:
    """File descriptors of a process, less the one by which "self" is counted."""
    return len(os.listdir(f"/proc/{pid}/fd")) - (pid == "self")


def num_threads(pid: int | str) -> int:
    """Count the threads of this process."""
    return len(os.listdir(f"/proc/{pid}/task"))


def descendants(pid: int) -> list[int]:
    """The processes that `pid`'s threads started and that still run, and theirs."""
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{thread}/children").read_text().split():
                found += [int(child), *descendants(int(child))]
    except (FileNotFoundError, ProcessLookupError):  # it, or one of its threads, has ended
        pass
    return found
