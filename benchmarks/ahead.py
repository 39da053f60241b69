"""The engine on ranks of its own, and answers written one step ahead: what it gains, and what it costs in learning.

    python -m benchmarks.ahead [--parts speed,reward,learn] [--seeds 1 2 3] [--steps 28] [--work DIR] [--json FILE]

Real runs on this machine's CPUs, under torchrun, of the same settings: one rank for the policy and one for the engine
(split), with answers one step ahead and without; and colocated on the same two ranks, DP 2.

    speed   a small model with random weights and GSM8K's lengths; every row is trained, so that rollout and update take
            alike long. The step of a run ahead against the longer of rollout and update + sync.
    reward  the same, few answers at once, with a reward that takes 0.2 s per answer in 4 workers, over one that takes
            none: colocated and split. Most answers are scored while others are still being written.
    learn   the demo, ahead and not, each seed: steps until 95 % of the greedy answers are right.

A run that is in --work already is not run again. RESULT: step_vs_bound of the run ahead (1: nothing is lost), its
speed-up over the split run without and over colocated DP 2, the slow reward's step over the fast one's, and steps to
95 % ahead over without.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import ROOT, finish, machine
from benchmarks.demo_runs import REWARD, Curve, demo_inputs, long_settings, median, run

SPLIT = ("trainer.placement=split", "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=1")
AHEAD = ("actor_rollout_ref.rollout.ahead=1",)
COLOCATED = ("actor_rollout_ref.actor.megatron.tensor_model_parallel_size=1",)
CORRECTED = "algorithm.rollout_correction.rollout_is=token"
PHASES = ("rollout", "reward", "wait", "update", "sync", "step")
SPEED_STEPS, REWARD_STEPS = 6, 5
SLEEP_S, WORKERS = 0.2, 4
PLACEMENTS = {"split, ahead": (*SPLIT, *AHEAD), "split": SPLIT, "colocated": COLOCATED}


def table(found: dict[str, list[dict]]) -> list[str]:
    """Markdown: the median seconds of each phase."""
    lines = [f"| seconds | {' | '.join(PHASES)} |", f"|{'---|' * (len(PHASES) + 1)}"]
    for name, records in found.items():
        times = [median(records, f"time/{phase}_s") for phase in PHASES]
        lines.append(f"| {name} | {' | '.join(f'{value:.2f}' if value else '' for value in times)} |")
    return lines


def speed(work: Path, settings: Sequence[str]) -> tuple[dict[str, float], list[str]]:
    """Steps of the three placements, and their ratios."""
    found = {
        name: run(work / "speed" / name.replace(", ", "-"), [*settings, *placement], SPEED_STEPS)
        for name, placement in PLACEMENTS.items()
    }
    step = {name: median(records, "time/step_s") for name, records in found.items()}
    # The last step has no next one whose answers could be written meanwhile.
    ahead = found["split, ahead"][:-1]
    rollout = median(ahead, "time/rollout_s") + median(ahead, "time/reward_s")
    trained = median(ahead, "time/update_s") + median(ahead, "time/sync_s")
    timeline = [record for record in ahead if "timeline/update_end_s" in record]
    inside = [
        max(0.0, min(r["timeline/ahead_end_s"], r["timeline/update_end_s"]) - r["timeline/update_begin_s"])
        / (r["timeline/update_end_s"] - r["timeline/update_begin_s"])
        for r in timeline
    ]
    return {
        "step_vs_bound": median(ahead, "time/step_s") / max(rollout, trained),
        "rollout_vs_trained": rollout / trained,
        "update_beside_rollout": statistics.median(inside),
        "speedup_over_split": step["split"] / median(ahead, "time/step_s"),
        "speedup_over_colocated": step["colocated"] / median(ahead, "time/step_s"),
    }, table(found)


def reward(work: Path, settings: Sequence[str]) -> tuple[dict[str, float], list[str]]:
    """A slow reward over a fast one, colocated and split."""
    slow = work / "slow_reward.py"
    slow.write_text("import time\n" + REWARD.replace("    return", f"    time.sleep({SLEEP_S})\n    return"))
    found = {}
    for placement in ("colocated", "split"):
        for name, file in (("fast", work / "reward.py"), ("slow", slow)):
            given = [*settings, f"custom_reward_function.path={file}", f"reward.num_workers={WORKERS}"]
            given += PLACEMENTS[placement]
            found[f"{placement}, {name}"] = run(work / "reward" / f"{placement}-{name}", given, REWARD_STEPS)
    step = {name: median(records, "time/step_s") for name, records in found.items()}
    ratios = {
        f"slow_reward_{placement}": step[f"{placement}, slow"] / step[f"{placement}, fast"]
        for placement in ("colocated", "split")
    }
    return ratios, table(found)


def learn(work: Path, settings: Sequence[str], seeds: Sequence[int], steps: int) -> tuple[dict[str, float], list[str]]:
    """Steps to 95 % of the demo, ahead and not; means over the seeds."""
    reached: dict[str, list[float]] = {"split": [], "split, ahead": []}
    for seed in seeds:
        for name, steps_to in reached.items():
            given = [*settings, *PLACEMENTS[name], f"trainer.seed={seed}", "trainer.test_freq=1"]
            records = run(work / "learn" / f"{name.replace(', ', '-')}-{seed}", given, steps)
            steps_to.append(Curve.of(records, records).first(0.95, "steps"))
            print(f"{name}, seed {seed}: 95 % after {steps_to[-1]:.0f} steps", flush=True)
    lines = [
        "| steps to 95 % | " + " | ".join(f"seed {seed}" for seed in seeds) + " |",
        f"|{'---|' * (len(seeds) + 1)}",
    ]
    lines += [f"| {name} | {' | '.join(f'{at:.0f}' for at in values)} |" for name, values in reached.items()]
    means = {name: statistics.mean(values) for name, values in reached.items()}
    return {"steps_to_95_ahead": means["split, ahead"] / means["split"]}, lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=["speed", "reward", "learn"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=28, help="of a run of `learn`")
    parser.add_argument("--prompts", type=int, default=40, help="of a batch of `speed`")
    parser.add_argument("--concurrent", type=int, default=256, help="answers that the engine writes at once, there")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "ahead")
    parser.add_argument("--json")
    options = parser.parse_args(argv)
    options.work.mkdir(parents=True, exist_ok=True)
    work = options.work.resolve()
    model, demo = demo_inputs(work)
    longer = [
        *long_settings(work, model, "1m"),
        f"data.train_batch_size={options.prompts}",
        f"actor_rollout_ref.rollout.max_num_seqs={options.concurrent}",
        "actor_rollout_ref.actor.skip_zero_advantage=False",
        CORRECTED,
    ]
    few = [*longer, "data.train_batch_size=8", "actor_rollout_ref.rollout.max_num_seqs=4"]
    details: dict[str, object] = {"machine": machine(), "prompts": options.prompts, "concurrent": options.concurrent}
    result: dict[str, float] = {}
    for name, part in (
        ("speed", lambda: speed(work, longer)),
        ("reward", lambda: reward(work, few)),
        ("learn", lambda: learn(work, [*demo, CORRECTED], options.seeds, options.steps)),
    ):
        if name in options.parts:
            ratios, lines = part()
            result |= ratios
            details[name] = lines
            print("\n".join(lines), flush=True)
    print(json.dumps(details["machine"]))
    finish(result, details, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
