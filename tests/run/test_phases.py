"""The timer of a step's phases: seconds and peaks by hand, what goes around, and where an exception came from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from remax_megatron.phases import PhaseTimer

GIB = 2**30


def test_seconds_add_up_and_nest() -> None:
    ticks = iter([0.0, 1.0, 3.0, 10.0, 14.0, 20.0])  # step 0 .. 20: rollout 1 .. 3, and 10 .. 14
    timer = PhaseTimer(clock=lambda: next(ticks))
    with timer.step(7):
        with timer.phase("rollout"):
            pass
        with pytest.raises(RuntimeError), timer.phase("rollout"):
            raise RuntimeError
    assert timer.pop() == {"time/rollout_s": 6.0, "time/step_s": 20.0}
    assert timer.pop() == {}


class Mark:
    """An event of a device whose clock shows `milliseconds`."""

    def __init__(self, milliseconds: float) -> None:
        self.milliseconds, self.reached = milliseconds, False

    def synchronize(self) -> None:
        self.reached = True

    def elapsed_time(self, later: Mark) -> float:
        assert later.reached
        return later.milliseconds - self.milliseconds


def test_of_queued_work_the_devices_seconds_count() -> None:
    ticks, marks = iter([0.0, 0.001, 0.002, 5.0]), iter([Mark(100.0), Mark(2600.0)])
    timer = PhaseTimer(clock=lambda: next(ticks), event=lambda: next(marks))
    with timer.phase("update"), timer.phase("restore", queued=True):
        pass  # a millisecond to queue copies that take 2.5 s
    assert timer.pop() == {"time/restore_s": 2.5, "time/update_s": 5.0}
    ticks = iter([1.0, 4.0])
    with timer.phase("update"):
        pass
    assert timer.pop() == {"time/update_s": 3.0}
    timer = PhaseTimer(clock=iter([1.0, 4.0]).__next__)  # without a device's clock
    with timer.phase("restore", queued=True):
        pass
    assert timer.pop() == {"time/restore_s": 3.0}


def test_a_peak_counts_in_every_phase_around_it_and_in_no_other() -> None:
    # GiB at most between two looks; the first is what was before the step.
    peaks = iter([99, 3, 5, 4, 8, 2, 6, 1])
    timer = PhaseTimer(probe=lambda: {"peak": next(peaks) * GIB})
    with timer.step(1):  # 99
        with timer.phase("rollout"):  # 3
            pass  # 5
        with timer.phase("update"):  # 4
            with timer.phase("score"):  # 8
                pass  # 2
            pass  # 6
        pass  # 1
    assert timer.pop_peaks() == {
        "memory/rollout_peak_gib": 5.0,
        "memory/score_peak_gib": 2.0,
        "memory/update_peak_gib": 8.0,  # before its inner phase began
        "memory/step_peak_gib": 8.0,
    }
    assert timer.pop_peaks() == {}


def test_a_phase_entered_twice_keeps_its_highest_peak_of_each_kind() -> None:
    peaks = iter([{"peak": 0}] + [{"peak": 2 * GIB, "device_peak": 7 * GIB}, {"peak": 0}, {"peak": GIB}])
    timer = PhaseTimer(probe=lambda: next(peaks))
    for _ in range(2):
        with timer.phase("score"):
            pass
    assert timer.pop_peaks() == {"memory/score_peak_gib": 2.0, "memory/score_device_peak_gib": 7.0}


def test_what_goes_around_is_entered_in_order_and_left_on_errors_too() -> None:
    seen: list[str] = []

    def noting(prefix: str):
        @contextmanager
        def around(what: object) -> Iterator[None]:
            seen.append(f"{prefix} {what}")
            try:
                yield
            finally:
                seen.append(f"end of {prefix} {what}")

        return around

    timer = PhaseTimer(around=(noting("a"), noting("b")), around_step=noting("number"))
    with pytest.raises(ValueError), timer.step(3):
        raise ValueError
    assert seen == ["number 3", "a step", "b step", "end of b step", "end of a step", "end of number 3"]


def test_the_innermost_phase_that_an_exception_came_through_is_known() -> None:
    timer = PhaseTimer()
    with pytest.raises(MemoryError), timer.step(1), timer.phase("update"), timer.phase("score"):
        raise MemoryError
    assert timer.failed_in == "score"
    with pytest.raises(MemoryError), timer.step(2):
        with timer.phase("rollout"):
            pass
        raise MemoryError
    assert timer.failed_in == "step"


def test_nothing_is_measured_on_the_way_out_of_an_error() -> None:
    """After an error of the device every further call to it fails too, and would hide the first."""
    looks = []
    timer = PhaseTimer(probe=lambda: looks.append(1) or {})
    with pytest.raises(RuntimeError), timer.step(1), timer.phase("update"):
        raise RuntimeError
    assert len(looks) == 2  # where both began
