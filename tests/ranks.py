"""Real ranks for tests: processes with a gloo group, a bounded join, and the traceback of the first to fail.

One launcher process imports what the ranks need and forks them, so that the imports are paid for, and their memory is
taken, once for all ranks. Forking is safe there: the launcher has a single thread and no process group.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests import ROOT


def run_ranks(
    function: str,
    world_size: int,
    payload: Any = None,
    timeout_s: float = 240,
    preload: Sequence[str] = ("remax_megatron.policy.policy",),
) -> list[Any]:
    """Call `function` ("tests.module:name") with `payload` on `world_size` ranks; returns the results in rank order.

    `preload` names modules that are imported before the ranks part, beside the function's own.
    AssertionError with the output of the first failing rank, or when the ranks are not done after `timeout_s`. Whatever
    processes the ranks started are gone afterwards.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "task").write_bytes(pickle.dumps((function, payload, world_size, preload)))
        with open(folder / "log-launcher", "wb") as log:
            launcher = subprocess.Popen(
                [sys.executable, "-m", "tests.ranks", name],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            in_time = _ends(launcher.pid, timeout_s)
        finally:
            os.killpg(launcher.pid, signal.SIGKILL)  # the launcher is not reaped yet, so the number is still its own
            launcher.wait()
        if launcher.returncode == 0:
            return [pickle.loads((folder / f"out-{rank}").read_bytes()) for rank in range(world_size)]
        failed = folder / "failed"
        who = failed.read_text() if failed.exists() else "launcher"
        what = ""
        hung = [f"rank-{rank}" for rank in range(world_size) if not (folder / f"out-{rank}").exists()]
        if hung and not in_time:
            who, what = hung[0], f"{', '.join(hung)} did not finish in {timeout_s} s; "
        log_file = folder / f"log-{who}"
        output = log_file.read_text(errors="replace") if log_file.exists() else ""
        raise AssertionError(f"{what}{who} of {function} failed:\n{output[-6000:]}")


def _ends(pid: int, timeout_s: float) -> bool:
    """Wait for a child process without reaping it; False when it is still there after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def free_port() -> int:
    """A port that nothing listens at, below those that the system hands out: between the look and its use no
    connection of another test can take it."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _launch(folder: Path) -> None:
    """Fork the ranks and wait for them; at the first failure, note the rank in the file `failed` and exit."""
    function, payload, world_size, preload = pickle.loads((folder / "task").read_bytes())
    module, name = function.split(":")
    if os.environ.get("REMAX_TEST_LAYERS") == "transformer_engine":  # see tests/small_models.py
        importlib.import_module("tests.stand_ins.te_cpu.installed")
    for needed in preload:
        importlib.import_module(needed)
    call = getattr(importlib.import_module(module), name)
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"{len(threads)} threads after importing {module} and {preload}: forking is not safe"
    port = free_port()
    gc.collect()
    gc.freeze()  # a collection in a rank would otherwise touch, and so copy, all shared memory
    rank_of = {}
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            _be_rank(rank, world_size, port, folder, call, payload)
        rank_of[pid] = rank
    while rank_of:
        pid, status = os.wait()
        if status != 0:
            (folder / "failed").write_text(f"rank-{rank_of[pid]}")
            if os.WIFSIGNALED(status):
                with open(folder / f"log-rank-{rank_of[pid]}", "a") as log:
                    log.write(f"ended by signal {os.WTERMSIG(status)}\n")
            sys.exit(1)
        del rank_of[pid]


def _be_rank(rank: int, world_size: int, port: int, folder: Path, call: Any, payload: Any) -> None:
    """What a forked process does; does not return."""
    code = 1
    try:
        with open(folder / f"log-rank-{rank}", "wb") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        result = pickle.dumps(call(payload))
        (folder / f"out-{rank}").write_bytes(result)
        code = 0
    except BaseException:  # the launcher's code must not go on in a rank
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _launch(Path(sys.argv[1]))
