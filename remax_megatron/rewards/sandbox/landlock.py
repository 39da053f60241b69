"""Layer: Landlock. Which files a program may read and write, by a rule set of the kernel (landlock(7))."""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Sequence

from remax_megatron.rewards.sandbox.kernel import syscall

MIN_ABI = 3  # that confines a program by itself: before it, truncating any file is allowed
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8


@functools.cache
def supported_abi() -> int:
    """The ABI version of the kernel's Landlock; 0 if it has none."""
    try:
        return syscall("landlock_create_ruleset", None, 0, 1)
    except OSError:
        return 0


def restrict_files(readable: Sequence[str], box: str) -> None:
    """Reading and executing beneath `readable`, everything beneath `box`, writing to /dev/null; no TCP, and no signals
    or abstract sockets to the outside where the ABI knows of them."""
    abi = supported_abi()
    rights = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    attributes = struct.pack("=QQQ", rights, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = syscall("landlock_create_ruleset", attributes, size, 0)
    reading = _EXECUTE | _READ_FILE | _READ_DIR
    null = _READ_FILE | _WRITE_FILE
    for path, allowed in (*((p, reading) for p in readable), (box, rights), ("/dev/null", null)):
        fd = os.open(path, os.O_PATH)
        if not os.path.isdir(path):
            allowed &= _EXECUTE | null
        syscall("landlock_add_rule", ruleset, 1, struct.pack("=Qi", allowed, fd), 0)
        os.close(fd)
    syscall("landlock_restrict_self", ruleset, 0)
    os.close(ruleset)
