"""All ranks of a world make the same collectives and messages in the same order, through a whole run of one step.

The run is the trainer's own: weight sync with its canary, rollout, scoring, updates, checkpoint. Worlds of up to 64
ranks are played whole; of larger ones the first and the last rank of each stage, between which the others are taken to
do what is asked of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from remax_megatron.config.rules import validate
from tests.fake_cuda.scenario import MEGATRON, refuse, small_config, train
from tests.stand_ins.fake_cuda.models import FACTS
from tests.stand_ins.fake_cuda.processes import Job, Report, play_each
from tests.stand_ins.fake_cuda.replay import Disagreement, replay

ACTOR, ALGORITHM = "actor_rollout_ref.actor", "algorithm"
OFFLOADS = (f"{MEGATRON}.grad_offload=True", f"{MEGATRON}.optimizer_offload=True")
REFERENCE_OFFLOAD = "actor_rollout_ref.ref.megatron.param_offload=True"
SAVE, SAVE_BESIDE = ("trainer.save_freq=1",), ("trainer.save_freq=1", "trainer.async_save=True")
NO_OVERLAP = (f"{MEGATRON}.overlap_grad_reduce=False", f"{MEGATRON}.overlap_param_gather=False")
PPO = ("algorithm.adv_estimator=gae", "critic.ppo_epochs=2")
CRITIC_OFFLOADS = tuple(f"critic.megatron.{name}_offload=True" for name in ("param", "grad", "optimizer"))
UNEVEN = ((17, 26), (17, 1), (17, 9))


def in_loss(kind: str) -> tuple[str, ...]:
    return (f"{ACTOR}.use_kl_loss=True", f"{ACTOR}.kl_loss_type={kind}")


def in_reward(kind: str) -> tuple[str, ...]:
    return (f"{ALGORITHM}.use_kl_in_reward=True", f"{ALGORITHM}.kl_penalty={kind}")


def filled(prompts: int) -> tuple[str, ...]:
    """One or two rows in each micro-batch, and more of them than stages."""
    return (f"data.train_batch_size={prompts}", f"{ACTOR}.ppo_max_token_len_per_gpu=52")


def updates_of(prompts: int) -> tuple[str, ...]:
    """Several updates of so few rows that data-parallel ranks have micro-batches of padding alone."""
    return (f"{ACTOR}.ppo_mini_batch_size={prompts}", f"{ACTOR}.policy_loss=ppo_clip")


@dataclass(frozen=True)
class World:
    tp: int = 1
    pp: int = 1
    dp: int = 1
    vpp: int = 1
    te: bool = False
    tied: bool = False
    overrides: tuple[str, ...] = ()
    lengths: tuple[tuple[int, int], ...] = ((17, 26),)
    act: Callable = train

    @property
    def size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def sample(self) -> list[int]:
        """The first and the last rank of each stage."""
        per_stage = self.tp * self.dp
        return sorted({rank for first in range(0, self.size, per_stage) for rank in (first, first + per_stage - 1)})

    def play(self, ranks: list[int] | None = None) -> list[Report]:
        """Reports of `ranks`, None: of all."""
        overrides = [*self.overrides]
        if self.vpp > 1:
            overrides.append(f"{MEGATRON}.virtual_pipeline_model_parallel_size={self.vpp}")
        if self.te:
            overrides.append(f"{MEGATRON}.layers=transformer_engine")
        config = small_config(*overrides, tp=self.tp, pp=self.pp, dp=self.dp)
        facts = replace(FACTS["tiny" if self.tied else "tiny-untied"], num_layers=self.pp * self.vpp)
        validate(config, self.size, facts)
        chosen = range(self.size) if ranks is None else ranks
        jobs = [Job(config, facts, rank, self.size, self.act, self.lengths) for rank in chosen]
        return play_each(jobs, transformer_engine=self.te)

    def __str__(self) -> str:
        sizes = {"TP": self.tp, "PP": self.pp, "VPP": self.vpp, "DP": self.dp}
        words = [f"{name}{size}" for name, size in sizes.items() if size > 1] or ["one"]
        words += ["TE"] * self.te + ["tied"] * self.tied + ["refused"] * (self.act is refuse)
        return " ".join([*words, *(one.rpartition(".")[2] for one in self.overrides)])


def meet(reports: list[Report]) -> int:
    return replay({report.rank: report.collectives for report in reports})


# Key-value heads are fewer than TP: 2 of the tied model at TP 4, 4 of the untied one at TP 8.
EVERYDAY = [
    World(overrides=(*SAVE, *OFFLOADS)),
    World(tp=2, tied=True, overrides=(*in_loss("full"), REFERENCE_OFFLOAD), lengths=UNEVEN),
    World(tp=2, dp=2, te=True, overrides=(*SAVE_BESIDE, *OFFLOADS, *in_loss("k1")), lengths=UNEVEN),
    World(dp=4, overrides=(*updates_of(1), *in_loss("abs")), act=refuse),
    World(tp=2, pp=2, vpp=2, te=True, tied=True, overrides=(*SAVE_BESIDE, *in_reward("kl"))),
    World(pp=2, dp=2, overrides=(*PPO, *SAVE, *CRITIC_OFFLOADS, *filled(8)), lengths=UNEVEN),
]
LARGE = [
    World(tp=4, dp=2, te=True, tied=True, overrides=(*updates_of(1), *in_reward("low_var_kl"), REFERENCE_OFFLOAD)),
    World(tp=2, pp=2, dp=2, overrides=(*SAVE, *OFFLOADS, *filled(8), *in_loss("mse+")), lengths=UNEVEN),
    World(pp=2, vpp=2, dp=4, overrides=(*updates_of(1), "data.train_batch_size=4"), lengths=UNEVEN),
    World(pp=4, dp=2, tied=True, overrides=(*in_reward("full"), *NO_OVERLAP, *filled(6)), act=refuse),
    World(tp=8, overrides=(*in_loss("low_var_kl+"), *OFFLOADS)),
    World(tp=2, pp=2, dp=2, overrides=(*PPO, *SAVE, *CRITIC_OFFLOADS, *filled(8)), lengths=UNEVEN),
    World(tp=2, pp=2, vpp=2, dp=2, te=True, tied=True, overrides=(*PPO, *SAVE_BESIDE, *OFFLOADS, *updates_of(2))),
    World(pp=8, te=True, overrides=SAVE, lengths=UNEVEN),
    World(tp=4, pp=4, dp=4, overrides=updates_of(4)),
]
SAMPLED = [
    World(tp=8, pp=8, dp=16, te=True, overrides=(*SAVE, *in_loss("k2"), f"{ACTOR}.ppo_max_token_len_per_gpu=512")),
    World(tp=8, dp=128, overrides=OFFLOADS, act=refuse),
    World(dp=512, te=True, tied=True, lengths=UNEVEN),
]


@pytest.mark.parametrize("world", [*EVERYDAY, *(pytest.param(one, marks=pytest.mark.slow) for one in LARGE)], ids=str)
def test_whole_worlds(world: World) -> None:
    """Nothing is unequal, nothing is left over, and the guard refused what it should."""
    reports = world.play()
    assert meet(reports) >= sum(len(report.collectives) for report in reports) / world.size
    assert {report.result.num_refused for report in reports} == {1 if world.act is refuse else 0}


@pytest.mark.slow
@pytest.mark.parametrize("world", SAMPLED, ids=str)
def test_samples_of_large_worlds(world: World) -> None:
    reports = world.play(world.sample)
    assert meet(reports) > 0


def test_what_one_rank_leaves_out() -> None:
    """Whichever collective or message of a rank is taken away, the replay says so."""
    first, second = World(tp=2).play()
    shared = [i for i, call in enumerate(second.collectives) if len(call.group) > 1]
    assert len(shared) > 20
    for i in shared:
        with pytest.raises(Disagreement):
            replay({0: first.collectives, 1: second.collectives[:i] + second.collectives[i + 1 :]})
