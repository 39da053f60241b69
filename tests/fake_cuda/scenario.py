"""Settings and actions that the tests of this folder share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from remax_megatron.config.load import load_config
from remax_megatron.config.schema import Config

if TYPE_CHECKING:
    from tests.stand_ins.fake_cuda.rank import Rank

MEGATRON = "actor_rollout_ref.actor.megatron"
# Four tokens of vocabulary padding, fewer key-value heads than TP 4, rows that do not divide by TP.
SMALL = (
    "data.max_prompt_length=17",
    "data.max_response_length=26",
    "actor_rollout_ref.rollout.n=2",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=200",
    "trainer.val_before_train=False",
    "trainer.test_freq=-1",
    "trainer.save_freq=-1",
    "trainer.export_hf=False",
    "trainer.total_training_steps=1",
)


def small_config(*overrides: str, tp: int = 1, pp: int = 1, dp: int = 1) -> Config:
    """Settings of a small run on `tp * pp * dp` GPUs of one node."""
    sizes = [
        f"{MEGATRON}.tensor_model_parallel_size={tp}",
        f"{MEGATRON}.pipeline_model_parallel_size={pp}",
        f"{MEGATRON}.sequence_parallel={tp > 1}",
        f"actor_rollout_ref.rollout.tensor_model_parallel_size={tp * pp}",  # one engine for every replica of the policy
        f"trainer.n_gpus_per_node={tp * pp * dp}",
        f"data.train_batch_size={4 * dp}",
    ]
    return load_config("qwen2_5_7b", [*SMALL, *sizes, *overrides]).config


def train(rank: Rank) -> list[int]:
    """The whole training; bytes that live on the device after each weight sync."""
    live: list[int] = []
    real = rank.trainer.bridge.sync

    def sync():
        report = real()
        live.append(rank.recorder.live_bytes)
        return report

    rank.trainer.bridge.sync = sync
    assert rank.trainer.train()
    return live
