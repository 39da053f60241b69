"""Memory and time of a step before the launch, from the settings alone: one screen, and an exit code.

usage: python -m remax_megatron.plan [--config-name NAME] [--config-dir DIR] [key=value ...]
        --gpu NAME            the devices, of plan/gpus.py (default h100-80gb; for trainer.device=cpu cpu-core)
        --lengths NAME|FILE   gsm8k (default), math, long, or a file with lengths; see plan/lengths.py
        --calibrate FILE      a run's metrics.jsonl, with config.yaml beside it; may be given several times
        --suggest [N]         the five fastest settings on N devices (default: as many as the settings ask for)

It takes the trainer's own settings, and says which phase needs most memory on which rank, whether that fits, the
largest token budget that does, how many devices the model needs at least, how long each phase of a step takes, and
what binds it. Counted and modelled, not measured on a GPU.

Exit code: 0 when the settings fit (with --suggest: when something does), 1 when they do not, 2 for settings that the
trainer refuses. It starts nothing, and imports neither torch nor vLLM.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from remax_megatron.config import cli
from remax_megatron.config.load import load_config
from remax_megatron.config.rules import validate
from remax_megatron.config.schema import Config, ConfigError, expects_cpu, sides_of
from remax_megatron.config.setting import value_of
from remax_megatron.model_facts import ModelFacts
from remax_megatron.plan import gpus
from remax_megatron.plan.calibrate import Calibration, calibrate, read_run
from remax_megatron.plan.fitting import fitting_change
from remax_megatron.plan.ledger import disk_bytes, gb, table
from remax_megatron.plan.lengths import DEFAULT, Lengths, lengths_named
from remax_megatron.plan.memory import (
    ENGINE,
    Machine,
    Memory,
    engine_terms,
    host_bytes,
    largest_budget,
    memory,
)
from remax_megatron.plan.models import sizes_of
from remax_megatron.plan.parts import Efficiencies
from remax_megatron.plan.step_time import StepTime, step_time
from remax_megatron.plan.suggest import Search, Suggestion, fewest_devices

CAVEAT = "counted and modelled, not measured on a GPU"
PARTS_SHOWN = 3  # of a phase's time


@dataclass(frozen=True)
class Question:
    """What is asked: the settings, the model, the devices and the lengths, and what runs have measured.

    suggest  devices to search settings for; None: none are searched
    """

    name: str
    config: Config
    facts: ModelFacts
    world_size: int
    machine: Machine
    lengths: Lengths
    calibration: Calibration
    suggest: int | None
    notes: tuple[str, ...] = ()


def main(argv: Sequence[str] | None = None) -> int:
    """Answer, print, and say by the exit code whether it fits."""
    with cli.reported_errors():
        question = asked(sys.argv[1:] if argv is None else argv)
    if question.suggest is not None:
        return show_suggestions(question)
    made = memory(question.config, question.facts, question.world_size, question.machine)
    time = step_time(question.config, question.facts, question.world_size, question.machine.gpu, question.lengths)
    print("\n".join([*headline(question), *memory_lines(question, made), *time_lines(question, time)]), flush=True)
    return int(not made.fits)


def asked(argv: Sequence[str]) -> Question:
    """Read the command line. ConfigError for settings that the trainer refuses; `--help` prints and exits 0."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--gpu")
    parser.add_argument("--lengths", default=DEFAULT)
    parser.add_argument("--calibrate", action="append", default=[])
    parser.add_argument("--suggest", nargs="?", type=int, const=0)
    options, rest = parser.parse_known_args(argv)
    if options.help:
        print(__doc__)
        raise SystemExit(0)
    request = cli.parse(rest)
    loaded = load_config(request.config_name, request.overrides, request.config_dir)
    config = loaded.config
    on_cpu = expects_cpu(config) if options.gpu is None else options.gpu == gpus.DEFAULT_ON_CPU
    config.trainer.device = "cpu" if on_cpu else "cuda"
    gpu = gpus.gpu_named(options.gpu or (gpus.DEFAULT_ON_CPU if on_cpu else gpus.DEFAULT))
    world_size = config.trainer.nnodes * config.trainer.n_gpus_per_node
    facts = sizes_of(config.actor_rollout_ref.model.path, config.trainer.prepare_command)
    notes = (*loaded.notes, *validate(config, world_size, facts))
    if options.suggest is not None and options.suggest < 0:
        raise ConfigError(f"--suggest={options.suggest} is no number of devices; set it to 1 or more")
    found = calibrate([read_run(path) for path in options.calibrate], gpu) if options.calibrate else None
    calibration = found or Calibration(Efficiencies())
    machine = Machine(gpu, on_cpu, calibration.asleep, calibration.beside)
    suggest = None if options.suggest is None else options.suggest or world_size
    return Question(
        request.config_name,
        config,
        facts,
        world_size,
        machine,
        lengths_named(options.lengths),
        calibration,
        suggest,
        notes,
    )


# -- the screen --------------------------------------------------------------------------------------------------------


def headline(question: Question) -> Iterator[str]:
    """Say what is planned, by what, and how well it fits what was measured."""
    megatron, rollout = question.config.actor_rollout_ref.actor.megatron, question.config.actor_rollout_ref.rollout
    tp, pp = megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size
    sides = sides_of(question.config, question.world_size)
    own, dp, engine_tp = sides.engine * sides.is_split, sides.policy // (tp * pp), rollout.tensor_model_parallel_size
    layout = f"TP {tp}, PP {pp}, DP {dp}, engine TP {engine_tp}{f' on {own} ranks of its own' if own else ''}"
    stack = question.machine.stack(question.config)
    yield f"{question.name}: {question.world_size} x {question.machine.gpu.name}, {layout}, {stack.layers} layers"
    yield f"{CAVEAT}; docs/planning.md says what is assumed"
    yield from (f"note: {note}" for note in question.notes)
    calibration = question.calibration
    if calibration.before:
        yield "calibrated; mean error of each phase's time before and after, on the runs that were fitted:"
        after = calibration.after
        said = (f"{name} {error:.0%} -> {after[name]:.0%}" for name, error in calibration.before.items())
        yield f"  {', '.join(said)}"


def memory_lines(question: Question, made: Memory) -> Iterator[str]:
    """Say the memory of the rank that needs most, whether it fits, and what would."""
    config, facts, machine = question.config, question.facts, question.machine
    yield f"\nmemory of rank {made.rank} (pipeline stage {made.made.stage}), which needs most; phases are not summed"
    yield table(made.made)
    engine = ", ".join(f"{name} {gb(size)}" for name, size in engine_terms(config, facts, machine).items())
    yield f"the engine's share: {engine}"
    asleep = "not known before a run" if machine.asleep is None else f"{gb(machine.asleep)} measured"
    yield (
        f"not counted, of {gb(machine.gpu.memory - made.limit)} left for it: contexts, communicators, fragments, "
        f"what the engine keeps asleep ({asleep})"
    )
    checkpoints, export = disk_bytes(config, facts)
    offloaded = host_bytes(config, facts, question.world_size)
    host = "" if machine.on_cpu else f"host memory of offloads {gb(offloaded)} per node; "
    yield f"{host}disk: checkpoints {gb(checkpoints)}, exported model {gb(export)}"
    if made.fits:
        yield f"fits: {made.phase} leaves {gb(made.headroom)} of {gb(made.limit)}"
    else:
        yield from refusal(question, made)
    budget = largest_budget(config, facts, question.world_size, machine)
    yield f"largest token budget that fits: {budget or 'none'}"
    fewest = fewest_devices(config, facts, machine)
    yield f"fewest devices that hold the model, with full recompute and all offloads: {fewest or 'more than 1024'}"


def refusal(question: Question, made: Memory) -> Iterator[str]:
    """Say by how much it does not fit, and the nearest setting that does: one change, else the fastest layout."""
    config, facts, world_size = question.config, question.facts, question.world_size
    what = "the engine's share holds its weights and the longest answer" if made.phase == ENGINE else "is safe"
    yield f"does NOT fit: {made.phase}, rank {made.rank}: {gb(made.over)} more than {what}"

    def need(changed: Config) -> int:
        found = memory(changed, facts, world_size, question.machine)
        return found.limit + found.over

    change = fitting_change(config, facts, world_size, made.limit, need)
    if change is not None:
        yield f"nearest setting that fits: {change.key}={change.value}"
        return
    best = search(question, world_size).best(1)
    if best:
        yield "no single change makes it fit; the fastest settings that do on these devices:"
        yield from (f"  {text}" for text in overrides(best[0], config))
    else:
        yield "no setting of this model fits these devices: take more of them, or shorter answers"


def time_lines(question: Question, made: StepTime) -> Iterator[str]:
    """Say how long each phase takes, and what binds it."""
    efficiencies = question.calibration.efficiencies
    total = made.seconds(efficiencies)
    data = question.config.data
    yield f"\ntime of a step, {question.lengths.described((data.max_prompt_length, data.max_response_length))}"
    for name, phase in made.phases.items():
        seconds = phase.seconds(efficiencies)
        parts = sorted(phase.parts, key=lambda part: -part.seconds(efficiencies))[:PARTS_SHOWN]
        said = ", ".join(f"{part.name} {part.seconds(efficiencies):.2f}" for part in parts)
        yield f"  {name:8} {seconds:9.2f} s {seconds / total:5.0%}  bound by {phase.bound(efficiencies)}: {said}"
    per_device = (made.num_tokens / total) / question.world_size
    yield f"  step     {total:9.2f} s        {per_device:,.0f} trained tokens/s per device"
    yield (
        f"  micro-batches {made.microbatches}, imbalance {made.imbalance:.2%}, pipeline bubble {made.bubble:.1%}, "
        f"tail of the rollout {made.tail:.0%} of its steps"
    )


def search(question: Question, world_size: int) -> Search:
    """Make the search for settings on `world_size` devices."""
    efficiencies = question.calibration.efficiencies
    return Search(question.config, question.facts, world_size, question.machine, question.lengths, efficiencies)


def overrides(suggestion: Suggestion, config: Config) -> list[str]:
    """Write a suggestion as key=value, without what `config` has already."""
    changed = {key: value for key, value in suggestion.changes.items() if value_of(config, key) != value}
    return [f"{key}={'null' if value is None else value}" for key, value in changed.items()]


def show_suggestions(question: Question) -> int:
    """Print the fastest settings on the devices that are asked for; 1 where none fits, else 0."""
    assert question.suggest is not None
    devices = question.suggest
    print(f"{question.name}: {devices} x {question.machine.gpu.name}, {question.lengths.name} lengths; {CAVEAT}")
    found = search(question, devices).best()
    for number, one in enumerate(found, start=1):
        print(f"{number}. {one.seconds:.2f} s a step, {gb(one.headroom)} of headroom")
        for text in overrides(one, question.config):
            print(f"     {text}")
    if not found:
        print("no setting fits: take more devices, or shorter answers")
    return int(not found)


if __name__ == "__main__":
    sys.exit(main())
