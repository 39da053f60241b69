"""Settings of a small run of the demo's model for tests: rewards are a hash of the answer, so that every step has a
gradient, and weights move by more than rounding."""

from __future__ import annotations

from pathlib import Path

from remax_megatron.demo.word_problems import ensure_data
from tests.checkpoint.test_resume import REWARD


def small_run(policy: str, folder: Path) -> list[str]:
    """Overrides of the demo preset; the reward and the data are made in `folder`."""
    (folder / "reward.py").write_text(REWARD)
    train, _ = ensure_data(folder / "data")
    return [
        f"actor_rollout_ref.model.path={policy}",
        f"custom_reward_function.path={folder / 'reward.py'}",
        f"data.train_files={train}",
        "data.train_batch_size=8",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=512",
        "actor_rollout_ref.actor.optim.lr=1e-3",
    ]
