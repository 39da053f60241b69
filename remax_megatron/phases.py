"""Seconds and peak memory of the phases of a step: `with timer.phase("update"): ...`.

Phases nest: `step` is around `rollout`, `reward`, `update` and `sync`, and `score` is inside `update`; `save` and
`validation` come after the step. Each counts its own whole time, and its peak is the highest of all that is in it. All
ranks enter the same phases. What else goes around a phase (the watchdog, ranges of a profiler) is given as a context
manager; what memory is, is memory_probe.py's to know.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol


class Event(Protocol):
    """A mark in the work that is queued on a device, as torch.cuda.Event."""

    def synchronize(self) -> None:
        """Wait until the device has reached this mark."""

    def elapsed_time(self, later: Any) -> float:
        """Milliseconds from this mark to `later`."""


# -> what memory took at most since the last call, bytes by kind; and the count starts again
Probe = Callable[[], Mapping[str, int]]
_GIB = 2**30


@dataclass
class _Open:
    """A phase that is being timed: its name and the peaks seen in it so far."""

    name: str
    peaks: dict[str, int] = field(default_factory=dict)


class PhaseTimer:
    """A phase entered more than once adds up its time and keeps its highest peak. A phase that raises is counted too.
    Device work that is still queued is not waited for; a phase that only queues work says `queued`, and its seconds are
    then the device's, if `event` can mark them.

    `around` are called with a phase's name, `around_step` with a step's number; what they give is held meanwhile.
    `probe` is asked where a phase begins or ends, and nowhere else. `failed_in` is the innermost phase that the last
    exception came through, "" without one.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        around: tuple[Callable[[str], AbstractContextManager[object]], ...] = (),
        around_step: Callable[[int], AbstractContextManager[object]] = nullcontext,
        probe: Probe = dict,
        event: Callable[[], Event] | None = None,
    ) -> None:
        self._clock, self._around, self._around_step, self.probe = clock, around, around_step, probe
        self._event = event
        self._seconds: dict[str, float] = {}
        self._peaks: dict[str, dict[str, int]] = {}
        self._open: list[_Open] = []
        self._queued: list[tuple[str, Event, Event]] = []
        self.failed_in = ""

    @contextmanager
    def phase(self, name: str, queued: bool = False) -> Iterator[None]:
        """Time what runs in the block; `queued`: it only queues work on the device, whose seconds count."""
        self._look()
        self._open.append(_Open(name))
        self.failed_in = ""
        event = self._event if queued else None
        begin, start = event and event(), self._clock()
        try:
            with ExitStack() as stack:
                for around in self._around:
                    stack.enter_context(around(name))
                yield
        except BaseException:
            self.failed_in = self.failed_in or name
            raise
        else:
            if event is not None and begin is not None:
                self._queued.append((name, begin, event()))
            self._look()
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + (self._clock() - start) * (begin is None)
            _raise_to(self._peaks.setdefault(name, {}), self._open.pop().peaks)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """The phase `step`, which has a number."""
        with self._around_step(number), self.phase("step"):
            yield

    def _look(self) -> None:
        """What memory took since the last look counts in all phases that are open."""
        peaks = self.probe()
        for phase in self._open:
            _raise_to(phase.peaks, peaks)

    def pop(self) -> dict[str, float]:
        """{"time/rollout_s": seconds, ...} since the last call, and starts again from nothing."""
        for name, begin, end in self._queued:
            end.synchronize()
            self._seconds[name] += begin.elapsed_time(end) / 1000
        self._queued = []
        seconds, self._seconds = self._seconds, {}
        return {f"time/{name}_s": value for name, value in seconds.items()}

    def pop_peaks(self) -> dict[str, float]:
        """{"memory/rollout_peak_gib": GiB, ...} of this rank since the last call, and starts again from nothing."""
        peaks, self._peaks = self._peaks, {}
        return {
            f"memory/{name}_{kind}_gib": value / _GIB for name, found in peaks.items() for kind, value in found.items()
        }


def _raise_to(peaks: dict[str, int], others: Mapping[str, int]) -> None:
    for kind, value in others.items():
        peaks[kind] = max(peaks.get(kind, 0), value)
