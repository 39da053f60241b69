"""Settings and actions that the tests of this folder share."""

from __future__ import annotations

from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from remax_megatron.config.load import load_config
from remax_megatron.config.schema import Config
from remax_megatron.guards import Skip

if TYPE_CHECKING:
    from tests.stand_ins.fake_cuda.rank import Rank

MEGATRON = "actor_rollout_ref.actor.megatron"
# Four tokens of vocabulary padding, fewer key-value heads than TP 4, rows that do not divide by TP.
SMALL = (
    "data.max_prompt_length=17",
    "data.max_response_length=26",
    "actor_rollout_ref.rollout.n=2",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=96",
    "trainer.val_before_train=False",
    "trainer.test_freq=-1",
    "trainer.save_freq=-1",
    "trainer.export_hf=False",
    "trainer.total_training_steps=1",
)


def small_config(*overrides: str, tp: int = 1, pp: int = 1, dp: int = 1) -> Config:
    """Settings of a small run on `tp * pp * dp` GPUs of one node. All engines have equally many prompts."""
    engine = min(tp * pp, 8)  # GPUs of a replica of the engine; the small models have no more heads
    engines = tp * pp * dp // engine
    sizes = [
        f"{MEGATRON}.tensor_model_parallel_size={tp}",
        f"{MEGATRON}.pipeline_model_parallel_size={pp}",
        f"{MEGATRON}.sequence_parallel={tp > 1}",
        f"actor_rollout_ref.rollout.tensor_model_parallel_size={engine}",
        f"trainer.n_gpus_per_node={tp * pp * dp}",
        f"data.train_batch_size={max(min(pp, 2) * dp, engines)}",
    ]
    return load_config("qwen2_5_7b", [*SMALL, *sizes, *overrides]).config


@dataclass
class Trained:
    """Bytes that live on the device after each weight sync, and the updates that the guard refused."""

    live_bytes: list[int]
    num_refused: int = 0


def train(rank: Rank) -> Trained:
    """The whole training, with one canary."""
    trained = Trained([])
    sync, update = rank.trainer.bridge.sync, rank.policy.update

    def noting_sync() -> Any:
        report = sync()
        trained.live_bytes.append(rank.recorder.live_bytes)
        return report

    def noting_update(*args: Any) -> Any:
        result = update(*args)
        trained.num_refused += bool(result.skipped)
        return result

    del rank.trainer.bridge._canaries[1:]  # each is as good as all, and takes time
    rank.trainer.bridge.sync, rank.policy.update = noting_sync, noting_update
    assert rank.trainer.train()
    return trained


def refuse(rank: Rank) -> Trained:
    """The same, but the first update is one that some rank finds not finite."""
    reasons = iter([Skip.NONFINITE])

    def answer(frame: FrameType, shape: tuple[int, ...]) -> float:
        is_reason = "reason" in frame.f_locals and "skipped" not in frame.f_locals
        return next(reasons, Skip.NONE) if is_reason else 1.0

    rank.recorder.answers["trained_model.py", "_step"] = answer
    return train(rank)
