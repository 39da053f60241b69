"""The supervisor: a forked process that confines the program, starts it and ends it in time."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from remax_megatron.rewards.sandbox.kernel import (
    PR_SET_DUMPABLE,
    PR_SET_NO_NEW_PRIVS,
    PR_SET_PDEATHSIG,
    prctl,
    syscall,
)
from remax_megatron.rewards.sandbox.landlock import restrict_files, supported_abi
from remax_megatron.rewards.sandbox.limits import Limits, set_resource_limits
from remax_megatron.rewards.sandbox.namespaces import DEVICES, new_root, own_count, readable_paths
from remax_megatron.rewards.sandbox.seccomp import filter_syscalls

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",  # the same answer prints the same set in the same order each time
    "PYTHONUTF8": "1",
    "TMPDIR": ".",
}
NOBODY = 65534


def supervise(process: SandboxedProcess) -> str:
    """ "exit CODE" or "timeout CODE" when the program ran; else "error WHY", or "" when the supervisor was killed."""
    reader, writer = os.pipe()
    supervisor = os.fork()
    if supervisor == 0:
        try:
            os.close(reader)
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            os.setsid()
            _report(writer, process.supervise(writer))
        except BaseException as error:  # nothing may return into the caller's code
            _report(writer, f"error {type(error).__name__}: {error}")
        finally:
            os._exit(0)
    os.close(writer)
    try:
        with open(reader, "rb") as pipe:
            return pipe.readline().decode(errors="replace").strip()
    except BaseException:
        os.kill(supervisor, signal.SIGKILL)
        raise
    finally:
        os.waitpid(supervisor, 0)


def _report(writer: int, text: str) -> None:
    os.write(writer, (text.replace("\n", " ")[:2000] + "\n").encode(errors="replace"))


@dataclass(frozen=True)
class SandboxedProcess:
    """The program before it runs: what happens between fork and exec.

    program      its source
    folder       an empty folder, where it may write
    files        descriptors that become its stdin, stdout and stderr
    limits       what it may use
    confinement  "namespaces" or "landlock"
    """

    program: bytes
    folder: str
    files: Sequence[int]
    limits: Limits
    confinement: str

    def supervise(self, writer: int) -> str:
        """In the supervisor: start the program and wait for it; what `supervise` returns."""
        root, uid, gid = os.geteuid() == 0, os.geteuid(), os.getegid()
        if root:
            uid = gid = NOBODY
        proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
        box = self.folder
        if self.confinement == "namespaces":
            new_root(self.folder, self.limits.folder_bytes, root, uid, gid, proc)
            box = "/box"
        with open(f"{box}/main.py", "xb") as file:
            file.write(self.program)
        if root and self.confinement == "landlock":
            os.chown(box, uid, gid)
        child = os.fork()
        if child == 0:
            try:
                self.become_the_program(box, root, uid, gid, proc)
            except BaseException as error:  # nothing may return into the caller's code
                _report(writer, f"error {type(error).__name__}: {error}")
            finally:
                os._exit(127)
        return _wait(child, self.limits.wall_s)

    def become_the_program(self, box: str, root: bool, uid: int, gid: int, proc: int) -> None:
        """In the child: give up all rights but those of the confinement, and execute the interpreter. `proc` is an open
        /proc, `uid` and `gid` are those to run as, `root` whether the caller is root, `box` the program's folder."""
        for target, fd in enumerate(self.files):
            os.dup2(fd, target)
        syscall("close_range", 3, 2**32 - 1, 4)  # 4: close them at exec (the pipe to the supervisor is one)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        if root:
            os.setgroups([])
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
            prctl(PR_SET_DUMPABLE, 1)  # else /proc/self stays root's
            if self.confinement == "namespaces":
                own_count(uid, gid, proc)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # after the change of uid, which clears it
        os.chdir(box)
        os.umask(0o077)
        set_resource_limits(self.limits)
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        if self.confinement == "landlock" or supported_abi() >= 1:
            restrict_files(["/"] if self.confinement == "namespaces" else [*readable_paths(), *DEVICES], box)
        filter_syscalls(os.getpid())
        os.execve(sys.executable, [sys.executable, "-s", "-P", "-B", "main.py"], ENVIRONMENT)


def _wait(child: int, wall_s: float) -> str:
    """Waits for the program, kills it at the deadline; it is reaped, and its pid namespace is empty, on return."""
    deadline = time.monotonic() + wall_s
    pidfd = os.pidfd_open(child)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    timely = bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
    if not timely:
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return f"{'exit' if timely else 'timeout'} {code}"
