"""Ten steps of the training loop leave nothing more on the device than two."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.fake_cuda.scenario import MEGATRON, small_config, train
from tests.stand_ins.fake_cuda.models import FACTS
from tests.stand_ins.fake_cuda.processes import Job, play_each

ACTOR = "actor_rollout_ref.actor"
OFFLOADS = (f"{MEGATRON}.grad_offload=True", f"{MEGATRON}.optimizer_offload=True")
FULL_KL = (
    f"{ACTOR}.use_kl_loss=True",
    f"{ACTOR}.kl_loss_type=full",
    "actor_rollout_ref.ref.megatron.param_offload=True",
)
KL_IN_REWARD = ("algorithm.use_kl_in_reward=True",)
SAVES = ("trainer.save_freq=3", "trainer.async_save=True")
# Overrides, TP, PP, DP; the last rank of each is played.
RUNS = [
    ((), 1, 1, 1),
    ((*OFFLOADS, *FULL_KL), 2, 2, 1),
    ((*OFFLOADS, *KL_IN_REWARD, *SAVES), 1, 1, 2),
]


@pytest.mark.parametrize("transformer_engine", [False, True], ids=["local", "TE"])
def test_ten_steps(transformer_engine: bool) -> None:
    layers = [f"{MEGATRON}.layers=transformer_engine"] if transformer_engine else []
    jobs = []
    for overrides, tp, pp, dp in RUNS:
        config = small_config(*layers, *overrides, "trainer.total_training_steps=10", tp=tp, pp=pp, dp=dp)
        size, facts = tp * pp * dp, replace(FACTS["tiny"], num_layers=pp)
        jobs.append(Job(config, facts, size - 1, size, train, ((17, 26),)))
    for job, report in zip(jobs, play_each(jobs, transformer_engine=transformer_engine), strict=True):
        live = report.result.live_bytes
        assert len(live) == 11
        assert set(live[2:]) == {live[2]}, (job.config, live)
