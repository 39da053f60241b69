"""Layer: seccomp. A BPF program that the kernel runs at every system call: it allows it, refuses it, or kills."""

from __future__ import annotations

import ctypes
import errno
import platform
import struct
from collections.abc import Sequence

from remax_megatron.rewards.sandbox.kernel import PR_SET_PDEATHSIG, PR_SET_SECCOMP, prctl
from remax_megatron.rewards.sandbox.syscall_numbers import ARCHITECTURES, NUMBERS, number_of

_CONDITIONAL = {"socketpair", "clone", "clone3", "kill", "tgkill", "prlimit64", "prctl", "fcntl", "ioctl"}
_OURS = {"close_range", "landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self"}
_NEWEST_SYSCALL = 450  # Linux 5.16; what came later cannot be judged here
_CLONE_THREAD = 0x10000
_AF_UNIX = 1
_CONNECTED_TYPES = (0x1, 0x801, 0x80001, 0x80801)  # SOCK_STREAM with and without CLOEXEC, NONBLOCK: asyncio's pairs
_HARMLESS_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS TIOCGWINSZ FIONREAD FIONBIO FIO[N]CLEX
_SIGNAL_FCNTLS = (8, 10, 15)  # F_SETOWN, F_SETSIG, F_SETOWN_EX: signals to others by way of file events

_LOAD, _JEQ, _JGT, _JSET, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06  # BPF_LD|W|ABS, BPF_JMP|.., BPF_RET
_ALLOW, _ERRNO, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
_NR_AT, _ARCH_AT, _ARGUMENT_AT = 0, 4, 16  # struct seccomp_data; the low half of argument i at 16 + 8 i


def filter_program(pid: int) -> bytes:
    """The BPF program, for the process `pid` (its number in its own namespace)."""
    code: list[tuple[int, int, int, int]] = []

    def add(operation: int, value: int, if_true: int = 0, if_false: int = 0) -> None:
        code.append((operation, if_true, if_false, value))

    def refuse(error: int = errno.EPERM) -> None:
        add(_RETURN, _ERRNO | error)

    def on(name: str, argument: int, test: int, values: Sequence[int], otherwise_allowed: bool, error: int) -> None:
        """For system call `name`: one of `values` passes the test -> allowed or refused, else the opposite."""
        number = number_of(name)
        assert number is not None
        add(_JEQ, number, 0, 2 * len(values) + 2)
        add(_LOAD, _ARGUMENT_AT + 8 * argument)
        hit, miss = (_ERRNO | error, _ALLOW) if otherwise_allowed else (_ALLOW, _ERRNO | error)
        for value in values:
            add(test, value, 0, 1)
            add(_RETURN, hit)
        add(_RETURN, miss)

    add(_LOAD, _ARCH_AT)
    add(_JEQ, ARCHITECTURES[platform.machine()], 1, 0)
    add(_RETURN, _KILL_PROCESS)  # another ABI of the same kernel, with other numbers
    add(_LOAD, _NR_AT)
    add(_JGT, _NEWEST_SYSCALL, 0, 1)  # x32's numbers are above it too
    refuse(errno.ENOSYS)
    for name in NUMBERS:
        number = number_of(name)
        if number is not None and name not in _CONDITIONAL | _OURS:
            add(_JEQ, number, 0, 1)
            refuse()
    clone3 = number_of("clone3")
    assert clone3 is not None
    add(_JEQ, clone3, 0, 1)
    refuse(errno.ENOSYS)  # its flags are in memory, out of a filter's sight; libc then uses clone
    socketpair = number_of("socketpair")
    assert socketpair is not None
    add(_JEQ, socketpair, 0, 4)
    add(_LOAD, _ARGUMENT_AT)
    add(_JEQ, _AF_UNIX, 1, 0)
    refuse()
    add(_LOAD, _NR_AT)
    on("socketpair", 1, _JEQ, _CONNECTED_TYPES, False, errno.EPERM)
    on("clone", 0, _JSET, [_CLONE_THREAD], False, errno.EPERM)
    on("kill", 0, _JEQ, [pid], False, errno.EPERM)
    on("tgkill", 0, _JEQ, [pid], False, errno.EPERM)
    on("prlimit64", 0, _JEQ, [0, pid], False, errno.EPERM)
    on("prctl", 0, _JEQ, [PR_SET_PDEATHSIG], True, errno.EPERM)
    on("fcntl", 1, _JEQ, _SIGNAL_FCNTLS, True, errno.EPERM)
    on("ioctl", 1, _JEQ, _HARMLESS_IOCTLS, False, errno.ENOTTY)
    add(_RETURN, _ALLOW)
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def filter_syscalls(pid: int) -> None:
    """From here on, for this process and all that it executes. Needs no_new_privs."""
    program = filter_program(pid)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    prctl(PR_SET_SECCOMP, 2, header)
