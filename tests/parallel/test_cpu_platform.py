"""The clean-up of vLLM's shared memory on CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from remax_megatron.parallel import cpu_platform


def dead_pid() -> int:
    """The number of a process that has ended and been waited for."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert not os.path.exists(f"/proc/{process.pid}")
    return process.pid


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc, as vLLM's CPU worker does")
def test_segments_of_dead_runs_go_and_all_others_stay(tmp_path: Path) -> None:
    dead, alive = dead_pid(), os.getpid()
    gone = {f"remax-{dead}-0a1b2c3d-cpushm-1-{i}" for i in range(2)}
    stay = {
        f"remax-{alive}-0a1b2c3d-cpushm-1-0",  # another run of this very process, say: its owner lives
        "remax-1-0a1b2c3d-cpushm-1-0",  # process 1 always lives
        f"other-{dead}-0a1b2c3d-cpushm-1-0",
        f"remax-{dead}-0a1b2c3d-notes",
        "remax-none-cpushm-1-0",
        "sem.something",
    }
    for name in gone | stay:
        (tmp_path / name).write_bytes(b"x")
    removed = cpu_platform.remove_dead_shared_memory(str(tmp_path))
    assert sorted(removed) == sorted(str(tmp_path / name) for name in gone)
    assert names(tmp_path) == stay
    assert cpu_platform.remove_dead_shared_memory(str(tmp_path)) == []
    assert cpu_platform.remove_dead_shared_memory(str(tmp_path / "none")) == []


def test_own_segments_go_and_those_of_other_runs_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = cpu_platform.new_run_id(), cpu_platform.new_run_id()
    assert mine != other and mine.startswith(f"remax-{os.getpid()}-")
    for name in (f"{mine}-cpushm-0", f"{mine}-cpushm-1", f"{other}-cpushm-0", f"{mine}0-cpushm-0"):
        (tmp_path / name).write_bytes(b"x")
    before = names(tmp_path)
    monkeypatch.setattr(cpu_platform, "_own_run_id", None)  # prepare_vllm has not been called: nothing is ours
    cpu_platform.remove_own_shared_memory(str(tmp_path))
    assert names(tmp_path) == before
    monkeypatch.setattr(cpu_platform, "_own_run_id", mine)
    for _ in range(2):  # any rank may call, after another one has
        cpu_platform.remove_own_shared_memory(str(tmp_path))
        assert names(tmp_path) == {f"{other}-cpushm-0", f"{mine}0-cpushm-0"}


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc, as vLLM's CPU worker does")
def test_a_segment_that_another_rank_removes_first_is_no_error(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / f"remax-{dead_pid()}-0a1b2c3d-cpushm-0").write_bytes(b"x")
    remove = os.remove

    def raced(path: str) -> None:
        remove(path)
        remove(path)

    monkeypatch.setattr(os, "remove", raced)
    assert cpu_platform.remove_dead_shared_memory(str(tmp_path)) == []
