"""What every benchmark prints: where it ran, and one last line `RESULT name=value ...`."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_SECONDS = 0.02


def machine() -> dict[str, object]:
    """Processor, memory, versions and commit of this run."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_gib, 1),
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
    }


def finish(result: dict[str, float], details: dict[str, object], json_file: str | None) -> None:
    """Print the RESULT line; write it with all details to `json_file`."""
    if json_file:
        Path(json_file).write_text(json.dumps({"result": result} | details, indent=1) + "\n")
    print("RESULT", " ".join(f"{name}={_number(value)}" for name, value in result.items()), flush=True)


def _number(value: float) -> str:
    """Three decimals, or 7.1e-07 where they would say 0.000 of a number that is not 0."""
    return f"{value:.1e}" if 0 < abs(value) < 0.0005 else f"{value:.3f}"


@dataclass(frozen=True)
class Usage:
    """A finished process: wall time in seconds, largest resident and largest anonymous memory in GiB."""

    seconds: float
    peak_gib: float
    peak_anon_gib: float
    output: str


def measured(command: list[str], timeout_s: float = 3600) -> Usage:
    """Run `command` to its end and watch its memory. RuntimeError with its output when it fails."""
    peaks = {"VmHWM": 0, "RssAnon": 0}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:  # pipes would fill and block
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=errors, text=True)
        seconds = _watch(process, peaks, started + timeout_s) - started
        out.seek(0)
        errors.seek(0)
        output, said = out.read(), errors.read()
    if process.returncode != 0:
        raise RuntimeError(f"exit code {process.returncode}: {' '.join(command)}\n{output}{said[-4000:]}")
    return Usage(seconds, peaks["VmHWM"] / 2**20, peaks["RssAnon"] / 2**20, output)


def _watch(process: subprocess.Popen, peaks: dict[str, int], deadline: float) -> float:
    """Note the largest memory of `process` until it ends; returns when that was. Killed at the deadline."""
    try:
        while process.poll() is None:
            if time.perf_counter() > deadline:
                break
            try:
                for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                    name, _, value = line.partition(":")
                    if name in peaks:
                        peaks[name] = max(peaks[name], int(value.split()[0]))
            except (FileNotFoundError, ProcessLookupError):
                pass
            time.sleep(SAMPLE_SECONDS)
        return time.perf_counter()
    finally:
        process.kill()
        process.wait()
