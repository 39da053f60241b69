"""Calls into the kernel that Python does not offer, by ctypes."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

from remax_megatron.rewards.sandbox.syscall_numbers import number_of

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _checked(name: str, function: Callable[..., int], *arguments: int | bytes | None) -> int:
    result = function(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def call(name: str, *arguments: int | bytes | None) -> int:
    """Call libc's function `name`. OSError as the kernel says."""
    return _checked(name, getattr(_libc, name), *arguments)


def syscall(name: str, *arguments: int | bytes | None) -> int:
    """Make the system call `name`, one of syscall_numbers.NUMBERS. OSError as the kernel says."""
    number = number_of(name)
    assert number is not None
    return _checked(name, _libc.syscall, number, *arguments)


def prctl(option: int, *arguments: int | bytes) -> None:
    """prctl(2). OSError as the kernel says."""
    call("prctl", option, *arguments, *[0] * (4 - len(arguments)))
