"""Ranks that hang, freeze, die or fail: the others end within seconds, name the first to fail, show their stacks."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import ROOT

pytestmark = pytest.mark.ranks

PROGRESS_S, DEAD_S, POLL_S = 3.0, 3.0, 0.2
ENDS_WITHIN_S = 15  # a deadline, failure.LINGER_S, and the slowness of a shared machine


# -- what the ranks do, in processes of their own ----------------------------------------------------------------------


def stuck(rank: int, reached: Callable[[], None]) -> None:
    """Rank 1 never comes to the second collective."""
    import torch
    import torch.distributed as dist

    from remax_megatron.parallel import watchdog
    from remax_megatron.phases import PhaseTimer

    timer = PhaseTimer(around=(watchdog.phase,))
    with timer.phase("step"), timer.phase("update"):
        for number in range(3):
            watchdog.beat(f"micro-batch {number + 1} of 3")
            if rank == 1 and number == 1:
                oversleep()
            dist.all_reduce(torch.zeros(1))


def oversleep() -> None:
    time.sleep(60)


def rollout(rank: int, reached: Callable[[], None]) -> None:
    """Without a collective: nothing but the watchdog notices that a rank is gone."""
    from remax_megatron.parallel import watchdog

    with watchdog.phase("rollout"):
        watchdog.beat("prompt 7")
        reached()
        for _ in range(60):
            time.sleep(1)
            watchdog.beat("prompt 8")


def failing(rank: int, reached: Callable[[], None]) -> None:
    if rank == 1:
        time.sleep(0.5)
        raise ArithmeticError("no such number")
    rollout(rank, reached)


def locked(rank: int, reached: Callable[[], None]) -> None:
    """Rank 1 keeps Python's interpreter lock: not one of its threads runs."""
    from remax_megatron.parallel import watchdog

    with watchdog.phase("reward"):
        if rank == 1:
            time.sleep(3 * POLL_S)  # for the others to hear of the phase
            re.match(r"(a+)+$", "a" * 60 + "b")
    rollout(rank, reached)


def orderly(rank: int, reached: Callable[[], None]) -> None:
    """Work for longer than any deadline, with beats; rank 0's watchdog stops in the middle."""
    import torch.distributed as dist

    from remax_megatron.parallel import watchdog

    for number in range(20):
        with watchdog.phase("update"):
            watchdog.beat(f"micro-batch {number + 1} of 20")
            time.sleep(0.3)
        if rank == 0 and number == 10:
            watchdog.stop()
    dist.barrier()


def idle(rank: int, reached: Callable[[], None]) -> None:
    """Rank 1 waits for a call of rank 0, which is busy for longer than any deadline, and then hangs."""
    import torch
    import torch.distributed as dist

    from remax_megatron.parallel import watchdog

    if rank == 1:
        with watchdog.idle():
            dist.broadcast(torch.zeros(1), src=0)
    for number in range(20):
        with watchdog.phase("update"):
            watchdog.beat(f"micro-batch {number + 1} of 20")
            time.sleep(0.3)
    reached()
    with watchdog.phase("update"):
        oversleep()


def be_rank(rank: int, folder: Path, scenario: str) -> None:
    """What a forked process does; does not return."""
    import torch.distributed as dist

    from remax_megatron.parallel import watchdog
    from remax_megatron.parallel.failure import ends_all_ranks

    log = os.open(folder / f"log-{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["RANK"] = str(rank)
    dist.init_process_group("gloo")
    cleanup = (folder / f"cleaned-{rank}").touch
    with ends_all_ranks(cleanup):
        watchdog.start(PROGRESS_S, cleanup, dead_after_s=DEAD_S, poll_s=POLL_S)
        with watchdog.phase("prepare"):
            pass  # the start, with its patience, is over
        globals()[scenario](rank, (folder / f"reached-{rank}").touch)
        watchdog.stop()
    os._exit(0)


def launch(folder: Path, scenario: str, world_size: int) -> None:
    """Fork the ranks and note the exit code of each. One process imports torch for all."""
    import torch.distributed  # noqa: F401

    from remax_megatron.parallel import watchdog  # noqa: F401

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    rank_of = {}
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            be_rank(rank, folder, scenario)
        rank_of[pid] = rank
        note(folder / f"pid-{rank}", pid)
    while rank_of:
        pid, status = os.wait()
        note(folder / f"code-{rank_of.pop(pid)}", os.waitstatus_to_exitcode(status))


def note(path: Path, number: int) -> None:
    path.with_suffix(".tmp").write_text(str(number))
    path.with_suffix(".tmp").rename(path)


# -- the tests ---------------------------------------------------------------------------------------------------------


class Ranks:
    """Ranks of a scenario that were started, and what is known of them."""

    def __init__(self, folder: Path, scenario: str, world_size: int):
        self.folder, self.world_size = folder, world_size
        code = "import sys, pathlib, {} as t; t.launch(pathlib.Path(sys.argv[1]), sys.argv[2], {})"
        command = [sys.executable, "-c", code.format(__name__, world_size), str(folder), scenario]
        quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # as __main__.py sets it
        self.launcher = subprocess.Popen(command, cwd=ROOT, env=os.environ | quiet, start_new_session=True)

    def number(self, name: str, rank: int, timeout_s: float = ENDS_WITHIN_S) -> int:
        """What was noted under `name`-`rank`, waited for."""
        path = self.folder / f"{name}-{rank}"
        deadline = time.monotonic() + timeout_s
        while not path.exists():
            assert time.monotonic() < deadline, f"no {path.name} after {timeout_s} s; {self.outputs()}"
            time.sleep(0.05)
        return int(path.read_text() or 0)

    def outputs(self) -> list[str]:
        paths = [self.folder / f"log-{rank}" for rank in range(self.world_size)]
        return [path.read_text(errors="replace") if path.exists() else "" for path in paths]


@pytest.fixture
def ranks(tmp_path):
    """`ranks(scenario, world_size=2)`: start them; whatever is left of them is killed."""
    started = []

    def start(scenario: str, world_size: int = 2) -> Ranks:
        started.append(Ranks(tmp_path, scenario, world_size))
        return started[-1]

    yield start
    for run in started:
        os.killpg(run.launcher.pid, signal.SIGKILL)
        run.launcher.wait()


def test_a_rank_that_hangs_is_named_and_all_show_where_they_are(ranks):
    run = ranks("stuck")
    assert [run.number("code", rank, 30) for rank in (0, 1)] == [1, 1]
    for rank, output in enumerate(run.outputs()):
        assert re.search(r"ends because of rank 1 on node .* in phase update, micro-batch 2 of 3 \(no progr", output)
        assert f"[rank {rank}] watchdog: here phase update, micro-batch 2 of 3, for " in output
        assert "thread MainThread" in output and "in stuck" in output
        assert (run.folder / f"cleaned-{rank}").exists()
    waits, sleeps = run.outputs()
    assert "in oversleep" in sleeps and "in all_reduce" in waits


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL], ids=["frozen", "killed"])
def test_a_rank_without_a_sign_of_life_ends_the_others(ranks, how):
    run = ranks("rollout", 3)
    for rank in range(3):
        run.number("reached", rank, 30)
    time.sleep(3 * POLL_S)  # it has told the others where it is
    os.kill(run.number("pid", 1), how)
    assert [run.number("code", rank) for rank in (0, 2)] == [1, 1]
    for rank in (0, 2):
        output = run.outputs()[rank]
        assert re.search(r"ends because of rank 1 on node .* in phase rollout, prompt [78] \(no sign of life", output)
        assert f"[rank {rank}] watchdog: here phase rollout, prompt" in output and "in rollout" in output
    if how == signal.SIGSTOP:  # waking up, it finds that the run has ended
        os.kill(run.number("pid", 1), signal.SIGCONT)
        assert run.number("code", 1) == 1


def test_an_exception_ends_ranks_that_are_busy(ranks):
    run = ranks("failing")
    assert [run.number("code", rank, 30) for rank in (0, 1)] == [1, 1]
    busy, failed = run.outputs()
    assert "first to fail: rank 1 (ArithmeticError: no such number)" in failed and "Traceback" in failed
    assert "watchdog:" not in failed
    assert "ends because of rank 1 (ArithmeticError: no such number), the first to fail" in busy
    assert (run.folder / "cleaned-0").exists() and (run.folder / "cleaned-1").exists()


def test_a_rank_that_keeps_the_interpreter_locked_shows_its_stack(ranks):
    run = ranks("locked")
    assert [run.number("code", rank, 30) for rank in (0, 1)] == [1, 1]
    other, holder = run.outputs()
    assert "ends because of rank 1" in other and "no sign of life" in other
    assert "Timeout" in holder and "in locked" in holder  # faulthandler's


def test_an_orderly_run_hears_nothing_of_its_watchdogs(ranks):
    run = ranks("orderly")
    assert [run.number("code", rank, 40) for rank in (0, 1)] == [0, 0]
    assert run.outputs() == ["", ""]


def test_an_idle_rank_waits_as_long_as_the_others_work(ranks):
    run = ranks("idle")
    run.number("reached", 0, 40)  # the idle one has outlasted twice PROGRESS_S
    assert [run.number("code", rank, 30) for rank in (0, 1)] == [1, 1]
    for output in run.outputs():
        assert re.search(r"ends because of rank 0 on node .* in phase update \(no progress", output)


def test_without_a_watchdog_beats_do_nothing():
    from remax_megatron.parallel import watchdog

    with watchdog.phase("update"):
        watchdog.beat("micro-batch 1 of 1")
    watchdog.stop()
