"""ReMax beside PPO, RLOO, GRPO and REINFORCE, in one trainer, on one task: accuracy, time, memory, gradient noise.

    python -m benchmarks.estimators [--parts learn,noise,long] [--seeds 1 2 3] [--steps 30] [--work DIR] [--json FILE]
                                    [--picture FILE] [--only NAME ...]

The demo's model and data (made if need be), the demo preset on two ranks under torchrun, one learning rate for all.
Every method gets five answers per prompt: ReMax four samples and the greedy one, the others five samples. So the axes
`steps` and `generated tokens` are the same for all but ReMax with refill, which draws more prompts.

    learn   trains each method with each seed; validates every 2 steps. A run that is in --work already is not run
            again.
    noise   the gradient's noise at one policy: ReMax's after 10 steps. With S_b the mean squared norm of the gradient
            of a batch of b prompts, S_b = |g|^2 + V / b for a batch mean; from S_64 (16 batches) and S_1024 (one)
            follow V and |g|^2, and V / (64 |g|^2) is the noise of one step over its signal. The weights do not move (a
            learning rate of 1e-12); PPO's critic has been trained on that policy's answers for 16 steps before.
    long    time of a step and memory of ReMax and PPO with a model of 27 million parameters, random weights, and
            GSM8K's lengths: prompts of about 100 tokens, answers up to 200.

RESULT: states (weights, gradients, optimizer; counted by the doctor's ledger), time of a step, time to 90 % of the
final accuracy and process memory of ReMax over PPO. Seconds are those of steps, without validation, and of the first
seed alone: while it runs nothing else should.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.common import ROOT, finish, machine
from benchmarks.demo_runs import RANKS, curves_of, demo_inputs, fastest, long_model, long_settings, median, run
from remax_megatron.config.load import load_config
from remax_megatron.model_facts import ModelFacts
from remax_megatron.plan.ledger import ledger

PROMPTS, BATCHES = 64, 16  # of a step of `noise`, and steps
STILL = 1e-12  # a learning rate with which no weight moves
METHODS: dict[str, tuple[str, ...]] = {
    "ReMax": (),
    "ReMax, refill": ("algorithm.refill=True",),
    "RLOO": ("algorithm.adv_estimator=rloo", "actor_rollout_ref.rollout.n=5"),
    "GRPO": ("algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=5"),
    "REINFORCE": ("algorithm.adv_estimator=reinforce", "actor_rollout_ref.rollout.n=5"),
    "PPO": ("algorithm.adv_estimator=gae", "critic.optim.lr=3e-4", "actor_rollout_ref.rollout.n=5"),
}
COLORS = dict(zip(METHODS, ("#2563eb", "#7c3aed", "#15803d", "#ca8a04", "#64748b", "#dc2626"), strict=True))
STATES = ("weights", "gradients", "optimizer")
PHASES = ("rollout", "reward", "score", "critic", "update", "sync", "step")


def states(model: Path, settings: Sequence[str]) -> dict[str, int]:
    """Bytes of weights, gradients and optimizers on a rank, as tests prove the ledger counts them."""
    config = load_config("demo", list(settings)).config
    terms = ledger(config, ModelFacts.from_folder(model), RANKS, on_cpu=True).phases["rollout"]
    return {name: terms.get(name, 0) + terms.get(f"critic's {name}", 0) for name in STATES}


def states_vs_ppo(model: Path, settings: Sequence[str]) -> float:
    """Of ReMax over PPO."""
    remax, ppo = (sum(states(model, [*METHODS[name], *settings]).values()) for name in ("ReMax", "PPO"))
    return remax / ppo


# -- learn -------------------------------------------------------------------------------------------------------------


def learn(work: Path, names: Sequence[str], seeds: Sequence[int], steps: int) -> dict[str, list[list[dict]]]:
    """The records of each method's runs."""
    found: dict[str, list[list[dict]]] = {name: [] for name in names}
    for seed in seeds:
        for name in names:
            given = [*METHODS[name], f"trainer.seed={seed}", "trainer.test_freq=2", "trainer.export_hf=False"]
            folder = work / "learn" / f"{name.lower().replace(', ', '-')}-{seed}"
            found[name].append(run(folder, [*given, *DEMO], steps))
            curve = curves_of(found[name])[-1]
            print(f"{name}, seed {seed}: {curve.accuracy[-1]:.1%} in {curve.seconds[-1]:.0f} s", flush=True)
    return found


def table(found: dict[str, list[list[dict]]], model: Path) -> Iterator[str]:
    """Markdown: means over the seeds, and the lowest and highest; seconds and memory of the first seed."""

    def span(values: Sequence[float], form: str) -> str:
        if max(values) == float("inf"):
            return "not reached"
        texts = [form.format(value) for value in (statistics.mean(values), min(values), max(values))]
        return texts[0] if texts[1] == texts[2] else f"{texts[0]} ({texts[1]} to {texts[2]})"

    yield "| method | after 10 steps | after 20 | at the end | steps to 95 % | seconds to 95 % | tokens to 95 % |"
    yield "|---|---|---|---|---|---|---|"
    for name, runs in found.items():
        curves = curves_of(runs)
        at = [
            span([c.accuracy[c.steps.index(step)] for c in curves], "{:.1%}") for step in (10, 20, curves[0].steps[-1])
        ]
        to = [
            span([c.first(0.95, axis) for c in curves], form)
            for axis, form in (("steps", "{:.0f}"), ("seconds", "{:.0f}"), ("tokens", "{:,.0f}"))
        ]
        yield f"| {name} | {' | '.join([*at, *to])} |"
    yield ""
    yield f"| seconds of a step | {' | '.join(PHASES)} |"
    yield f"|{'---|' * (len(PHASES) + 1)}"
    for name, runs in found.items():
        times = [median(runs[0], f"time/{phase}_s") for phase in PHASES]
        yield f"| {name} | {' | '.join(f'{value:.2f}' for value in times)} |"
    yield ""
    peaks = ("rollout", "update", "sync")
    yield f"| memory of a rank | {', MB | '.join(STATES)}, MB | process, GiB: {' | '.join(peaks)} |"
    yield f"|{'---|' * (len(STATES) + len(peaks) + 1)}"
    for name, runs in found.items():
        sizes = [f"{size / 1e6:.2f}" for size in states(model, [*METHODS[name], *DEMO]).values()]
        process = [f"{max(r.get(f'memory/{one}_peak_gib', 0.0) for r in runs[0]):.2f}" for one in peaks]
        yield f"| {name} | {' | '.join([*sizes, *process])} |"


def compared(found: dict[str, list[list[dict]]], model: Path) -> dict[str, float]:
    """ReMax over PPO."""
    curves = {name: curves_of(found[name]) for name in ("ReMax", "PPO")}
    final = min(statistics.mean(c.accuracy[-1] for c in of) for of in curves.values())
    to_90 = {name: statistics.mean(c.first(0.9 * final, "seconds") for c in of) for name, of in curves.items()}
    step = {name: median(found[name][0], "time/step_s") for name in curves}
    peak = {name: max(r["memory/step_peak_gib"] for records in found[name] for r in records[1:]) for name in curves}
    return {
        "states_vs_ppo": states_vs_ppo(model, DEMO),
        "step_time_vs_ppo": step["ReMax"] / step["PPO"],
        "time_to_90_vs_ppo": to_90["ReMax"] / to_90["PPO"],
        "process_memory_vs_ppo": peak["ReMax"] / peak["PPO"],
    }


def picture(found: dict[str, list[list[dict]]], file: Path) -> None:
    """Accuracy over steps, seconds and generated tokens: the mean of the seeds, and the band between them."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    for axes, (axis, label) in zip(
        figure.subplots(1, 3, sharey=True),
        (("steps", "steps"), ("seconds", "seconds of training"), ("tokens", "thousands of generated tokens")),
        strict=True,
    ):
        for name, runs in found.items():
            curves = curves_of(runs)
            x = np.mean([getattr(curve, axis) for curve in curves], axis=0) / (1000 if axis == "tokens" else 1)
            y = np.array([curve.accuracy for curve in curves])
            axes.plot(x, y.mean(axis=0), color=COLORS[name], linewidth=2, label=name)
            axes.fill_between(x, y.min(axis=0), y.max(axis=0), color=COLORS[name], alpha=0.15, linewidth=0)
        axes.set_xlabel(label)
        axes.set_ylim(0, 1)
        axes.grid(color="#e2e8f0")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("greedy accuracy on unseen problems")
    figure.axes[0].legend(frameon=False)
    figure.savefig(file)


# -- noise -------------------------------------------------------------------------------------------------------------


def noise(work: Path, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """The noise of a step over its signal, of each method but refill, whose batches have other sizes: by the mean of
    the squared norms of the batches, and by their median, which one batch with a rare token does not move."""
    halfway, quiet = work / "halfway", ["trainer.test_freq=-1", "trainer.val_before_train=False", *DEMO]
    run(halfway, quiet, 10)
    still = [
        *quiet,
        f"actor_rollout_ref.model.path={halfway / 'hf'}",
        f"actor_rollout_ref.actor.optim.lr={STILL}",
        "actor_rollout_ref.actor.optim.weight_decay=0",
        "actor_rollout_ref.actor.optim.clip_grad=0",
    ]
    found = {}
    for name in names:
        if "refill" in name:
            continue
        given = [*METHODS[name], *still]
        if name == "PPO":
            run(work / "noise" / "critic", [*given, "critic.optim.lr=1e-3"], BATCHES)
            given += [f"critic.model.path={work / 'noise' / 'critic' / 'critic'}", f"critic.optim.lr={STILL}"]
        given.append("trainer.export_hf=False")
        folder = work / "noise" / name.lower()
        small = run(folder / "small", given, BATCHES)
        large = run(folder / "large", [*given, f"data.train_batch_size={PROMPTS * BATCHES}"], 1)
        squares = [record["actor/grad_norm"] ** 2 for record in small[1:]]
        s_large = large[1]["actor/grad_norm"] ** 2
        found[name] = {"mean": noise_of(statistics.mean(squares), s_large)}
        found[name] |= {"median": noise_of(statistics.median(squares), s_large)}
        found[name] |= {"largest norm over the median": max(squares) ** 0.5 / statistics.median(squares) ** 0.5}
        print(f"{name}:", *(f"{key} {value:.2f}" for key, value in found[name].items()), flush=True)
    return found


def noise_of(s_small: float, s_large: float) -> float:
    """Noise over signal of a batch of PROMPTS, from the squared norms of such a batch's gradient and of BATCHES times
    as many prompts'."""
    variance = (s_small - s_large) / (1 - 1 / BATCHES)
    signal = s_small - variance
    return variance / signal if signal > 0 else float("inf")


# -- long --------------------------------------------------------------------------------------------------------------


def long(work: Path, demo_model: Path, steps: int = 3) -> dict[str, float]:
    """Time of a step, the fastest but the first, and memory at 27 million parameters and GSM8K's lengths, ReMax over
    PPO."""
    given = long_settings(work, demo_model)
    found = {name: run(work / "long" / name.lower(), [*METHODS[name], *given], steps) for name in ("ReMax", "PPO")}
    for name, records in found.items():
        lengths = f"{median(records, 'response/mean_tokens'):.0f} tokens per answer"
        print(f"{name}, 27M: {lengths}", *(f"{p} {fastest(records, p):.2f} s" for p in PHASES), flush=True)
    peak = {name: max(record["memory/step_peak_gib"] for record in records[1:]) for name, records in found.items()}
    return {
        "long_states_vs_ppo": states_vs_ppo(long_model(work), given),
        "long_step_time_vs_ppo": fastest(found["ReMax"], "step") / fastest(found["PPO"], "step"),
        "long_process_memory_vs_ppo": peak["ReMax"] / peak["PPO"],
    }


DEMO: list[str] = []  # where the demo's model and data lie; set by main


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=["learn", "noise", "long"])
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "estimators")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--json")
    options = parser.parse_args(argv)
    options.work.mkdir(parents=True, exist_ok=True)
    options.work = options.work.resolve()
    model, DEMO[:] = demo_inputs(options.work)
    details: dict[str, object] = {"machine": machine(), "seeds": options.seeds, "steps": options.steps}
    result: dict[str, float] = {}
    if "learn" in options.parts:
        found = learn(options.work, options.only, options.seeds, options.steps)
        lines = list(table(found, model))
        print("\n".join(lines), flush=True)
        details["table"] = lines
        if {"ReMax", "PPO"} <= set(options.only):
            result |= compared(found, model)
        if options.picture:
            picture(found, options.picture)
    if "noise" in options.parts:
        details["noise"] = noise(options.work, options.only)
    if "long" in options.parts:
        result |= long(options.work, model)
    print(json.dumps(details["machine"]))
    finish(result, details, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
