"""Token-budget packing: our schedule, verl's, TRL's and first-fit decreasing as NeMo-RL describes it, side by side.

    python benchmarks/schedule.py [--json FILE] [--peers DIR | --no-peers]

--peers names a folder with benchmarks/peers/requirements-schedule.txt installed; it is made there when missing. 4096
rows, 8 data-parallel ranks, fixed seed; the cost of a row is 24576 l + l^2. The lengths are drawn, not read: GSM8K-like
(prompts of 106 tokens on average, log-normal answers with mean 249 cut at 1024), long answers (mean 3346, at most
8392), MATH-like (log-normal answers with median 450 cut at 3072) and heavy-tailed (Pareto, exponent 1.2, 200 to 8192).
Per schedule:

    over   micro-batches over the token budget
    M      micro-batches per rank, LB its lower bound ceil(sum / (8 * budget))
    bal    mean over max of the ranks' costs
    sync   the same within each micro-batch index: sum of the means over sum of the maxima
    fill   tokens over room
    ms     CPU time on one core, median of 5 (once more than 2 s is spent: of as many as there are)

The RESULT line is our worst of each; `ms_per_4096` over the cases with 4096 rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import ROOT, finish, machine

from remax_megatron.batching.schedule import RowCost, Schedule, schedule_by_tokens

DP, REPEATS, SEED = 8, 5, 0
COST = RowCost(linear=24576, quadratic=1)
PEER_SCRIPT = ROOT / "benchmarks/peers/schedule_peer.py"
PEER_PINS = ROOT / "benchmarks/peers/requirements-schedule.txt"


def gsm8k_like(draw: np.random.Generator, rows: int) -> np.ndarray:
    # The spread 0.38 is that of the real questions' lengths; sigma 0.62 leaves 1 % of the answers at 1024.
    question = 50 + draw.lognormal(np.log(56) - 0.38**2 / 2, 0.38, rows)
    return question + np.minimum(draw.lognormal(np.log(249) - 0.62**2 / 2, 0.62, rows), 1024)


def long_answers(draw: np.random.Generator, rows: int) -> np.ndarray:
    return np.clip(draw.lognormal(np.log(3346) - 0.5**2 / 2 + 0.017, 0.5, rows), 200, 8392)


def math_like(draw: np.random.Generator, rows: int) -> np.ndarray:
    return 50 + draw.lognormal(np.log(70), 0.6, rows) + np.minimum(draw.lognormal(np.log(450), 0.7, rows), 3072)


def heavy_tailed(draw: np.random.Generator, rows: int) -> np.ndarray:
    return np.minimum(200 * (1 + draw.pareto(1.2, rows)), 8192)


CASES: list[tuple[str, Callable[[np.random.Generator, int], np.ndarray], int, int]] = [
    ("GSM8K-like", gsm8k_like, 4096, 24000),
    ("long answers", long_answers, 4096, 24000),
    ("long answers", long_answers, 4096, 10240),
    ("GSM8K-like", gsm8k_like, 4096, 2048),
    ("MATH-like", math_like, 4096, 16384),
    ("MATH-like", math_like, 4096, 4096),
    ("heavy-tailed", heavy_tailed, 4096, 24000),
    ("MATH-like", math_like, 12288, 16384),
]


def draw_lengths(model: Callable[[np.random.Generator, int], np.ndarray], rows: int) -> list[int]:
    return np.rint(model(np.random.default_rng(SEED), rows)).astype(int).tolist()


def measures(schedule: Schedule, lengths: list[int], budget: int) -> dict[str, float]:
    assert sorted(row for rank in schedule for micro in rank for row in micro) == list(range(len(lengths)))
    tokens = np.array([[sum(lengths[row] for row in micro) for micro in rank] for rank in schedule])
    cost = np.array(
        [[sum(COST.linear * lengths[r] + COST.quadratic * lengths[r] ** 2 for r in m) for m in k] for k in schedule]
    )
    return {
        "over_budget": int((tokens > budget).sum()),
        "count": tokens.shape[1],
        "lower_bound": -(-sum(lengths) // (DP * budget)),
        "balance": float(cost.sum(1).mean() / cost.sum(1).max()),
        "sync": float(cost.mean(0).sum() / cost.max(0).sum()),
        "fill": float(tokens.sum() / (tokens.size * budget)),
    }


def first_fit_decreasing(lengths: list[int], budget: int) -> Schedule:
    """NeMo-RL's documented FirstFitDecreasingPacker, re-made: longest first, each to the first bin with room; bins in
    multiples of the ranks, dealt to them in turn."""
    room: list[int] = []
    bins: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        need = lengths[row]
        i = next((i for i, left in enumerate(room) if left >= need), len(room))
        if i == len(room):
            room.append(budget)
            bins.append([])
        room[i] -= need
        bins[i].append(row)
    bins += [[] for _ in range(-len(bins) % DP)]
    return [bins[rank::DP] for rank in range(DP)]


def timed(run: Callable[[], Schedule]) -> tuple[Schedule, float]:
    times = []
    for _ in range(REPEATS):
        started = time.process_time()
        schedule = run()
        times.append(time.process_time() - started)
    return schedule, 1000 * statistics.median(times)


def by_peer(peer: str, folder: Path, lengths: list[int], budget: int) -> dict[str, object]:
    request = json.dumps({"lengths": lengths, "dp": DP, "budget": budget, "repeats": REPEATS})
    command = [sys.executable, str(PEER_SCRIPT), peer, str(folder)]
    ran = subprocess.run(command, input=request, capture_output=True, text=True, timeout=1200)
    if ran.returncode != 0:
        return {"error": (ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"])[-1]}
    answer = json.loads(ran.stdout)
    if "error" in answer:
        return answer
    return measures(answer["schedule"], lengths, budget) | {"ms": 1000 * answer["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers-schedule", help="the peers' folder")
    parser.add_argument("--no-peers", action="store_true")
    options = parser.parse_args()
    details: dict[str, object] = {"machine": machine(), "config": {"dp": DP, "repeats": REPEATS, "seed": SEED}}
    print(f"machine: {details['machine']}\nconfig: {details['config']}", flush=True)
    if not options.no_peers and not options.peers.is_dir():
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(options.peers)]
        subprocess.run([*install, "-r", str(PEER_PINS)], check=True)
    ours, cases = [], []
    for name, model, rows, budget in CASES:
        lengths = draw_lengths(model, rows)
        lower = -(-sum(lengths) // (DP * budget))
        print(f"\n{name}, {rows} rows, {np.mean(lengths):.0f} tokens on average, budget {budget}, LB {lower}")
        print(f"  {'':12}{'over':>6}{'M':>6}{'bal':>9}{'sync':>9}{'fill':>7}{'ms':>10}", flush=True)
        found: dict[str, dict[str, object]] = {}
        for who, run in {
            "ours": lambda: schedule_by_tokens(lengths, DP, budget, cost=COST),  # noqa: B023
            "first-fit": lambda: first_fit_decreasing(lengths, budget),  # noqa: B023
        }.items():
            schedule, ms = timed(run)
            found[who] = measures(schedule, lengths, budget) | {"ms": ms}
            show(who, found[who])
        for peer in () if options.no_peers else ("verl", "trl"):
            found[peer] = by_peer(peer, options.peers, lengths, budget)
            show(peer, found[peer])
        ours.append(found["ours"] | {"rows": rows})
        cases.append({"lengths": name, "rows": rows, "budget": budget, "found": found})
    details["cases"] = cases
    result = {
        "over_budget": max(case["over_budget"] for case in ours),
        "microbatches_over_bound": max(case["count"] - case["lower_bound"] for case in ours),
        "balance": min(case["balance"] for case in ours),
        "sync": min(case["sync"] for case in ours),
        "ms_per_4096": max(case["ms"] for case in ours if case["rows"] == 4096),
        "ms_per_12288": max(case["ms"] for case in ours if case["rows"] == 12288),
    }
    print()
    finish(result, details, options.json)


def show(who: str, found: dict) -> None:
    if "error" in found:
        print(f"  {who:12}{found['error']}", flush=True)
        return
    line = f"  {who:12}{found['over_budget']:6}{found['count']:6}{found['balance']:9.5f}{found['sync']:9.5f}"
    print(f"{line}{found['fill']:7.3f}{found['ms']:10.1f}", flush=True)


if __name__ == "__main__":
    main()
