"""What a GPU would have to do in a training step, counted without one: host syncs, kernels, collectives, peak memory.

    python -m benchmarks.gpu_counts --preset qwen2_5_7b [--layers local|transformer_engine] [--top N] [key=value ...]
    make gpu-counts ARGS="--preset qwen2_5_7b actor_rollout_ref.actor.megatron.tensor_model_parallel_size=4"

The trainer's own code runs on fake CUDA tensors (tests/stand_ins/fake_cuda): one rank of every pipeline stage, at the
real sizes of the model. Micro-batches are full: rows of equal length that fill the token budget. Needs the GPU stack's
torch and megatron-core (requirements/gpu.txt), no GPU and no driver; for Transformer Engine's layers its pure-Python
wheel in .te/.

  --model SIZE        0.5b, 1.5b, 3b, 7b, 14b, 32b instead of the preset's model
  --row PROMPT,ANSWER tokens of a row instead of the largest that the settings allow
  --micro-batches N   per update and rank (default 2, with pipeline stages twice their number)
  --phases LIST       of score, update, sync (default all), update among them; alone it is the quickest way to a peak
  --json FILE         all counts, for programs

It counts, it does not measure: no time, no cuDNN, no workspaces, no fragmentation, no vLLM.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remax_megatron.algorithm.aggregation import weigh_rows
from remax_megatron.config import cli
from remax_megatron.config.load import load_config
from remax_megatron.config.rules import validate
from remax_megatron.config.schema import MEGATRON, Config, ConfigError
from remax_megatron.model_facts import ModelFacts
from remax_megatron.plan.fitting import with_setting
from tests.stand_ins.fake_cuda.models import FACTS, facts_of
from tests.stand_ins.fake_cuda.processes import Job, Report, play_each

if TYPE_CHECKING:
    from tests.stand_ins.fake_cuda.rank import Rank

GIB = 2**30
PHASES = ("critic", "score", "update", "sync")


def count(
    config: Config,
    facts: ModelFacts,
    *,
    row: tuple[int, int] | None = None,
    num_microbatches: int | None = None,
    phases: Sequence[str] = PHASES,
) -> list[Counts]:
    """Counts of one rank of every pipeline stage, the first of its tensor- and data-parallel group."""
    jobs = stage_jobs(config, facts, row=row, num_microbatches=num_microbatches, phases=phases)
    with_te = config.actor_rollout_ref.actor.megatron.layers == "transformer_engine"
    return [
        Counts.of(job, report)
        for job, report in zip(jobs, play_each(jobs, transformer_engine=with_te, timeout_s=900), strict=True)
    ]


def stage_jobs(
    config: Config,
    facts: ModelFacts,
    *,
    row: tuple[int, int] | None = None,
    num_microbatches: int | None = None,
    phases: Sequence[str] = PHASES,
) -> list[Job]:
    """What `count` plays."""
    megatron = config.actor_rollout_ref.actor.megatron
    tp, pp = megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size
    world_size = config.trainer.n_gpus_per_node * config.trainer.nnodes
    dp = world_size // (tp * pp)
    rows, lengths = full_rows(config, row)
    batches = num_microbatches or (2 if pp == 1 else 2 * pp)
    act = Steps(rows * batches * dp, batches, tuple(phases))
    return [Job(config, facts, tp * dp * stage, world_size, act, (lengths,)) for stage in range(pp)]


def full_rows(config: Config, row: tuple[int, int] | None = None) -> tuple[int, tuple[int, int]]:
    """How many rows of which (prompt, answer) tokens fill a micro-batch: those given, or equal ones that are no longer
    than the settings allow and leave nothing of the budget."""
    budget, data = config.actor_rollout_ref.actor.ppo_max_token_len_per_gpu, config.data
    if row is not None:
        return budget // sum(row), row
    longest = data.max_prompt_length + data.max_response_length
    count = math.ceil(budget / longest)
    prompt = data.max_prompt_length * (budget // count) // longest
    return count, (prompt, budget // count - prompt)


@dataclasses.dataclass(frozen=True)
class Steps:
    """What a rank does: train a critic on all `num_rows`, if there is one, score a micro-batch of them, train on all,
    send the weights, and where the optimizer was offloaded for that, train again."""

    num_rows: int
    num_microbatches: int
    phases: tuple[str, ...]

    def __call__(self, rank: Rank) -> None:
        rank.make_optimizer_state()
        rows, recorder, critic = rank.rows(self.num_rows), rank.recorder, rank.trainer.learner.critic
        if "critic" in self.phases and critic is not None:
            with recorder.phase("values"):
                critic.advantages(rows, [1.0] * len(rows), None, 0.0)
            critic.learn(rows, rank.job.config.data.train_batch_size, "counted", 1)
            weigh_rows(rows, "token-mean")
        if "score" in self.phases:
            with recorder.phase("score"):
                rank.policy.logprobs(rows[: len(rows) // self.num_microbatches])
        if "update" in self.phases:
            with recorder.phase("update"):
                rank.policy.update(rows)
        if "sync" in self.phases:
            with recorder.phase("sync"):
                rank.trainer.bridge.sync()
        megatron = rank.policy.actor.megatron
        if "sync" in self.phases and (megatron.grad_offload or megatron.optimizer_offload):
            with recorder.phase("update after sync"):
                rank.policy.update(rows)


@dataclasses.dataclass
class Counts:
    """The counts of one rank, and how many micro-batches and layers they are of."""

    report: Report
    num_microbatches: int
    num_layers: int

    @classmethod
    def of(cls, job: Job, report: Report) -> Counts:
        """Those of a job of `stage_jobs`."""
        assert isinstance(job.act, Steps)
        stages = job.config.actor_rollout_ref.actor.megatron.pipeline_model_parallel_size
        return cls(report, job.act.num_microbatches, job.facts.num_layers // stages)

    def syncs(self) -> tuple[Counter, Counter]:
        """Host syncs of an update by line: (those of a micro-batch, all others of the step)."""
        per_batch: Counter = Counter()
        per_step: Counter = Counter()
        for phase in ("update", "optimizer"):
            for key, number in self.report.phases[phase].syncs.items():
                if phase == "update" and number >= self.num_microbatches and number % self.num_microbatches == 0:
                    per_batch[key] += number // self.num_microbatches
                else:
                    per_step[key] += number
        return per_batch, per_step

    @property
    def peak_bytes(self) -> int:
        """Of an update, its optimizer step included; of the one after a sync, where what was offloaded comes back."""
        phases = self.report.phases
        after = " after sync" if "update after sync" in phases else ""
        names = (f"update{after}", f"optimizer{after}")
        return max(phases[name].peak_bytes for name in names if name in phases)

    def kernels(self) -> dict[str, int]:
        """Kernels of a forward pass over one micro-batch, of them a layer's and the head's, and of one in an update."""
        phases, batches = self.report.phases, self.num_microbatches
        score = phases.get("score")
        found = {"update": phases["update"].num_kernels // batches}
        if score is not None:
            found |= {
                "forward": score.num_kernels,
                "layer": score.kernels_of["layer"] // self.num_layers,
                "head": score.kernels_of["head"],
            }
        return found

    def to_json(self) -> dict[str, Any]:
        phases = {
            name: {
                "peak_bytes": phase.peak_bytes,
                "end_bytes": phase.end_bytes,
                "kernels": phase.num_kernels,
                "kernels_of": phase.kernels_of,
                "syncs": {" at ".join(key): number for key, number in phase.syncs.items()},
                "collectives": phase.comm_calls,
                "collective_bytes": phase.comm_bytes,
                "at_peak": dict(phase.at_peak.most_common(20)),
            }
            for name, phase in self.report.phases.items()
        }
        return {"rank": self.report.rank, "micro_batches": self.num_microbatches, "phases": phases}


# -- the screen --------------------------------------------------------------------------------------------------------


def show(counts: Counts, ledger_bytes: int, top: int) -> None:
    """One screen about one rank."""
    batches = counts.num_microbatches
    per_batch, per_step = counts.syncs()
    print(f"host syncs of an update: {sum(per_batch.values())} per micro-batch, {sum(per_step.values())} per step")
    for title, found in (("micro-batch", per_batch), ("step", per_step)):
        for (kind, where), number in found.most_common(top or 8):
            print(f"  {number:6} x per {title}: {kind} at {where}")
    print(f"\n{'phase':20} {'kernels':>9} {'peak GiB':>9} {'after':>9}  collectives (MiB), all {batches} micro-batches")
    for name, phase in counts.report.phases.items():
        calls = ", ".join(
            f"{number} {kind.strip('_')} ({phase.comm_bytes[kind] / 2**20:,.0f})"
            for kind, number in phase.comm_calls.most_common(4)
        )
        print(f"{name:20} {phase.num_kernels:9,} {phase.peak_bytes / GIB:9.2f} {phase.end_bytes / GIB:9.2f}  {calls}")
        for line, size in phase.at_peak.most_common(top):
            print(f"  {size / GIB:9.3f} GiB  {line}")
        for line, number in phase.kernels.most_common(top):
            print(f"  {number:9,} kernels  {line}")
    print(f"\nledger: {ledger_bytes / GIB:.2f} GiB for an update")


def result(all_counts: Sequence[Counts], ledger_bytes: int) -> str:
    """The last line: the largest of every count over the ranks."""
    kernels = [counts.kernels() for counts in all_counts]
    syncs = [[sum(part.values()) for part in counts.syncs()] for counts in all_counts]

    def largest(name: str) -> int:
        return max(one.get(name, 0) for one in kernels)

    return (
        f"RESULT syncs_per_microbatch={max(s[0] for s in syncs)} syncs_per_step={max(s[1] for s in syncs)} "
        f"kernels_forward={largest('forward')} kernels_layer={largest('layer')} kernels_head={largest('head')} "
        f"kernels_update={largest('update')} peak_gib={max(c.peak_bytes for c in all_counts) / GIB:.2f} "
        f"ledger_gib={ledger_bytes / GIB:.2f}"
    )


def ledger(config: Config, facts: ModelFacts, row: tuple[int, int] | None = None, *, released: bool = True) -> int:
    """Bytes that the planner expects an update to take, its optimizer step included, for the micro-batches counted;
    not `released`: nothing was offloaded before."""
    from remax_megatron.plan import ledger as planner

    megatron, (rows, (prompt, answer)) = config.actor_rollout_ref.actor.megatron, full_rows(config, row)
    with_te = megatron.layers == "transformer_engine"
    stack = planner.installed_stack(config)
    if not with_te and not config.actor_rollout_ref.actor.share_prompts and megatron.dtype == "bfloat16":
        stack = planner.Stack("local", "varlen", fused_adam=False)
    batch = planner.MicroBatch(rows * (prompt + answer), rows * answer, 2 * megatron.pipeline_model_parallel_size)
    ranks = config.trainer.n_gpus_per_node * config.trainer.nnodes
    if not released:
        config = with_setting(config, f"{MEGATRON}.optimizer_offload", False)
    made = planner.ledger(config, facts, ranks, batch=batch, stack=stack)
    return max(made.peak("update"), made.peak("optimizer"))


# -- the command -------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="qwen2_5_7b")
    parser.add_argument("--model", choices=sorted(FACTS))
    parser.add_argument("--layers", choices=["local", "transformer_engine"], default="local")
    parser.add_argument("--row", type=lambda text: tuple(map(int, text.split(","))))
    parser.add_argument("--micro-batches", type=int)
    parser.add_argument("--phases", type=lambda text: text.split(","), default=list(PHASES))
    parser.add_argument("--top", type=int, default=0, help="lines by memory and by kernels in each phase")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.ERROR)
    started = time.perf_counter()
    with cli.reported_errors():
        layers = f"actor_rollout_ref.actor.megatron.layers={options.layers}"
        config = load_config(options.preset, [layers, *options.overrides]).config
        facts = FACTS[options.model] if options.model else facts_of(config.actor_rollout_ref.model.path)
        validate(config, config.trainer.n_gpus_per_node * config.trainer.nnodes, facts)
        if set(options.phases) - set(PHASES) or "update" not in options.phases:
            raise ConfigError(f"--phases={','.join(options.phases)}: set it to update, and of {','.join(PHASES)} more")
    found = count(config, facts, row=options.row, num_microbatches=options.micro_batches, phases=options.phases)
    expected = ledger(config, facts, options.row, released="sync" in options.phases)
    worst = max(found, key=lambda counts: counts.peak_bytes)
    ranks = config.trainer.n_gpus_per_node * config.trainer.nnodes
    print(
        f"{options.preset}{f', {options.model}' if options.model else ''}, {options.layers} layers: rank "
        f"{worst.report.rank} of {ranks}, the one that needs most; counted in {time.perf_counter() - started:.0f} s"
    )
    show(worst, expected, options.top)
    if options.json:
        options.json.write_text(
            json.dumps({"ledger_bytes": expected, "ranks": [counts.to_json() for counts in found]}, indent=1)
        )
    print(result(found, expected))
    return 0


if __name__ == "__main__":
    sys.exit(main())
