"""What one program may use, and the resource limits (setrlimit) that hold it to that."""

from __future__ import annotations

import resource
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What one program may use. Bytes, seconds of wall time."""

    wall_s: float = 5.0
    memory_bytes: int = 1 << 30  # RLIMIT_AS: the interpreter alone takes some 30 MB of it, numpy 200 MB
    file_bytes: int = 16 << 20  # of each file and of each output
    folder_bytes: int = 64 << 20
    output_bytes: int = 1 << 20  # of stdout that is read; more is outcome "output"
    num_threads: int = 16
    num_files: int = 64


def set_resource_limits(limits: Limits) -> None:
    """From here on, for this process and all that it executes."""
    cpu_s = int(limits.wall_s) + 1
    for which, value in (
        (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_NOFILE, limits.num_files),
        (resource.RLIMIT_NPROC, limits.num_threads),
    ):
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))
