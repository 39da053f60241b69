"""One command for one GPU: what was built without one, proven and measured, part by part, in under eight minutes.

    python -m benchmarks.gpu [--parts stack,parity,...] [--device cuda|cpu] [--tiny] [--limit PART=SECONDS ...]
                             [--total SECONDS] [--json FILE] [--work DIR]
    python -m benchmarks.gpu --write-docs FILE.json            docs/gpu.md, what was measured
    python -m benchmarks.gpu --write-counts PRESET.txt ...     docs/gpu.md, from outputs of gpu_counts.py

    stack   versions, card, attention backend, Transformer Engine or not
    parity  the policy against transformers in float32: log-probabilities and gradients, layers and backends
    head    log-probabilities from hidden states against Megatron-Core's cross entropy on full logits
    resume  a checkpoint saved and resumed: the losses after it
    update  0.5B, 1.5B and 3B, 16k packed tokens: local layers and Transformer Engine's, each recompute mode
    cycle   1.5B: sleep, wake, weights, canary, ten times: seconds, bandwidth, memory left behind
    demo    the demo preset, from the accuracy it starts with to the one it ends with
    step    1.5B: whole ReMax steps, and where their time goes

Each part is a process of its own with a time limit, so that one that crashes or hangs does not end the others; no part
starts after --total. A part prints its cases as they are done. FILE (gpu.json) is written after every part, and
docs/gpu.md is written from it. No network is used: models have random weights, made in --work. The demo's policy takes
80 s to warm-start, more than that part has time for: `python -m remax_megatron.demo.prepare` makes it ahead.

On a CPU, with --tiny, the same code runs with small sizes, and says of what needs a GPU that it is not available.
The RESULT line has the numbers that have a target (gpu_report.TARGETS), and how many were met.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # however this was started; the parts inherit both
sys.path.insert(0, str(Path(__file__).resolve().parents[0]))

from common import finish, machine
from gpu_parts import be_part
from gpu_report import result, target_lines, write_counts, write_docs

LIMITS_S = {  # in the order in which they run: what fails early explains what fails later
    "stack": 30.0,
    "parity": 60.0,
    "head": 25.0,
    "resume": 30.0,
    "update": 130.0,
    "cycle": 90.0,
    "demo": 75.0,
    "step": 80.0,
}
TOTAL_S = 470.0
CPU_SLOWER = 4  # limits there are so many times as long: its cores may be few and busy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(LIMITS_S), help="names with commas; default: all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU computes in seconds")
    parser.add_argument("--limit", action="append", default=[], metavar="PART=SECONDS", help="another time limit")
    parser.add_argument("--total", type=float, metavar="SECONDS", help=f"of all parts together; default: {TOTAL_S}")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), metavar="FILE")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where models are made; default: a temporary folder")
    parser.add_argument("--write-docs", type=Path, metavar="FILE", help="write docs/gpu.md from this JSON; run nothing")
    parser.add_argument("--write-counts", type=Path, nargs="+", default=[], metavar="FILE", help="likewise, the counts")
    options = parser.parse_args()
    if options.write_docs or options.write_counts:
        if options.write_docs:
            write_docs(json.loads(options.write_docs.read_text()))
        if options.write_counts:
            write_counts(options.write_counts)
        return
    if options.device == "cpu":
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
    slower = CPU_SLOWER if options.device == "cpu" else 1
    limits = {name: slower * seconds for name, seconds in LIMITS_S.items()}
    for text in options.limit:
        name, _, seconds = text.partition("=")
        if name not in limits or not seconds.replace(".", "", 1).isdigit():
            parser.error(f"--limit {text}: expected PART=SECONDS with a part of {', '.join(LIMITS_S)}")
        limits[name] = float(seconds)
    names = options.parts.split(",")
    if unknown := sorted(set(names) - set(limits)):
        parser.error(f"--parts {options.parts}: {', '.join(unknown)} unknown; set some of {', '.join(LIMITS_S)}")
    details: dict[str, Any] = {"machine": machine(), "device": options.device, "tiny": options.tiny, "parts": {}}
    print(f"machine: {details['machine']}", flush=True)
    deadline = time.monotonic() + (options.total or slower * TOTAL_S)
    with tempfile.TemporaryDirectory(prefix="remax-gpu-", dir=options.work) as work:
        for name in sorted(names, key=list(LIMITS_S).index):
            left = deadline - time.monotonic()
            part = _run_part(name, min(limits[name], left), options, Path(work))
            details["parts"][name] = part
            options.json.write_text(json.dumps(details, indent=1) + "\n")
            print(f"{name}: {part['outcome']}, {len(part['cases'])} cases, {part['seconds']:.1f} s", flush=True)
    print("\n".join(target_lines(details)))
    finish(result(details), details, str(options.json))


def _run_part(name: str, limit_s: float, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Run a part in a process of its own, ended after `limit_s`: its outcome, seconds, and the cases it recorded."""
    print(f"{name}:", flush=True)
    if limit_s <= 0:
        return {"outcome": "not started: no time was left", "seconds": 0.0, "cases": []}
    record, errors = work / f"{name}.jsonl", work / f"{name}.err"
    # On a CPU all parts fork from one process that has imported what they need; CUDA does not survive a fork.
    context = multiprocessing.get_context("spawn" if options.device == "cuda" else "forkserver")
    if isinstance(context, ForkServerContext):
        context.set_forkserver_preload(["gpu_parts.part", "remax_megatron.policy.policy"])
    arguments = (name, options.device, options.tiny, work, record, errors)
    process = context.Process(target=be_part, args=arguments)
    started = time.monotonic()
    process.start()
    assert process.pid is not None
    process.join(limit_s)
    outcome = "done" if process.exitcode == 0 else f"ended with exit code {process.exitcode}"
    if process.exitcode is None:
        outcome = f"stopped at its limit of {limit_s:.0f} s"
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # and whatever it has started
    process.kill()
    process.join()
    part = {"outcome": outcome, "seconds": time.monotonic() - started}
    part["cases"] = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    if outcome != "done" and errors.exists():
        part["errors"] = errors.read_text()[-4000:]
        print(part["errors"], flush=True)
    return part


if __name__ == "__main__":
    main()
