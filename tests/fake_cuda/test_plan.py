"""The planner's bytes against what a rank of the trainer really allocates, on fake CUDA tensors.

Every layout of the demo's model and of one with 27 million parameters: TP, PP, DP, virtual stages, each recompute, and
fewer key-value heads than TP. And the ranks of 1024 devices, of which each is really built.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.gpu_counts import stage_jobs
from remax_megatron.config.load import load_config
from remax_megatron.config.rules import validate
from remax_megatron.config.schema import Config
from remax_megatron.model_facts import ModelFacts
from remax_megatron.plan.ledger import MicroBatch, Stack, ledger
from tests.stand_ins.fake_cuda.models import FACTS
from tests.stand_ins.fake_cuda.processes import Job, Report, play_each

if TYPE_CHECKING:
    from tests.stand_ins.fake_cuda.rank import Rank

MEGATRON = "actor_rollout_ref.actor.megatron"
RECOMPUTE = f"{MEGATRON}.override_transformer_config.recompute_granularity"
OF_THE_ENGINE = ("engine", "module of the engine", "logits of the canary")  # which a stub stands for here
DEMO = ModelFacts(4, 128, 512, 4, 2, 32, 384, False, 512)  # demo/model_config.py, with its tokenizer's vocabulary


@dataclass(frozen=True)
class Layout:
    model: str
    tp: int = 1
    pp: int = 1
    dp: int = 1
    vpp: int | None = None
    recompute: str = "none"
    dtype: str = "bfloat16"
    row: tuple[int, int] = (64, 192)
    rows: int = 16

    @property
    def facts(self) -> ModelFacts:
        return DEMO if self.model == "demo" else FACTS[self.model]

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def microbatches(self) -> int:
        return self.pp if self.vpp is None else 2 * self.pp

    @property
    def batch(self) -> MicroBatch:
        return MicroBatch(self.rows * sum(self.row), self.rows * self.row[1], self.microbatches)

    @property
    def config(self) -> Config:
        given = {
            f"{MEGATRON}.tensor_model_parallel_size": self.tp,
            f"{MEGATRON}.pipeline_model_parallel_size": self.pp,
            f"{MEGATRON}.virtual_pipeline_model_parallel_size": self.vpp,
            f"{MEGATRON}.sequence_parallel": self.tp > 1,
            f"{MEGATRON}.dtype": self.dtype,
            f"{MEGATRON}.layers": "local",
            RECOMPUTE: self.recompute,
            "data.max_prompt_length": self.row[0],
            "data.max_response_length": self.row[1],
            "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": self.batch.tokens,
            "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,
            "trainer.n_gpus_per_node": min(8, self.world_size),
            "trainer.nnodes": max(1, self.world_size // 8),
        }
        texts = [f"{key}={'null' if value is None else value}" for key, value in given.items()]
        return load_config("qwen2_5_7b", texts).config

    @property
    def stack(self) -> Stack:
        return Stack("local", "varlen" if self.dtype == "bfloat16" else "flex", fused_adam=False)

    def jobs(self, phases: tuple[str, ...] = ("update", "sync")) -> list[Job]:
        return stage_jobs(self.config, self.facts, row=self.row, num_microbatches=self.microbatches, phases=phases)

    def __str__(self) -> str:
        words = [
            f"{name}{size}" for name, size in vars(self).items() if name in ("tp", "pp", "dp", "vpp") and size != 1
        ]
        return " ".join([self.model, *words, self.recompute, self.dtype])


LAYOUTS = [
    Layout("demo"),
    Layout("demo", dtype="float32", dp=2),
    Layout("demo", tp=2, dp=2, recompute="selective"),
    Layout("demo", tp=4, recompute="full"),  # two key-value heads
    Layout("demo", pp=2, tp=2),
    Layout("demo", pp=2, vpp=2, recompute="full"),
    Layout("27m", dp=4),
    Layout("27m", tp=2, recompute="selective"),
    Layout("27m", tp=4, dp=2, recompute="full"),  # two key-value heads
    Layout("27m", tp=2, pp=2, dp=2),
    Layout("27m", pp=4, recompute="full"),
    Layout("27m", pp=2, vpp=2, dp=2),
]


@dataclass(frozen=True)
class Weighed:
    """Does what `steps` does and returns the bytes of weights, gradients and optimizer that the rank has then."""

    steps: Callable[[Rank], Any]

    def __call__(self, rank: Rank) -> dict[str, int]:
        from remax_megatron.policy.training_state import TrainingState

        self.steps(rank)
        model = rank.policy
        state = TrainingState(model)
        return {
            "weights": sum(size(weight) for chunk in model.chunks for weight in chunk.parameters()),
            "gradients": sum(size(buffer.grad_data) for chunk in model.chunks for buffer in chunk.buffers),
            "optimizer": sum(size(part) for owned, _ in state._owned() for part in parts(state, owned)),
        }


def size(tensor: Any) -> int:
    return tensor.numel() * tensor.element_size()


def parts(state: Any, owned: Any) -> list[Any]:
    """Tensors of Adam for a stretch of a parameter; where the weight is its own master that is none of them."""
    return [values for name, values in state._optimizer_state(owned).items() if name != "fp32_param" or is_copy(owned)]


def is_copy(owned: Any) -> bool:
    return owned.parameter.element_size() < 4


@functools.cache
def played() -> dict[Layout, list[Report]]:
    """A rank of each stage of all layouts."""
    by_layout = [[replace(job, act=Weighed(job.act)) for job in layout.jobs()] for layout in LAYOUTS]
    reports = iter(play_each([job for jobs in by_layout for job in jobs], timeout_s=600))
    return {layout: [next(reports) for _ in jobs] for layout, jobs in zip(LAYOUTS, by_layout, strict=True)}


@pytest.mark.timeout(900)  # the first of them plays all
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_what_is_planned_is_allocated(layout: Layout) -> None:
    """Weights, gradients and optimizer to the byte; the peaks of update and sync within 10 %."""
    for stage, report in enumerate(played()[layout]):
        made = ledger(
            layout.config, layout.facts, layout.world_size, batch=layout.batch, stage=stage, stack=layout.stack
        )
        planned = made.phases["optimizer"]
        assert {name: planned[name] for name in ("weights", "gradients", "optimizer")} == report.result
        peak = max(report.phases[name].peak_bytes for name in ("update", "optimizer"))
        assert max(made.peak("update"), made.peak("optimizer")) == pytest.approx(peak, rel=0.1), made.phases
        sync = max(
            sum(size for name, size in made.phases[phase].items() if name not in OF_THE_ENGINE)
            for phase in ("sync", "canary")
        )
        assert sync == pytest.approx(report.phases["sync"].peak_bytes, rel=0.1), made.phases["sync"]


@pytest.mark.timeout(900)
def test_the_ranks_of_1024_devices_are_built() -> None:
    """32B at TP 8, PP 4 and DP 32: one rank of each stage is built and holds what is planned, to the byte."""
    layout = Layout("32b", tp=8, pp=4, dp=32, recompute="full", rows=8)
    validate(layout.config, 1024, layout.facts)
    jobs = [replace(job, act=Weighed(do_nothing)) for job in layout.jobs()]
    assert [job.world_size for job in jobs] == [1024] * 4
    for stage, report in enumerate(play_each(jobs, timeout_s=600)):
        made = ledger(layout.config, layout.facts, 1024, batch=layout.batch, stage=stage, stack=layout.stack)
        planned = made.phases["optimizer"]
        assert {name: planned[name] for name in ("weights", "gradients", "optimizer")} == report.result


def do_nothing(rank: Rank) -> None:
    rank.make_optimizer_state()
