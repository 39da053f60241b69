"""The planner's arithmetic from 8 to 1024 GPUs, checked against small runs that were measured on this machine.

    python -m benchmarks.scale [--json FILE] [--picture FILE] [--runs DIR | --measure DIR | --no-check]

7B, 14B and 32B, GSM8K, MATH-like and 16k answers, policy and engine on the same H100s. The batch grows with the GPUs
(weak scaling: 16 prompts per GPU) or stays at 1024 prompts (strong). The settings are those that the planner's search
finds fastest for such a batch on up to 16 GPUs; more of them are more data-parallel ranks. The table has

    step s     seconds of a step              tok/s/GPU  trained tokens per second and GPU
    update     share of the step              bubble     share of the update's passes
    imbal      share that waits for the busiest data-parallel rank
    exch       exchanges of the update: TP, PP, gradients, weights; share of the step
    sync       share of the step              GB         of the phase that needs most memory

Nothing of it was measured on a GPU. What can be checked here is the arithmetic: --measure DIR makes short runs on
1, 2 and 4 CPU ranks and several layouts, of the demo and of a model of 27 million parameters; --runs DIR takes those
that are there. Each run is predicted by efficiencies that were fitted to the others of its model, and the error of its
step's seconds and of its peak memory is printed. Ranks that share a core get their share of its rate.

The last line: RESULT memory_error= time_error= (the largest of all runs), time_error_median=.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import finish, machine
from benchmarks.demo_runs import demo_inputs, long_settings, run
from remax_megatron.config.load import load_config
from remax_megatron.config.schema import Config
from remax_megatron.config.setting import set_value
from remax_megatron.plan import gpus
from remax_megatron.plan.calibrate import PEAKS, Run, calibrate, read_run
from remax_megatron.plan.ledger import ledger
from remax_megatron.plan.lengths import NAMED
from remax_megatron.plan.memory import Machine, memory
from remax_megatron.plan.models import sizes_of
from remax_megatron.plan.parts import Efficiencies
from remax_megatron.plan.step_time import step_time
from remax_megatron.plan.suggest import Search, Suggestion, on_devices

GPU = gpus.GPUS["h100-80gb"]
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
PRESETS = {"7B": "qwen2_5_7b", "14B": "qwen2_5_14b", "32B": "qwen2_5_32b"}
ANSWERS = {"gsm8k": 1024, "math": 3072, "long": 16384}  # the longest, tokens
PROMPTS_PER_GPU, STRONG = 16, 1024
SEARCHED = 16  # GPUs at most
EXCHANGES = ("exchanges of TP", "messages of PP", "exchange of gradients", "gathering of weights")
MEGATRON, ROLLOUT = "actor_rollout_ref.actor.megatron", "actor_rollout_ref.rollout"
GIB = 2**30

# Runs that are measured: ranks, and layout. Those of the larger model say so.
TP2, PP2 = f"{MEGATRON}.tensor_model_parallel_size=2", f"{MEGATRON}.pipeline_model_parallel_size=2"
VPP2 = f"{MEGATRON}.virtual_pipeline_model_parallel_size=2"
FULL = f"{MEGATRON}.override_transformer_config.recompute_granularity=full"
LONG = "27m-"
RUNS: dict[str, tuple[int, tuple[str, ...]]] = {
    "1-tp1": (1, ()),
    "2-tp2": (2, (TP2,)),
    "2-dp2": (2, ()),
    "2-pp2": (2, (PP2,)),
    "4-tp2-dp2": (4, (TP2,)),
    "4-dp4": (4, ()),
    "27m-1-tp1": (1, ()),
    "27m-2-tp2": (2, (TP2,)),
    "27m-2-dp2": (2, ()),
    "27m-2-pp2": (2, (PP2,)),
    "27m-2-pp2-vpp2": (2, (PP2, VPP2)),
    "27m-1-full": (1, (FULL,)),
}
STEPS, LONG_STEPS = 16, 3


# -- the simulation ----------------------------------------------------------------------------------------------------


def settings(size: str, answers: str, world_size: int, prompts: int) -> Config:
    """The preset of a model with these answers and prompts per step, on so many GPUs."""
    config = on_devices(load_config(PRESETS[size]).config, world_size)
    config.data.max_response_length, config.data.train_batch_size = ANSWERS[answers], prompts
    longest = config.data.max_prompt_length + ANSWERS[answers]
    config.actor_rollout_ref.actor.ppo_max_token_len_per_gpu = max(16384, -(-longest // 64) * 64)
    config.trainer.n_gpus_per_node, config.trainer.nnodes = min(8, world_size), max(1, world_size // 8)
    return config


@functools.cache
def best(size: str, answers: str, world_size: int, prompts: int) -> list[Suggestion]:
    config = settings(size, answers, world_size, prompts)
    facts = sizes_of(config.actor_rollout_ref.model.path)
    return Search(config, facts, world_size, Machine(GPU), NAMED[answers]).best(1)


def simulated(size: str, answers: str, world_size: int, prompts: int) -> dict[str, Any] | None:
    """A row of the table, None where no setting fits."""
    config, lengths, assumed = settings(size, answers, world_size, prompts), NAMED[answers], Efficiencies()
    facts = sizes_of(config.actor_rollout_ref.model.path)
    asked = min(world_size, SEARCHED)
    found = best(size, answers, asked, prompts * asked // world_size)
    if not found:
        return None
    for key, value in found[0].changes.items():
        set_value(config, key, value)
    made = step_time(config, facts, world_size, GPU, lengths)
    total, update = made.seconds(assumed), made.phases["update"]
    exchanged = sum(part.seconds(assumed) for part in update.parts if part.name in EXCHANGES)
    megatron = config.actor_rollout_ref.actor.megatron
    return {
        "model": size,
        "answers": answers,
        "gpus": world_size,
        "prompts": prompts,
        "layout": f"TP{megatron.tensor_model_parallel_size} PP{megatron.pipeline_model_parallel_size}",
        "engine_tp": config.actor_rollout_ref.rollout.tensor_model_parallel_size,
        "step_s": total,
        "tokens_per_s_gpu": made.num_tokens / total / world_size,
        "rollout_share": made.phases["rollout"].seconds(assumed) / total,
        "update_share": update.seconds(assumed) / total,
        "bubble": made.bubble,
        "imbalance": made.imbalance,
        "exchange_share": exchanged / total,
        "sync_share": made.phases["sync"].seconds(assumed) / total,
        "tail": made.tail,
        "peak_gb": memory(config, facts, world_size, Machine(GPU)).made.peak() / 1e9,
    }


COLUMNS = (  # title, key, format
    *(("", "model", "3"), ("answers", "answers", "7"), ("GPUs", "gpus", "5"), ("prompts", "prompts", "7")),
    *(("layout", "layout", "9"), ("eTP", "engine_tp", "3"), ("step s", "step_s", "8.1f")),
    *(("tok/s/GPU", "tokens_per_s_gpu", "9.0f"), ("rollout", "rollout_share", "7.0%")),
    *(("update", "update_share", "6.0%"), ("bubble", "bubble", "6.1%"), ("imbal", "imbalance", "6.1%")),
    *(("exch", "exchange_share", "6.1%"), ("sync", "sync_share", "6.1%"), ("tail", "tail", "5.0%")),
    ("GB", "peak_gb", "5.0f"),
)


def show(rows: list[dict[str, Any]]) -> None:
    cells = [[title for title, _, _ in COLUMNS]]
    cells += [[format(row[key], how).strip() for _, key, how in COLUMNS] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print(" ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)), flush=True)


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Tokens per second and GPU over the number of GPUs: weak and strong, a line per model and length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for axis, (title, weak) in zip(
        axes, ((f"{PROMPTS_PER_GPU} prompts per GPU", True), (f"{STRONG} prompts", False)), strict=True
    ):
        for size, color in zip(PRESETS, ("C0", "C1", "C2"), strict=True):
            for answers, style in zip(ANSWERS, ("-", "--", ":"), strict=True):
                chosen = [row for row in rows if (row["model"], row["answers"], row["weak"]) == (size, answers, weak)]
                if not chosen:
                    continue
                axis.plot(
                    [row["gpus"] for row in chosen],
                    [row["tokens_per_s_gpu"] for row in chosen],
                    style,
                    color=color,
                    marker=".",
                    label=f"{size}, {answers}",
                )
        axis.set(xscale="log", yscale="log", xlabel="GPUs", title=f"{title}, modelled")
        axis.set_xticks(SIZES, [str(size) for size in SIZES])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("trained tokens / s / GPU")
    axes[1].legend(fontsize=7, ncol=3, loc="lower left")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


# -- the check ---------------------------------------------------------------------------------------------------------


def measure(folder: Path) -> None:
    """Make the runs that are not in `folder` yet, one after another."""
    folder = folder.resolve()
    (folder / "inputs").mkdir(parents=True, exist_ok=True)
    model, demo = demo_inputs(folder / "inputs")
    given = [
        f"{MEGATRON}.tensor_model_parallel_size=1",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        "trainer.export_hf=False",
        "actor_rollout_ref.rollout.kv_cache_gib=0.25",
    ]
    longer = [*long_settings(folder / "inputs", model), "data.train_batch_size=4"]
    for name, (ranks, layout) in RUNS.items():
        if not (folder / name / "metrics.jsonl").is_file():
            print(f"measuring {name}", flush=True)
        of_model, steps = (longer, LONG_STEPS) if name.startswith(LONG) else (demo, STEPS)
        run(folder / name, [*of_model, *given, *layout], steps, ranks)


def slowed(run: Run) -> Run:
    """The run as if each of its ranks had a core of its own: its seconds times the part of a core that each had."""
    share = min(1.0, len(os.sched_getaffinity(0)) / run.world_size)
    steps = tuple(
        {key: value * share if key.startswith("time/") else value for key, value in step.items()} for step in run.steps
    )
    return dataclasses.replace(run, steps=steps)


def is_long(one: Run) -> bool:
    """Whether it is a run of the larger model."""
    return Path(one.source).parent.name.startswith(LONG)


def checked(runs: list[Run]) -> Iterator[dict[str, Any]]:
    """Each run as the others of its model predict it."""
    core = gpus.GPUS["cpu-core"]
    scaled = [slowed(run) for run in runs]
    for number, one in enumerate(scaled):
        others = scaled[:number] + scaled[number + 1 :]
        found = calibrate(others, core)
        seen, made = one.seconds(), one.modelled(core)
        of = {name: phase.seconds(found.efficiencies) for name, phase in made.phases.items()}
        counted = ledger(one.config, one.facts, one.world_size, on_cpu=True)
        memory_errors = []
        for phase, names in PEAKS.items():
            peak = one.median(f"memory/{phase}_peak_gib") * GIB
            planned = max(counted.peak(name) + found.beside.get(name, 0) for name in names)
            if peak > 0:  # a phase that the run did not measure
                memory_errors.append(abs(planned / peak - 1))
        yield {
            "run": Path(one.source).parent.name,
            "measured_s": sum(seen.values()),
            "predicted_s": sum(of.values()),
            "phases": {name: (of.get(name, 0.0), seconds) for name, seconds in seen.items() if seconds > 0},
            "time_error": abs(sum(of.values()) / sum(seen.values()) - 1),
            "memory_error": max(memory_errors, default=0.0),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--picture", type=Path, metavar="FILE")
    parser.add_argument("--runs", type=Path, help="a folder with the runs of --measure")
    parser.add_argument("--measure", type=Path, help="a folder to make the runs in")
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--sizes", type=lambda text: tuple(map(int, text.split(","))), default=SIZES)
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(PRESETS), help="of 7B,14B,32B")
    parser.add_argument("--answers", type=lambda text: text.split(","), default=list(ANSWERS))
    options = parser.parse_args()
    details: dict[str, Any] = {"machine": machine(), "gpu": GPU.name}
    print(f"machine: {details['machine']}\nmodelled, not measured on a GPU: {GPU.name}", flush=True)
    rows = []
    for weak in (True, False):
        for size in options.models:
            for answers in options.answers:
                for world_size in options.sizes:
                    prompts = PROMPTS_PER_GPU * world_size if weak else STRONG
                    row = simulated(size, answers, world_size, prompts)
                    rows += [row | {"weak": weak}] if row else []
    show(rows)
    details["rows"] = rows
    if options.picture:
        draw(rows, options.picture)
    result: dict[str, float] = {}
    folder = options.measure or options.runs
    if folder and not options.no_check:
        if options.measure:
            measure(folder)
        runs = [read_run(path) for path in sorted(folder.glob("*/metrics.jsonl"))]
        by_model = [[one for one in runs if is_long(one) == long] for long in (False, True)]
        details["checks"] = checks = [one for of_model in by_model for one in checked(of_model)]
        head = f"{'run':15} {'measured s':>10} {'predicted':>10} {'error':>7} {'memory':>7}"
        print(f"\n{head}   phases: predicted/measured s")
        for one in checks:
            said = ", ".join(f"{name} {mine:.2f}/{seen:.2f}" for name, (mine, seen) in one["phases"].items())
            print(
                f"{one['run']:15} {one['measured_s']:10.2f} {one['predicted_s']:10.2f} {one['time_error']:7.0%} "
                f"{one['memory_error']:7.0%}   {said}"
            )
        result = {
            "memory_error": max(one["memory_error"] for one in checks),
            "time_error": max(one["time_error"] for one in checks),
            "time_error_median": float(np.median([one["time_error"] for one in checks])),
        }
    finish(result, details, options.json)


if __name__ == "__main__":
    main()
