"""Names and marks of phases on a device's timeline, and torch profiler traces of single steps.

`trainer.profile_steps=[3,4]` writes `default_local_dir/profile/step-3/rank-0.json.gz` for these steps and every rank,
to be opened in https://ui.perfetto.dev or chrome://tracing. A trace covers a step's rollout, reward, update and sync,
not validation and saving; what the profiler costs is in that step's `time/*`, writing the file is not. On a GPU each
phase is an NVTX range too, at all times, for Nsight Systems.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from remax_megatron.atomic import replacing


class StepProfiler:
    """Profiles the steps in `steps` on this rank, into `folder`/step-N/rank-R.json.gz."""

    def __init__(self, steps: Sequence[int], folder: str | Path, rank: int, device: torch.device) -> None:
        self._steps, self._folder, self._rank = frozenset(steps), Path(folder), rank
        self._activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")

    @contextmanager
    def around_step(self, number: int) -> Iterator[None]:
        """Record what runs in the block and write the trace, whole or not at all, when it ends well."""
        if number not in self._steps:
            yield
            return
        with profile(activities=self._activities) as recorded:
            yield
        with replacing(self._folder / f"step-{number}" / f"rank-{self._rank}.json.gz") as path:
            recorded.export_chrome_trace(str(path))  # the suffix .gz makes it compress


def cuda_event() -> torch.cuda.Event:
    """A mark behind what is queued on the current stream, with the device's time."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@contextmanager
def named_range(name: str, device: torch.device) -> Iterator[None]:
    """The block is `name` in a profiler's timeline, and on a GPU an NVTX range."""
    with record_function(name):
        if device.type != "cuda":
            yield
            return
        with torch.cuda.nvtx.range(name):
            yield
