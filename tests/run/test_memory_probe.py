"""Peaks of memory between two looks: of this process against memory it just took, of a GPU against given counters."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from remax_megatron.memory_probe import DeviceProbe, HostProbe, memory_probe

NUM_BYTES = 128 * 2**20
GIB = 2**30


def take_and_give_back() -> None:
    with mmap.mmap(-1, NUM_BYTES) as block:  # fresh pages, whatever the allocator keeps
        for page in range(0, NUM_BYTES, mmap.PAGESIZE):
            block[page] = 1


def test_memory_that_was_given_back_before_the_look_is_seen_once() -> None:
    probe = memory_probe(torch.device("cpu"), lambda: 0)
    before = probe()["peak"]
    take_and_give_back()
    assert probe()["peak"] - before == pytest.approx(NUM_BYTES, rel=0.2)
    assert probe()["peak"] - before < NUM_BYTES / 4


def test_without_leave_to_reset_the_kernels_peak_what_is_there_at_the_looks_counts(tmp_path: Path) -> None:
    probe = HostProbe(clear_refs=tmp_path / "missing" / "clear_refs")
    before = probe()["peak"]
    take_and_give_back()
    assert probe()["peak"] - before < NUM_BYTES / 4
    with mmap.mmap(-1, NUM_BYTES) as block:
        for page in range(0, NUM_BYTES, mmap.PAGESIZE):
            block[page] = 1
        assert probe()["peak"] - before == pytest.approx(NUM_BYTES, rel=0.2)
    assert probe()["peak"] - before == pytest.approx(NUM_BYTES, rel=0.2)  # it was there at this one's beginning
    assert probe()["peak"] - before < NUM_BYTES / 4


class Card:
    """The counters of a GPU, in GiB: what the allocator had at most, what is in use, what vLLM has unmapped."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.peak, self.used, self.unmapped, self.resets = 0, 10, 0, 0
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak * GIB)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((80 - self.used) * GIB, 80 * GIB))
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)

    def reset(self, device: torch.device) -> None:
        self.resets += 1


def test_the_peak_on_a_gpu_is_the_allocators_without_what_sleep_unmapped(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch)
    probe = DeviceProbe(torch.device("cuda"), lambda: card.unmapped * GIB)
    # A rollout: an engine of 40 GiB is awake at its beginning and asleep at its end.
    card.used, card.peak, card.unmapped = 30, 60, 40
    assert probe() == {"peak": 60 * GIB, "device_peak": 30 * GIB}
    # An update: it sleeps throughout, though the allocator counts it.
    card.used, card.peak = 25, 70
    assert probe() == {"peak": 30 * GIB, "device_peak": 30 * GIB}
    # A sync: it wakes.
    card.used, card.peak, card.unmapped = 75, 65, 0
    assert probe() == {"peak": 65 * GIB, "device_peak": 75 * GIB}
    assert card.resets == 4
