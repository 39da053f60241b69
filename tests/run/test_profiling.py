"""Traces of single steps: which files, and the names of phases in them."""

from __future__ import annotations

import gzip
import json
from functools import partial
from pathlib import Path

import pytest
import torch

from remax_megatron.phases import PhaseTimer
from remax_megatron.profiling import StepProfiler, named_range

CPU = torch.device("cpu")


def names_in(trace: Path) -> list[str]:
    """Names of the events of a Chrome trace."""
    return [event["name"] for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]


def steps(folder: Path, *numbers: int, fails_in: int | None = None) -> None:
    profiler = StepProfiler(numbers, folder, 5, CPU)
    timer = PhaseTimer(around=(partial(named_range, device=CPU),), around_step=profiler.around_step)
    for number in range(1, 4):
        with timer.step(number), timer.phase("update"):
            torch.ones(8, 8) @ torch.ones(8, 8)
            if number == fails_in:
                raise ArithmeticError


def test_the_named_steps_are_written_with_their_phases(tmp_path: Path) -> None:
    steps(tmp_path, 2, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-2", "step-3"]
    (trace,) = (tmp_path / "step-2").iterdir()
    assert trace.name == "rank-5.json.gz"
    names = names_in(trace)
    assert names.count("step") == names.count("update") == 1 and "aten::mm" in names


def test_a_step_that_fails_leaves_no_trace(tmp_path: Path) -> None:
    with pytest.raises(ArithmeticError):
        steps(tmp_path, 1, 2, fails_in=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_on_a_gpu_a_phase_is_an_nvtx_range(monkeypatch: pytest.MonkeyPatch) -> None:
    ranges: list[str] = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", ranges.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: ranges.append("end"))
    with named_range("rollout", torch.device("cuda")):
        assert ranges == ["rollout"]
    assert ranges == ["rollout", "end"]
