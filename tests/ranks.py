"""Real ranks for tests: processes with a gloo group, a bounded join, and the traceback of the first to fail."""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def run_ranks(function: str, world_size: int, payload: Any = None, timeout_s: float = 240) -> list[Any]:
    """Call `function` ("tests.module:name") with `payload` on `world_size` ranks; returns the results in rank order.

    AssertionError with the output of the first failing rank, or when the ranks are not done after `timeout_s`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "task"
        task.write_bytes(pickle.dumps((function, payload)))
        processes = []
        for rank in range(world_size):
            environment = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            }
            log = open(Path(folder) / f"log-{rank}", "wb")  # noqa: SIM115
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.ranks", str(task), f"{folder}/out-{rank}"],
                    cwd=ROOT,
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
        deadline = time.monotonic() + timeout_s
        failed = None
        while failed is None and any(p.poll() is None for p in processes) and time.monotonic() < deadline:
            failed = next((r for r, p in enumerate(processes) if p.poll() not in (None, 0)), None)
            time.sleep(0.05)
        hung = [r for r, p in enumerate(processes) if p.poll() is None]
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if failed is None:
            failed = next((r for r, p in enumerate(processes) if p.returncode != 0), None)
        if failed is not None:
            output = (Path(folder) / f"log-{failed}").read_text(errors="replace")
            what = f"ranks {hung} did not finish in {timeout_s} s; " if hung else ""
            raise AssertionError(f"{what}rank {failed} of {function} failed:\n{output[-6000:]}")
        return [pickle.loads((Path(folder) / f"out-{rank}").read_bytes()) for rank in range(world_size)]


def _main(task: str, out: str) -> None:
    function, payload = pickle.loads(Path(task).read_bytes())
    module, name = function.split(":")
    result = getattr(importlib.import_module(module), name)(payload)
    Path(out).write_bytes(pickle.dumps(result))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    _main(*sys.argv[1:])
