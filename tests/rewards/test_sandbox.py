"""The sandbox against programs that try to get out, and the code scorer on top of it.

Every attempt is bounded by itself (500 forks, not endless ones), so that a failing test cannot take the machine along.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from remax_megatron.rewards.code import extract_program, score
from remax_megatron.rewards.pool import RewardPool
from remax_megatron.rewards.sandbox import api, supervisor
from remax_megatron.rewards.sandbox.api import CONFINEMENTS, Protections, SandboxError, available_protections
from remax_megatron.rewards.sandbox.limits import Limits
from remax_megatron.rewards.scorer import RewardError, ScoreRequest


@pytest.fixture(scope="module", params=CONFINEMENTS)
def confinement(request: pytest.FixtureRequest) -> str:
    try:
        assert api.run_python("print(1)", confinement=request.param).stdout == b"1\n"
    except SandboxError as error:
        pytest.skip(f"this machine has no confinement by {request.param}: {error}")
    return request.param


def run(confinement: str, program: str, stdin: str = "", **limits: float) -> api.Run:
    return api.run_python(program, stdin=stdin, limits=Limits(**limits), confinement=confinement)


def printed(confinement: str, program: str, **limits: float) -> str:
    result = run(confinement, program, **limits)
    assert (result.outcome, result.code) == ("exit", 0), result
    return result.stdout.decode().strip()


# Each line of `attempts` is tried; what the kernel says is printed.
TRY = """
import ctypes, errno, os, socket, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), "")
def attempt(action):
    try:
        action()
        print("DONE")
    except OSError as error:
        print(errno.errorcode[error.errno])
"""


def attempts(confinement: str, *actions: str) -> list[str]:
    return printed(confinement, TRY + "\n".join(f"attempt(lambda: {a})" for a in actions)).split()


def test_honest_programs(confinement: str) -> None:
    assert printed(confinement, "print(6 * 7)") == "42"
    result = run(confinement, "print(input()[::-1]); import sys; sys.exit(3)", stdin="abc\n")
    assert result == api.Run("exit", 3, b"cba\n", b"")
    program = "import tempfile, json; f = tempfile.NamedTemporaryFile('w+'); json.dump([1], f); f.flush(); f.seek(0)"
    assert printed(confinement, f"{program}; print(f.read())") == "[1]"
    program = "import sys; sys.setrecursionlimit(9000); f = lambda n: n and 1 + f(n - 1); print(f(5000))"
    assert printed(confinement, program) == "5000"
    program = "import asyncio, numpy; print(numpy.arange(4).sum()); asyncio.run(asyncio.sleep(0))"
    assert printed(confinement, program) == "6"


def test_no_new_processes(confinement: str) -> None:
    """500 forks, all refused: a fork bomb has nothing to multiply. Nor by way of vfork, clone, or a shell."""
    program = """
import os, time
made = 0
for _ in range(500):
    try:
        if os.fork() == 0:
            time.sleep(1)
            os._exit(0)
        made += 1
    except OSError:
        pass
print(made)"""
    assert printed(confinement, program) == "0"
    clone3 = 435
    results = attempts(
        confinement,
        "os.posix_spawn('/bin/sh', ['sh'], {})",
        "subprocess.run(['/bin/true'])",
        f"call('syscall', {56 if platform.machine() == 'x86_64' else 220}, 17, 0, 0, 0, 0)",  # clone(SIGCHLD)
        f"call('syscall', {clone3}, 0, 0)",
    )
    assert results[:3] == ["EPERM"] * 3 and results[3] == "ENOSYS"


def test_threads_are_limited(confinement: str) -> None:
    program = """
import threading, time
made = 0
try:
    for _ in range(60):
        threading.Thread(target=time.sleep, args=(0.2,), daemon=True).start()
        made += 1
except RuntimeError:
    pass
print(made)"""
    made = int(printed(confinement, program, num_threads=16))
    assert made < 16
    if confinement == "namespaces":  # the count is the program's own
        assert made >= 8


def test_endless_loop(confinement: str) -> None:
    start = time.monotonic()
    result = run(confinement, "print('begun', flush=True)\nwhile True: pass", wall_s=0.5)
    assert (result.outcome, result.code, result.stdout) == ("timeout", -9, b"begun\n")
    assert 0.5 <= time.monotonic() - start < 5
    ignoring = (
        "import signal\nfor s in range(1, 32):\n  try: signal.signal(s, signal.SIG_IGN)\n  except OSError: pass\n"
    )
    assert run(confinement, ignoring + "while True: signal.pause()", wall_s=0.5).outcome == "timeout"


def test_memory(confinement: str) -> None:
    program = "try: bytearray({})\nexcept MemoryError: print('refused')"
    assert printed(confinement, program.format("10 << 30")) == "refused"
    assert printed(confinement, program.format("300 << 20"), memory_bytes=200 << 20) == "refused"
    # raising the limit again is refused too
    program = "import resource as r\ntry: r.setrlimit(r.RLIMIT_AS, (r.RLIM_INFINITY,) * 2)\n"
    assert printed(confinement, program + "except (OSError, ValueError): print('refused')") == "refused"


def test_no_writing_outside(confinement: str, tmp_path: Path) -> None:
    """Also where file permissions would allow it, and by way of links and renames."""
    tmp_path.chmod(0o777)
    secret = tmp_path / "secret"
    secret.write_text("kept")
    secret.chmod(0o666)
    results = attempts(
        confinement,
        f"open({str(secret)!r}, 'w')",
        f"open({str(secret)!r})",  # nor reading
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"os.truncate({str(secret)!r}, 0)",
        f"os.unlink({str(secret)!r})",
        f"os.mkdir({str(tmp_path / 'folder')!r})",
        f"os.chmod({str(secret)!r}, 0)",
        f"os.utime({str(secret)!r})",
        f"os.link({str(secret)!r}, 'hard')",
        f"(os.symlink({str(secret)!r}, 'soft'), open('soft', 'w'))",
        f"(os.symlink({str(tmp_path)!r}, 'up'), open('up/new', 'w'))",
        f"(open('own', 'w'), os.rename('own', {str(tmp_path / 'own')!r}))",
        "open('../outside', 'w')",
        "open('/outside', 'w')",
        "open('/usr/outside', 'w')",
        "open('/etc/passwd', 'a')",
        "open('/proc/self/mem', 'r+b')",
        f"open(os.path.join({sys.prefix!r}, 'outside'), 'w')",
        f"open({json.__file__!r}, 'a')",
    )
    assert set(results) <= {"EACCES", "EPERM", "EROFS", "ENOENT", "EXDEV"}, results
    assert [p.name for p in tmp_path.iterdir()] == ["secret"] and secret.read_text() == "kept"
    assert secret.stat().st_mode & 0o777 == 0o666


def test_no_sockets(confinement: str) -> None:
    results = attempts(
        confinement,
        "socket.socket()",
        "socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)",
        "socket.socket(socket.AF_UNIX)",
        "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",  # could be sent from to any path
        "socket.socketpair()[0].connect('/dev/log')",
        "call('syscall', 425, 8, ctypes.create_string_buffer(120))",  # io_uring_setup: a way round the filter
    )
    assert results == ["EPERM"] * 7


def test_no_privileged_calls(confinement: str) -> None:
    calls = ["unshare(0x10000000)", "unshare(0x20000)", "mount(0, b'/', 0, 0x5000, 0)", "ptrace(0, 0, 0, 0)"]
    calls += ["setns(0, 0)", "prctl(1, 0)", "fcntl(0, 8, 1)", "chroot(b'.')"]
    calls = [f"call({c.split('(')[0]!r}, {c.split('(', 1)[1]}" for c in calls]
    assert attempts(confinement, *calls, "os.setsid()", "os.getpgid(0) and os.setpgid(0, 0)")[:8] == ["EPERM"] * 8
    assert attempts(confinement, "os.setuid(0)", "call('syscall', 467, 0)")[1] == "ENOSYS"  # newer than the filter
    assert attempts(confinement, "os.setuid(0)")[0] in ("EPERM", "EINVAL") or os.geteuid() == 0


def test_no_signals_to_others(confinement: str) -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        results = attempts(
            confinement, f"os.kill({other.pid}, 9)", "os.kill(-1, 0)", "os.kill(0, 0)", "os.killpg(0, 0)"
        )
        assert other.poll() is None
        other.kill()
    assert results == ["EPERM"] * 4
    assert run(confinement, "import os; os.abort()").code != 0


def test_no_environment_no_descriptors(confinement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    program = """
import os, fcntl
names = set(os.environ) - {"LC_CTYPE"}  # the interpreter's own
fds = []
for fd in range(3, 200):
    try: fcntl.fcntl(fd, fcntl.F_GETFD); fds.append(fd)
    except OSError: pass
try: others = [n for n in os.listdir("/proc") if n.isdigit()]
except OSError: others = []
print(sorted(names), fds, others)"""
    assert printed(confinement, program) == f"{sorted(supervisor.ENVIRONMENT)} [] []"
    os.close(reader)
    os.close(writer)


def test_outputs_and_files_are_bounded(confinement: str) -> None:
    assert run(confinement, "print('x' * 2_000_000)").outcome == "output"
    many = "import os\nfor _ in range(100):\n  os.write(1, b'x' * 1_000_000)"
    result = run(confinement, many)
    assert result.code != 0 and len(result.stdout) <= 1 << 20
    assert attempts(confinement, "open('big', 'wb').write(bytes(20 << 20))") == ["EFBIG"]
    if confinement == "namespaces":
        program = "for i in range(10):\n  open(str(i), 'wb').write(bytes(10 << 20))"
        result = run(confinement, program)
        assert b"No space left on device" in result.stderr


def test_deep_and_locked_folders_are_removed(confinement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = """
import os
for i in range(1500):
    os.mkdir("d"); os.chdir("d")
os.umask(0)
os.mkdir("locked", 0o300); open("locked/file", "w").close()
print("made")"""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o711)  # nobody must reach what is in it
        monkeypatch.setattr("tempfile.tempdir", folder)
        assert printed(confinement, program) == "made"
        assert os.listdir(folder) == []


def test_the_program_dies_with_its_caller(confinement: str) -> None:
    """The caller is killed without warning while its program spins for up to 20 s of CPU time."""
    code = f"""
import sys
sys.path[:] = {sys.path!r}
from remax_megatron.rewards.sandbox.api import run_python
from remax_megatron.rewards.sandbox.limits import Limits
print("ready", flush=True)
run_python("import time\\nend = time.time() + 20\\nwhile time.time() < end: pass",
           limits=Limits(wall_s=20), confinement={confinement!r})
"""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o711)  # nobody must reach what is in it
        environment = os.environ | {"TMPDIR": folder}
        caller = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment)
        try:
            assert caller.stdout is not None and caller.stdout.readline() == b"ready\n"
            end = time.monotonic() + 10
            while not (family := [p for p in descendants(caller.pid) if b"main.py" in command(p)]):
                assert time.monotonic() < end, "the program did not start"
                time.sleep(0.02)
        finally:
            caller.kill()
            caller.wait()
            caller.stdout.close()
        end = time.monotonic() + 5
        while any(b"main.py" in command(p) for p in family):
            assert time.monotonic() < end, "the program outlived its caller"
            time.sleep(0.02)


def descendants(pid: int) -> list[int]:
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            found += map(int, path.read_text().split())
    return found + [q for p in found for q in descendants(p)]


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_another_abi_is_killed(confinement: str) -> None:
    """int 0x80 reaches the 32-bit numbers of x86, among them socket under another number."""
    if platform.machine() != "x86_64":
        pytest.skip("int 0x80 is x86's")
    program = """
import ctypes, mmap
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(b"\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3")  # mov eax, 20 (getpid); int 0x80; ret
address = ctypes.addressof(ctypes.c_char.from_buffer(page))
print(ctypes.CFUNCTYPE(ctypes.c_int)(address)())"""
    result = run(confinement, program)
    assert result.code != 0 and result.stdout == b""


def test_protections_are_told_and_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    protections = available_protections()
    assert protections.separate_uid == (os.geteuid() == 0)
    none = Protections(
        None, False, 0, False, "namespaces: unshare: not permitted; landlock: Landlock ABI 0, 3 is needed"
    )
    monkeypatch.setattr(api, "available_protections", lambda: none)
    with pytest.raises(
        RewardError, match=r"cannot be confined on this machine: namespaces: unshare.*; landlock: .* ABI 0"
    ):
        api.run_python("print(1)")
    with pytest.raises(RewardError, match="cannot be confined"):
        score("print(1)", json.dumps({"inputs": [""], "outputs": ["1"]}))


def test_failure_of_a_layer_is_an_error_not_a_result(monkeypatch: pytest.MonkeyPatch, confinement: str) -> None:
    def broken(pid: int) -> None:
        raise OSError(22, "prctl: Invalid argument")

    monkeypatch.setattr(supervisor, "filter_syscalls", broken)
    with pytest.raises(SandboxError, match="prctl: Invalid argument"):
        run(confinement, "print(1)")


# ---- The scorer ------------------------------------------------------------------------------------------------------


@pytest.fixture
def protected() -> None:
    if (protections := available_protections()).confinement is None:
        pytest.skip(f"no confinement on this machine: {protections.missing}")


def pairs(*cases: tuple[str, str]) -> str:
    return json.dumps({"inputs": [a for a, _ in cases], "outputs": [b for _, b in cases]})


ADD = "Like this:\n```python\na, b = map(int, input().split())\nprint(a + b)\n```\nDone."
SUMS = pairs(("1 2\n", "3\n"), ("5 5\n", "10"))


@pytest.mark.parametrize(
    ("solution", "truth", "passed"),
    [
        (ADD, SUMS, 1.0),
        (ADD, pairs(("1 2", "3  \n\n"), ("1 1", "3")), 0.5),
        ("```python\nprint('wrong')\n```\nno:\n```python\nprint(sum(map(int, input().split())))\n```", SUMS, 1.0),
        ("print(sum(map(int, input().split())))", SUMS, 1.0),  # no block: the whole text
        ("print(3); exit(1)", pairs(("", "3")), 0.0),
        ("I do not know.", SUMS, 0.0),
        ("", SUMS, 0.0),
        ("def add(a, b): return a + b", json.dumps({"tests": "assert add(1, 2) == 3"}), 1.0),
        ("def add(a, b): return a - b", json.dumps({"tests": "assert add(1, 2) == 3"}), 0.0),
        ("import os; os._exit(0)", json.dumps({"tests": "assert False"}), 0.0),  # a good exit code is no proof
        ("raise SystemExit", json.dumps({"tests": "assert False"}), 0.0),
        ("def f(): return 1\nif __name__ == '__main__': input()", json.dumps({"tests": "assert f() == 1"}), 1.0),
        ("print('\ud800')", pairs(("", "")), 0.0),  # not UTF-8
    ],
)
def test_code_score(solution: str, truth: str, passed: float, protected: None) -> None:
    result = score(solution, truth)
    assert result == {"score": float(passed == 1.0), "passed": passed, "overrun": 0.0}


def test_extract_program() -> None:
    assert extract_program("a\n```py\nx\n```\n```python\ny\n") == "y\n"  # cut by the length limit
    assert extract_program("```\nplain\n```") == "```\nplain\n```"


@pytest.mark.parametrize(
    "truth", ["3", "{}", "not json", '{"inputs": [], "outputs": []}', '{"inputs": [1], "outputs": ["1"]}']
)
def test_ground_truth_of_another_form(truth: str) -> None:
    with pytest.raises(RewardError, match="the ground truth of a 'code' sample must be JSON"):
        score("print(1)", truth)


HOSTILE = {
    "forks": "import os\nfor _ in range(500):\n  try: os.fork() or os._exit(0)\n  except OSError: pass",
    "loop": "while True: pass",
    "memory": "x = bytearray(10 << 30)",
    "writing": "open('/tmp/../outside', 'w')",
    "socket": "import socket; socket.socket()",
    "environment": "import os; print(os.environ['HOME'])",
    "output": "print('x' * 3_000_000)",
    "background": "import subprocess; subprocess.Popen(['sleep', '5'])",
    "killing": "import os, signal; os.kill(os.getppid(), signal.SIGKILL); os.kill(-1, signal.SIGKILL)",
    "stack": "import ctypes; ctypes.string_at(0)",
}


def test_the_pool_goes_on(protected: None, tmp_path: Path) -> None:
    """Each hostile program scores 0 without an error of the pool, and the honest one after it scores 1."""
    scorer = tmp_path / "quick.py"  # the built-in scorer with a shorter deadline
    scorer.write_text(
        "import dataclasses\nfrom remax_megatron.rewards import code\n"
        "code.LIMITS = dataclasses.replace(code.LIMITS, wall_s=0.7)\n"
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    return code.score(solution_str, ground_truth)\n"
    )
    honest = ScoreRequest("code", ADD, SUMS)
    requests = [r for p in HOSTILE.values() for r in (ScoreRequest("code", p, pairs(("", "never"))), honest)]
    before = threading.active_count(), resource.getrlimit(resource.RLIMIT_AS)
    with RewardPool(1, 10.0, path=str(scorer), memory_gib=2.0) as pool:
        results = pool.score(requests)
        folder = Path(pool._folder)
        assert list(folder.iterdir()) == []
    assert [r.outcome for r in results] == ["ok"] * len(requests), [r.message for r in results if r.message]
    assert [r.score for r in results] == [0.0, 1.0] * len(HOSTILE)
    overrun = {name for name, r in zip(HOSTILE, results[::2], strict=True) if r.extra["overrun"]}
    assert overrun == {"loop", "output"}
    assert not folder.exists() and before == (threading.active_count(), resource.getrlimit(resource.RLIMIT_AS))


def test_a_pool_deadline_within_a_program(protected: None) -> None:
    """The worker is killed in the middle of a run; the program dies with it and leaves nothing behind."""
    spin = "import time\nend = time.time() + 20\nwhile time.time() < end: pass"
    programs: set[int] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            programs.update(pid for pid in descendants(os.getpid()) if b"main.py" in command(pid))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        with RewardPool(1, 1.0) as pool:
            folder = Path(pool._folder)
            results = pool.score([ScoreRequest("code", spin, SUMS), ScoreRequest("openai/gsm8k", "#### 1", "1")])
    finally:
        over.set()
        thread.join()
    assert [r.outcome for r in results] == ["timeout", "ok"] and not folder.exists()
    assert programs, "the program was never seen"
    end = time.monotonic() + 5
    while any(b"main.py" in command(pid) for pid in programs):
        assert time.monotonic() < end, "the program outlived its worker"
        time.sleep(0.02)
