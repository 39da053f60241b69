"""The most memory that this process, and its GPU, took between two looks: the probe of a PhaseTimer.

On a CPU `peak` is resident memory, mapped files included. On a GPU `peak` is that of torch's allocator, as a ledger
counts it: tensors, vLLM's while it is awake included, without CUDA contexts, NCCL's buffers and what is cached free;
`device_peak` is the most that all processes on the device were seen to take at the beginning or the end of a phase.
Nothing here waits for the device, and nothing is asked per micro-batch. Linux only (/proc).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from remax_megatron.gauges import resident_bytes
from remax_megatron.phases import Probe

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): resets the peak of resident memory, VmHWM, to what is resident now


def memory_probe(device: torch.device, unmapped_bytes: Callable[[], int] = lambda: 0) -> Probe:
    """The probe for a run on `device`; `unmapped_bytes` see `DeviceProbe`."""
    return DeviceProbe(device, unmapped_bytes) if device.type == "cuda" else HostProbe()


class HostProbe:
    """The peak of resident memory between two calls: the kernel's own, which each call starts anew.

    Where the kernel does not permit that (a /proc that is mounted read-only), the larger of what was resident at the
    two calls.
    """

    def __init__(self, clear_refs: Path = _CLEAR) -> None:
        self._clear_refs = clear_refs
        self._counts = self._reset()
        self._before = resident_bytes("self")

    def __call__(self) -> dict[str, int]:
        now = resident_bytes("self")
        peak = max(self._before, now)
        if self._counts:
            peak = max(peak, _peak_resident_bytes())
            self._reset()
        self._before = now
        return {"peak": peak}

    def _reset(self) -> bool:
        try:
            self._clear_refs.write_text(_RESET_PEAK)
        except OSError:
            return False
        return True


class DeviceProbe:
    """The peak of torch's allocator between two calls, and the larger of what the device had in use at them.

    `unmapped_bytes` is what the allocator counts although it is on no device: vLLM's pool while the engine sleeps.
    Where the engine wakes or falls asleep between two calls all of it counts, as if it had been awake throughout.
    """

    def __init__(self, device: torch.device, unmapped_bytes: Callable[[], int]) -> None:
        self._device, self._unmapped_bytes = device, unmapped_bytes
        self._used, self._unmapped = self._used_bytes(), unmapped_bytes()
        torch.cuda.reset_peak_memory_stats(device)

    def __call__(self) -> dict[str, int]:
        used, unmapped = self._used_bytes(), self._unmapped_bytes()
        peak = torch.cuda.max_memory_allocated(self._device) - min(unmapped, self._unmapped)
        device_peak = max(used, self._used)
        self._used, self._unmapped = used, unmapped
        torch.cuda.reset_peak_memory_stats(self._device)
        return {"peak": peak, "device_peak": device_peak}

    def _used_bytes(self) -> int:
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free


def _peak_resident_bytes() -> int:
    (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
