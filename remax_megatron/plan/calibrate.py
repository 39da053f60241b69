"""The planner's few efficiencies from what runs have measured: their metrics.jsonl and the config.yaml beside it.

Every phase is linear in coefficients (an efficiency's inverse, or its seconds), so the fit is two steps: the ratio of
measured to modelled median of each phase scales the coefficients that are that phase's own; with several runs, least
squares of the relative errors then moves them apart, held to where the ratios put them. Memory is corrected by what
each phase took beyond the ledger's count. The errors before and after are of the runs that were fitted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from remax_megatron.config.load import load_config
from remax_megatron.config.schema import Config, ConfigError, expects_cpu
from remax_megatron.model_facts import ModelFacts
from remax_megatron.plan.gpus import Gpu
from remax_megatron.plan.ledger import installed_stack, ledger
from remax_megatron.plan.lengths import Lengths, of_metrics
from remax_megatron.plan.models import sizes_of
from remax_megatron.plan.parts import Efficiencies
from remax_megatron.plan.step_time import StepTime, step_time

WARM_UP = 2  # steps that are left out where there are more than twice as many: they open connections and compile
ASSUMED = Efficiencies()
HOLD = 0.1  # weight of a coefficient's relative change in the least squares
# The phase whose ratio scales an efficiency. Those that are not named are scaled by no phase alone.
OWN = {
    "rollout": ("prefill_flops", "decode_bandwidth", "decode_step_s", "small_collective_s", "sleep_s"),
    "reward": ("reward_s",),
    "update": (
        *("update_flops", "layer_s", "microbatch_s", "exchange_bandwidth", "optimizer_bandwidth"),
        *("optimizer_step_s", "collective_s"),
    ),
    "offload": ("host_bandwidth",),
    "sync": ("stream_bandwidth", "tensor_s"),
}
# Phases of the ledger that a phase of the run goes through, and the metric of its peak.
PEAKS = {"update": ("update", "optimizer"), "sync": ("sync", "canary"), "rollout": ("rollout",)}
GIB = 2**30


@dataclass(frozen=True)
class Run:
    """A finished run: its settings and model, its records without the start, and where they lie."""

    source: str
    config: Config
    facts: ModelFacts
    steps: tuple[Mapping[str, Any], ...]

    @property
    def world_size(self) -> int:
        """Count the ranks."""
        return self.config.trainer.nnodes * self.config.trainer.n_gpus_per_node

    @property
    def lengths(self) -> Lengths:
        """Give the lengths that its answers had."""
        answers = self.config.data.train_batch_size * self.config.actor_rollout_ref.rollout.n
        return of_metrics(self.source, self.steps, answers)

    @property
    def trained_share(self) -> float:
        """Give the share of the tokens that were trained."""
        return 1 - self.median("batch/left_out_token_share")

    def median(self, key: str) -> float:
        """Give the median of a metric over the steps that have it, 0 where none has."""
        values = [step[key] for step in self.steps if key in step]
        return float(np.median(values)) if values else 0.0

    def seconds(self) -> dict[str, float]:
        """Give the median seconds of each phase, none in another's."""
        names = ("rollout", "reward", "score", "critic", "update", "sync")
        of = {name: self.median(f"time/{name}_s") for name in names}
        moved = {name: self.median(f"time/{name}_s") for name in ("restore", "offload")}
        of["update"] -= of["score"] + of["critic"] + moved["restore"]
        of["sync"] -= moved["offload"]
        return of | {"offload": sum(moved.values())}

    def modelled(self, gpu: Gpu) -> StepTime:
        """Model a step of this run's settings on its own lengths."""
        return step_time(self.config, self.facts, self.world_size, gpu, self.lengths, self.trained_share)


@dataclass(frozen=True)
class Calibration:
    """Efficiencies that fit some runs, and the mean relative errors of their phases and steps before and after.

    asleep  bytes beside torch's memory while the engine sleeps, None: not measured
    beside  bytes by phase of the ledger that the runs took beyond its count
    """

    efficiencies: Efficiencies
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    asleep: int | None = None
    beside: dict[str, int] = field(default_factory=dict)


def read_run(path: str | Path) -> Run:
    """Read the metrics.jsonl `path` and the config.yaml beside it. ConfigError without steps in it, or settings."""
    file = Path(path).expanduser()
    try:
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"--calibrate={path} cannot be read ({error}); set it to a run's metrics.jsonl") from error
    steps = [record for record in records if "time/step_s" in record and "time/update_s" in record]
    if not steps:
        raise ConfigError(f"--calibrate={path} has no record of a step; set it to the metrics.jsonl of a run")
    if not (file.parent / "config.yaml").is_file():
        raise ConfigError(f"--calibrate={path} has no config.yaml beside it; set it to the file in the run's folder")
    config = load_config("config", [], file.parent).config
    facts = sizes_of(config.actor_rollout_ref.model.path, config.trainer.prepare_command)
    kept = steps[WARM_UP:] if len(steps) > 2 * WARM_UP else steps
    return Run(str(path), config, facts, tuple(kept))


def calibrate(runs: Sequence[Run], gpu: Gpu, start: Efficiencies = ASSUMED) -> Calibration:
    """Fit the efficiencies to `runs` on devices `gpu`, from `start`."""
    modelled = [run.modelled(gpu) for run in runs]
    measured = [run.seconds() for run in runs]
    scaled = _by_ratios(modelled, measured, start)
    fitted = _by_least_squares(modelled, measured, scaled) if len(runs) > 1 else scaled
    asleep = max((run.median("memory/engine_asleep_gib") for run in runs), default=0.0)
    return Calibration(
        fitted,
        errors(modelled, measured, start),
        errors(modelled, measured, fitted),
        int(asleep * GIB) or None,
        _beside(runs, gpu),
    )


def errors(
    modelled: Sequence[StepTime], measured: Sequence[Mapping[str, float]], efficiencies: Efficiencies
) -> dict[str, float]:
    """Compute the mean relative error over the runs of each phase that took time, and of the `step`."""
    found: dict[str, list[float]] = {}
    for made, seen in zip(modelled, measured, strict=True):
        of = {name: phase.seconds(efficiencies) for name, phase in made.phases.items()}
        pairs = {name: (seconds, seen[name]) for name, seconds in of.items() if seen.get(name, 0) > 0}
        pairs["step"] = (sum(of.values()), sum(seen.values()))
        for name, (mine, theirs) in pairs.items():
            found.setdefault(name, []).append(abs(mine / theirs - 1))
    return {name: float(np.mean(values)) for name, values in found.items()}


def _coefficient(efficiencies: Efficiencies, name: str) -> float:
    value = getattr(efficiencies, name)
    return value if name.endswith("_s") else 1 / value


def _with(efficiencies: Efficiencies, coefficients: Mapping[str, float]) -> Efficiencies:
    values = {name: value if name.endswith("_s") else 1 / value for name, value in coefficients.items()}
    return replace(efficiencies, **values)


def _by_ratios(
    modelled: Sequence[StepTime], measured: Sequence[Mapping[str, float]], start: Efficiencies
) -> Efficiencies:
    """Each phase's own coefficients times the median over the runs of what was measured over what they make, both
    without the parts that are other phases'."""
    fitted = start
    for phase, names in OWN.items():
        ratios = []
        for made, seen in zip(modelled, measured, strict=True):
            if phase not in made.phases or seen.get(phase, 0) <= 0:
                continue
            own = sum(part.seconds(fitted) for part in made.phases[phase].parts if part.field in names)
            foreign = made.phases[phase].seconds(fitted) - own
            ratios.append(max(seen[phase] - foreign, 0.1 * own) / own)
        if ratios:
            ratio = float(np.median(ratios))
            fitted = _with(fitted, {name: ratio * _coefficient(fitted, name) for name in names})
    return fitted


def _by_least_squares(
    modelled: Sequence[StepTime], measured: Sequence[Mapping[str, float]], start: Efficiencies
) -> Efficiencies:
    """Least squares of the phases' relative errors over changes of the coefficients, which cost HOLD each."""
    names = Efficiencies.names()
    rows, wanted = [], []
    for made, seen in zip(modelled, measured, strict=True):
        for phase, content in made.phases.items():
            if seen.get(phase, 0) <= 0:
                continue
            row = np.zeros(len(names))
            for part in content.parts:
                row[names.index(part.field)] += part.seconds(start) / seen[phase]
            rows.append(row)
            wanted.append(1 - row.sum())
    system = np.vstack([np.array(rows), HOLD * np.eye(len(names))])
    change, *_ = np.linalg.lstsq(system, np.array([*wanted, *np.zeros(len(names))]), rcond=None)
    factors = np.clip(1 + change, 0.1, 10)
    return _with(start, {name: f * _coefficient(start, name) for name, f in zip(names, factors.tolist(), strict=True)})


def _beside(runs: Sequence[Run], gpu: Gpu) -> dict[str, int]:
    """Of each phase the most over the runs that a rank took beyond the count; not below 0."""
    beside: dict[str, int] = {}
    for run in runs:
        on_cpu = expects_cpu(run.config)
        stack = installed_stack(run.config, on_cpu, has_te=not on_cpu)
        made = ledger(run.config, run.facts, run.world_size, card=gpu.memory, on_cpu=on_cpu, stack=stack)
        for phase, counted in PEAKS.items():
            seen = run.median(f"memory/{phase}_peak_gib") * GIB
            if seen:
                more = int(seen - max(map(made.peak, counted)))
                beside |= {name: max(beside.get(name, 0), more) for name in counted}
    return beside
