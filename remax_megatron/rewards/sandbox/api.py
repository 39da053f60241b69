"""Runs an untrusted Python program where it can compute, write in its own folder, and do nothing else. Linux only.

    run = run_python("print(input()[::-1])", stdin="abc", limits=Limits(wall_s=2.0))
    run.outcome, run.code, run.stdout  # "exit", 0, b"cba\n"

Two confinements; the first that works here is used (`available_protections()` tries them):

- "namespaces": a mount namespace whose root holds the interpreter and the system libraries read-only, four devices
  and one writable folder of bounded size; no /proc, no home, no data; and its own network, pid, ipc and uts
  namespaces. Needs root with CAP_SYS_ADMIN, or user namespaces for all (kernel 5.14 or later).
- "landlock": Landlock of ABI 3 or later (kernel 6.2) allows reading the same files and writing in a temporary folder.
  The folder's total size is then bounded by the time limit only, and the limit of threads counts all of the user's.

In both: a seccomp filter (needs no privilege) without which nothing runs. It refuses sockets other than connected pairs
(asyncio needs one), *new processes*, signals to others, namespaces, mounts, ptrace, io_uring, changes of mode, owner
and attributes of files, keys, and all system calls newer than kernel 5.16's; so there is one process to limit and to
kill. Further: Landlock where the kernel has it, uid 65534 where the caller is root, no_new_privs, resource limits, its
own session, an environment of five constants (supervisor.ENVIRONMENT), no file descriptors but 0, 1, 2 (memory files of
bounded size), SIGKILL at the deadline, and death with the caller (whose temporary folder then stays). It does not hide
the clock, the kernel's version or, under "landlock", whether a path exists, and it trusts the kernel.

Not for processes with threads that hold locks: it forks. The pool's workers (worker.py) are the place.
"""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import tempfile
from dataclasses import dataclass

from remax_megatron.rewards.sandbox import landlock
from remax_megatron.rewards.sandbox.limits import Limits
from remax_megatron.rewards.sandbox.supervisor import SandboxedProcess, supervise
from remax_megatron.rewards.sandbox.syscall_numbers import ARCHITECTURES
from remax_megatron.rewards.scorer import RewardError

CONFINEMENTS = ("namespaces", "landlock")


@dataclass(frozen=True)
class Run:
    """How a program ended: outcome "exit" with its code (negative for a signal), "timeout", or "output" (too much of
    it). `stdout` and `stderr` hold at most Limits.output_bytes and 4096 bytes."""

    outcome: str
    code: int
    stdout: bytes
    stderr: bytes


class SandboxError(RewardError):
    """The sandbox itself failed or cannot be had; the program was not run."""


@dataclass(frozen=True)
class Protections:
    """The layers active here. `confinement` is one of CONFINEMENTS, or None with the reasons in `missing`."""

    confinement: str | None
    seccomp: bool
    landlock_abi: int
    separate_uid: bool
    missing: str

    def check(self) -> None:
        """SandboxError naming what is missing where network and writes cannot be confined."""
        if self.confinement is None:
            raise SandboxError(
                f"untrusted programs cannot be confined on this machine: {self.missing}; allow user namespaces "
                "(sysctl user.max_user_namespaces > 0; in a container seccomp and AppArmor profiles that permit "
                "unshare), or use a kernel with Landlock ABI 3 (6.2 or later), or train without data_source 'code'"
            )


@functools.cache
def available_protections() -> Protections:
    """Tries the confinements by running a real program in each, once per process."""
    abi, uid = landlock.supported_abi(), os.geteuid() == 0
    reasons = []
    if (machine := platform.machine()) not in ARCHITECTURES:
        return Protections(None, False, abi, uid, f"no seccomp filter is written for {machine}")
    for confinement in CONFINEMENTS:
        try:
            run = _run("print(6 * 7)", "", Limits(wall_s=20.0), confinement)
        except SandboxError as error:
            reasons.append(f"{confinement}: {error}")
            continue
        if run.stdout == b"42\n":
            return Protections(confinement, True, abi, uid, "; ".join(reasons))
        reasons.append(f"{confinement}: a trial program ended with {run}")
    return Protections(None, False, abi, uid, "; ".join(reasons))


def run_python(program: str, *, stdin: str = "", limits: Limits | None = None, confinement: str | None = None) -> Run:
    """Runs `program` with this interpreter and the packages it has; SandboxError where it cannot be confined.

    `confinement` picks one of CONFINEMENTS (default: the best that works here).
    """
    if confinement is None:
        protections = available_protections()
        protections.check()
        assert protections.confinement is not None
        confinement = protections.confinement
    return _run(program, stdin, limits or Limits(), confinement)


def _run(program: str, stdin: str, limits: Limits, confinement: str) -> Run:
    if confinement == "landlock" and landlock.supported_abi() < landlock.MIN_ABI:
        raise SandboxError(f"Landlock ABI {landlock.supported_abi()}, {landlock.MIN_ABI} is needed")
    folder = tempfile.mkdtemp(prefix="remax-sandbox-")
    files = [os.memfd_create(name) for name in ("stdin", "stdout", "stderr")]
    try:
        with open(files[0], "wb", closefd=False) as file:
            file.write(stdin.encode(errors="surrogatepass"))
        os.lseek(files[0], 0, os.SEEK_SET)
        process = SandboxedProcess(program.encode(errors="surrogatepass"), folder, files, limits, confinement)
        outcome, _, rest = supervise(process).partition(" ")
        if outcome not in ("exit", "timeout"):
            raise SandboxError(f"{rest or 'the supervisor of the program died'}")
        stdout, stderr = os.pread(files[1], limits.output_bytes, 0), os.pread(files[2], 4096, 0)
        if outcome == "exit" and os.fstat(files[1]).st_size > limits.output_bytes:
            outcome = "output"
        return Run(outcome, int(rest), stdout, stderr)
    finally:
        for fd in files:
            os.close(fd)
        remove_folder(folder)


def remove_folder(folder: str) -> None:
    """Removes what a program may have left: very deep, or without permissions. By `rm`, which follows no links."""
    with_rights = ["chmod", "-R", "u+rwX", "--", folder]
    for command in (["rm", "-rf", "--", folder], with_rights, ["rm", "-rf", "--", folder]):
        if not os.path.lexists(folder):
            return
        subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
