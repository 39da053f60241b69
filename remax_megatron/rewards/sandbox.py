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
own session, an environment of five constants (ENVIRONMENT), no file descriptors but 0, 1, 2 (memory files of bounded
size), SIGKILL at the deadline, and death with the caller (whose temporary folder then stays). It does not hide the
clock, the kernel's version or, under "landlock", whether a path exists, and it trusts the kernel.

Not for processes with threads that hold locks: it forks. The pool's workers (worker.py) are the place.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import platform
import resource
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from remax_megatron.rewards.scoring import RewardError

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",  # the same answer prints the same set in the same order each time
    "PYTHONUTF8": "1",
    "TMPDIR": ".",
}
NOBODY = 65534
CONFINEMENTS = ("namespaces", "landlock")
_MIN_LANDLOCK_ABI = 3  # before it, truncating any file is allowed


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
    abi, uid = _landlock_abi(), os.geteuid() == 0
    reasons = []
    if (machine := platform.machine()) not in _ARCHITECTURES:
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
    if confinement == "landlock" and _landlock_abi() < _MIN_LANDLOCK_ABI:
        raise SandboxError(f"Landlock ABI {_landlock_abi()}, {_MIN_LANDLOCK_ABI} is needed")
    folder = tempfile.mkdtemp(prefix="remax-sandbox-")
    files = [os.memfd_create(name) for name in ("stdin", "stdout", "stderr")]
    try:
        with open(files[0], "wb", closefd=False) as file:
            file.write(stdin.encode(errors="surrogatepass"))
        os.lseek(files[0], 0, os.SEEK_SET)
        inside = _Inside(program.encode(errors="surrogatepass"), folder, files, limits, confinement)
        outcome, _, rest = _supervise(inside).partition(" ")
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


# ---- The supervisor: a forked process that sets up the namespaces, starts the program and ends it in time ------------


def _supervise(inside: _Inside) -> str:
    """ "exit CODE" or "timeout CODE" when the program ran; else "error WHY", or "" when the supervisor was killed."""
    reader, writer = os.pipe()
    supervisor = os.fork()
    if supervisor == 0:
        try:
            os.close(reader)
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            os.setsid()
            _say(writer, inside.supervise(writer))
        except BaseException as error:  # nothing may return into the caller's code
            _say(writer, f"error {type(error).__name__}: {error}")
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


def _say(writer: int, text: str) -> None:
    os.write(writer, (text.replace("\n", " ")[:2000] + "\n").encode(errors="replace"))


@dataclass(frozen=True)
class _Inside:
    """What happens between fork and exec."""

    program: bytes
    folder: str
    files: Sequence[int]
    limits: Limits
    confinement: str

    def supervise(self, writer: int) -> str:
        root, uid, gid = os.geteuid() == 0, os.geteuid(), os.getegid()
        if root:
            uid = gid = NOBODY
        proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
        box = self.folder
        if self.confinement == "namespaces":
            _new_root(self.folder, self.limits.folder_bytes, root, uid, gid, proc)
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
                _say(writer, f"error {type(error).__name__}: {error}")
            finally:
                os._exit(127)
        return _wait(child, self.limits.wall_s)

    def become_the_program(self, box: str, root: bool, uid: int, gid: int, proc: int) -> None:
        for target, fd in enumerate(self.files):
            os.dup2(fd, target)
        _syscall("close_range", 3, 2**32 - 1, 4)  # 4: close them at exec (the pipe to the supervisor is one)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        if root:
            os.setgroups([])
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
            _prctl(_PR_SET_DUMPABLE, 1)  # else /proc/self stays root's
            if self.confinement == "namespaces":
                _own_count(uid, gid, proc)
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # after the change of uid, which clears it
        os.chdir(box)
        os.umask(0o077)
        self._limit()
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        if self.confinement == "landlock" or _landlock_abi() >= 1:
            _restrict_files(["/"] if self.confinement == "namespaces" else [*_readable(), *_DEVICES], box)
        _filter_syscalls(os.getpid())
        os.execve(sys.executable, [sys.executable, "-s", "-P", "-B", "main.py"], ENVIRONMENT)

    def _limit(self) -> None:
        limits = self.limits
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


# ---- Layer: namespaces -----------------------------------------------------------------------------------------------

_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
_CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 0x1000, 0x4000, 0x40000
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID, _AT_RECURSIVE, _AT_FDCWD, _MNT_DETACH = 1, 2, 0x8000, -100, 2
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/etc/ld.so.cache", "/etc/localtime")


def _readable() -> list[str]:
    """What a program may read: the system's libraries and the interpreter with its packages; none within another."""
    own = os.path.realpath(sys.executable)
    wanted = [*_SYSTEM, sys.prefix, sys.base_prefix, str(Path(own).parents[1])]
    paths: list[str] = []
    for path in sorted({os.path.abspath(p) for p in wanted if os.path.exists(p)} - {"/"}, key=lambda p: (len(p), p)):
        if not any(path == p or path.startswith(p + "/") for p in paths):
            paths.append(path)
    return paths


def _new_root(folder: str, folder_bytes: int, root: bool, uid: int, gid: int, proc: int) -> None:
    """Enter new namespaces with a root of read-only mounts at `folder`; children are in a new pid namespace.

    `folder_bytes` is the size of what may be written, `root` whether this process is root's; if not, `uid` and `gid`
    are mapped through `proc`, a descriptor of /proc.
    """
    kinds = _CLONE_NEWNS | _CLONE_NEWUTS | _CLONE_NEWIPC | _CLONE_NEWPID | _CLONE_NEWNET
    if root:
        _call("unshare", kinds)
    else:
        _call("unshare", kinds | _CLONE_NEWUSER)
        _map_ids(uid, gid, proc)
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", folder, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=0755")
    for path in (*_readable(), *_DEVICES):
        target = folder + path
        os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
        if os.path.islink(path) and path in _SYSTEM:
            os.symlink(os.readlink(path), target)
            continue
        if os.path.isdir(path):
            os.mkdir(target, 0o755)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        _mount(path, target, None, _MS_BIND | _MS_REC)
        if path not in _DEVICES:
            _mount_attributes(target, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID)
    os.mkdir(f"{folder}/box")
    options = f"size={folder_bytes},nr_inodes=4096,mode=0700,uid={uid},gid={gid}"
    _mount("tmpfs", f"{folder}/box", "tmpfs", _MS_NOSUID | _MS_NODEV, options)
    os.chdir(folder)
    _syscall("pivot_root", b".", b".")  # the old root then lies over the new one: pivot_root(2), "." and "."
    _call("umount2", b".", _MNT_DETACH)
    os.chdir("/")
    _mount_attributes("/", 0, _MOUNT_ATTR_RDONLY)


def _own_count(uid: int, gid: int, proc: int) -> None:
    """A user namespace of its own, so that RLIMIT_NPROC counts this program alone; without it, all of `uid`'s."""
    try:
        _call("unshare", _CLONE_NEWUSER)
    except OSError:  # not permitted here: the limit is then shared by the programs that run at the same time
        return
    _map_ids(uid, gid, proc)


def _map_ids(uid: int, gid: int, proc: int) -> None:
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        fd = os.open(f"self/{name}", os.O_WRONLY, dir_fd=proc)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)


# ---- Layer: Landlock -------------------------------------------------------------------------------------------------

_LANDLOCK_EXECUTE, _LANDLOCK_WRITE_FILE, _LANDLOCK_READ_FILE, _LANDLOCK_READ_DIR = 1, 2, 4, 8


@functools.cache
def _landlock_abi() -> int:
    """0 where the kernel has no Landlock."""
    try:
        return _syscall("landlock_create_ruleset", None, 0, 1)
    except OSError:
        return 0


def _restrict_files(readable: Sequence[str], box: str) -> None:
    """Reading and executing beneath `readable`, everything beneath `box`, writing to /dev/null; no TCP, and no signals
    or abstract sockets to the outside where the ABI knows of them."""
    abi = _landlock_abi()
    rights = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    attributes = struct.pack("=QQQ", rights, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = _syscall("landlock_create_ruleset", attributes, size, 0)
    reading = _LANDLOCK_EXECUTE | _LANDLOCK_READ_FILE | _LANDLOCK_READ_DIR
    null = _LANDLOCK_READ_FILE | _LANDLOCK_WRITE_FILE
    for path, allowed in (*((p, reading) for p in readable), (box, rights), ("/dev/null", null)):
        fd = os.open(path, os.O_PATH)
        if not os.path.isdir(path):
            allowed &= _LANDLOCK_EXECUTE | null
        _syscall("landlock_add_rule", ruleset, 1, struct.pack("=Qi", allowed, fd), 0)
        os.close(fd)
    _syscall("landlock_restrict_self", ruleset, 0)
    os.close(ruleset)


# ---- Layer: seccomp --------------------------------------------------------------------------------------------------

# AUDIT_ARCH_* and the numbers of the system calls; from 424 on they are the same everywhere. <asm/unistd.h>, Linux 6.1
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_NUMBERS: dict[str, tuple[int | None, int | None]] = {
    # denied: (x86_64, aarch64)
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "fork": (57, None),
    "vfork": (58, None),
    "setsid": (112, 157),
    "setpgid": (109, 154),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "ptrace": (101, 117),
    "kcmp": (312, 272),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "bpf": (321, 280),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "quotactl": (179, 60),
    "acct": (163, 89),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "syslog": (103, 116),
    "vhangup": (153, 58),
    "personality": (135, 92),
    "lookup_dcookie": (212, 18),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "uselib": (134, None),
    "memfd_create": (319, 279),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "setpriority": (141, 140),
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
    "ioprio_set": (251, 30),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "chown": (92, None),
    "lchown": (94, None),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "pidfd_send_signal": (424, 424),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440),
    "mount_setattr": (442, 442),
    "quotactl_fd": (443, 443),
    "memfd_secret": (447, 447),
    "process_mrelease": (448, 448),
    # allowed for some arguments, in _filter_program
    "socketpair": (53, 199),
    "clone": (56, 220),
    "clone3": (435, 435),
    "kill": (62, 129),
    "tgkill": (234, 131),
    "prlimit64": (302, 261),
    "prctl": (157, 167),
    "fcntl": (72, 25),
    "ioctl": (16, 29),
    # called here
    "close_range": (436, 436),
    "landlock_create_ruleset": (444, 444),
    "landlock_add_rule": (445, 445),
    "landlock_restrict_self": (446, 446),
}
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


def _number(name: str) -> int | None:
    return _NUMBERS[name][list(_ARCHITECTURES).index(platform.machine())]


def _filter_program(pid: int) -> bytes:
    """The BPF program, for the process `pid` (its number in its own namespace)."""
    code: list[tuple[int, int, int, int]] = []

    def add(operation: int, value: int, if_true: int = 0, if_false: int = 0) -> None:
        code.append((operation, if_true, if_false, value))

    def refuse(error: int = errno.EPERM) -> None:
        add(_RETURN, _ERRNO | error)

    def on(name: str, argument: int, test: int, values: Sequence[int], otherwise_allowed: bool, error: int) -> None:
        """For system call `name`: one of `values` passes the test -> allowed or refused, else the opposite."""
        number = _number(name)
        assert number is not None
        add(_JEQ, number, 0, 2 * len(values) + 2)
        add(_LOAD, _ARGUMENT_AT + 8 * argument)
        hit, miss = (_ERRNO | error, _ALLOW) if otherwise_allowed else (_ALLOW, _ERRNO | error)
        for value in values:
            add(test, value, 0, 1)
            add(_RETURN, hit)
        add(_RETURN, miss)

    add(_LOAD, _ARCH_AT)
    add(_JEQ, _ARCHITECTURES[platform.machine()], 1, 0)
    add(_RETURN, _KILL_PROCESS)  # another ABI of the same kernel, with other numbers
    add(_LOAD, _NR_AT)
    add(_JGT, _NEWEST_SYSCALL, 0, 1)  # x32's numbers are above it too
    refuse(errno.ENOSYS)
    for name in _NUMBERS:
        number = _number(name)
        if number is not None and name not in _CONDITIONAL | _OURS:
            add(_JEQ, number, 0, 1)
            refuse()
    clone3 = _number("clone3")
    assert clone3 is not None
    add(_JEQ, clone3, 0, 1)
    refuse(errno.ENOSYS)  # its flags are in memory, out of a filter's sight; libc then uses clone
    socketpair = _number("socketpair")
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
    on("prctl", 0, _JEQ, [_PR_SET_PDEATHSIG], True, errno.EPERM)
    on("fcntl", 1, _JEQ, _SIGNAL_FCNTLS, True, errno.EPERM)
    on("ioctl", 1, _JEQ, _HARMLESS_IOCTLS, False, errno.ENOTTY)
    add(_RETURN, _ALLOW)
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _filter_syscalls(pid: int) -> None:
    """From here on, for this process and all that it executes. Needs no_new_privs."""
    program = _filter_program(pid)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    _prctl(_PR_SET_SECCOMP, 2, header)


# ---- Calls into the kernel -------------------------------------------------------------------------------------------

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _checked(name: str, function: Callable[..., int], *arguments: int | bytes | None) -> int:
    result = function(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def _call(name: str, *arguments: int | bytes | None) -> int:
    return _checked(name, getattr(_libc, name), *arguments)


def _syscall(name: str, *arguments: int | bytes | None) -> int:
    number = _number(name)
    assert number is not None
    return _checked(name, _libc.syscall, number, *arguments)


def _prctl(option: int, *arguments: int | bytes) -> None:
    _call("prctl", option, *arguments, *[0] * (4 - len(arguments)))


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    try:
        _call("mount", _encoded(source), _encoded(target), _encoded(kind), flags, options.encode())
    except OSError as error:
        raise OSError(error.errno, f"{source or kind} at {target}: {error.strerror}") from error


def _mount_attributes(path: str, flags: int, attributes: int) -> None:
    _syscall("mount_setattr", _AT_FDCWD, path.encode(), flags, struct.pack("=QQQQ", attributes, 0, 0, 0), 32)


def _encoded(path: str | None) -> bytes | None:
    return None if path is None else os.fsencode(path)
