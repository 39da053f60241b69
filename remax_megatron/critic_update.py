"""PPO's other half (algorithm.adv_estimator=gae): values and advantages for the policy's update, and the critic's own.

    values of all tokens -> rewards per token -> GAE -> returns, for the critic; whitened advantages, for the policy
    -> mini-batches -> weights of the tokens -> updates of the critic

No row is left out: the critic learns from each of them, and a whitened advantage is hardly ever 0. An answer that is
masked teaches neither. Every rank calls with the same rows and comes to the same decisions.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remax_megatron.algorithm.aggregation import weigh_rows
from remax_megatron.algorithm.gae import explained_variance, gae, token_rewards, whitened
from remax_megatron.config.schema import Config, critic_as_actor
from remax_megatron.guards import NonFiniteError, save_rows, taught_records
from remax_megatron.phases import PhaseTimer
from remax_megatron.types import Row

if TYPE_CHECKING:
    from remax_megatron.policy.critic import Critic
    from remax_megatron.policy.trained_model import UpdateResult

log = logging.getLogger(__name__)


class CriticLearner:
    """The critic, and the settings of its part of the algorithm."""

    def __init__(self, config: Config, critic: Critic, timer: PhaseTimer):
        self.critic, self._timer, self._settings = critic, timer, critic_as_actor(config)
        self._gamma, self._lam = config.algorithm.gamma, config.algorithm.lam
        self._rows_per_prompt = config.actor_rollout_ref.rollout.n
        self._warmup = config.trainer.critic_warmup
        self._guards_folder = Path(config.trainer.default_local_dir) / "guards"
        self._max_nonfinite = config.trainer.max_nonfinite_updates
        self.nonfinite_in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know of the batches before, for JSON."""
        return {"num_updates": self.critic.num_updates, "nonfinite_in_a_row": self.nonfinite_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, but for the number of updates, which goes with the optimizer's state."""
        self.nonfinite_in_a_row = state["nonfinite_in_a_row"]

    def is_warming_up(self, step: int) -> bool:
        """Whether the critic alone learns in the run's `step`."""
        return step <= self._warmup

    def advantages(
        self, rows: Sequence[Row], outcomes: Sequence[float], kls: Sequence[Sequence[float]] | None, beta: float
    ) -> dict[str, float]:
        """Give `rows` values, returns and whitened advantages; returns the metrics. Collective.

        rows      of a rollout batch
        outcomes  the reward of each
        kls       of each token, None: no KL in the reward
        beta      the coefficient of that KL
        """
        every_value = self.critic.values(rows)
        raw = []
        for number, (row, outcome, values) in enumerate(zip(rows, outcomes, every_value, strict=True)):
            rewards = token_rewards(outcome, len(row.response_ids), kls[number] if kls else None, beta)
            row.values = values
            advantages, row.returns = gae(rewards, values, self._gamma, self._lam)
            raw.append([] if row.masked else advantages)
        for row, advantages in zip(rows, whitened(raw), strict=True):
            row.advantages = advantages or [0.0] * len(row.response_ids)
        values, returns = ([x for row in _taught(rows) for x in getattr(row, name)] for name in ("values", "returns"))
        return {
            "critic/return_mean": sum(returns) / max(len(returns), 1),
            "critic/explained_variance": explained_variance(values, returns),
        }

    def learn(self, rows: Sequence[Row], num_prompts: int, label: str, step: int) -> dict[str, float]:
        """Take the critic's optimizer steps on `rows`, the answers to `num_prompts` prompts; returns the metrics.

        `label` begins the lines of the log, of the run's `step`. Collective. NonFiniteError, on every rank, when too
        many updates in a row were not finite. The weights of the rows are the critic's afterwards.
        """
        with self._timer.phase("critic"):
            size = (self._settings.ppo_mini_batch_size or num_prompts) * self._rows_per_prompt
            parts = [list(rows[i : i + size]) for i in range(0, len(rows), size)]
            for part in parts:
                weigh_rows(part, self._settings.loss_agg_mode)
            parts = [taught for part in parts if (taught := _taught(part))]
            updates = []
            for number, part in enumerate(parts * self._settings.ppo_epochs, start=1):
                updates.append(self.critic.update(part))
                self._check(updates[-1], part, f"{label}: update {number} of the critic", f"{step}-critic{number}")
            self.critic.gather_weights()
            self.critic.release_training_memory()
        return _metrics(updates) | {"guard/critic_nonfinite_updates": sum(bool(one.skipped) for one in updates)}

    def _check(self, update: UpdateResult, rows: list[Row], which: str, where: str) -> None:
        """Count and report an update that was skipped."""
        self.nonfinite_in_a_row = self.nonfinite_in_a_row + 1 if update.skipped else 0
        if not update.skipped:
            return
        file = self._guards_folder / f"nonfinite-step{where}.jsonl"
        saved = save_rows(file, taught_records(rows, update.nonfinite_rows), self.critic.layout.rank)
        count, limit = self.nonfinite_in_a_row, self._max_nonfinite
        what = (
            f"{which} was skipped, its weights were not changed: loss {update.loss:g}, gradient norm "
            f"{update.grad_norm:g}; {saved}."
        )
        if count >= limit:
            raise NonFiniteError(
                f"{what} It is number {count} in a row, and trainer.max_nonfinite_updates={limit}. Look for what "
                "is not finite in that file: returns come from the reward function, values from the critic's weights, "
                "which a lower critic.optim.lr may keep sound; a higher trainer.max_nonfinite_updates skips more"
            )
        log.warning("%s %d in a row, trainer.max_nonfinite_updates=%d end the run", what, count, limit)


def _taught(rows: Sequence[Row]) -> list[Row]:
    """Those that the critic learns from."""
    return [row for row in rows if row.response_ids and not row.masked]


def _metrics(updates: Sequence[UpdateResult]) -> dict[str, float]:
    """Means over the optimizer steps that were made (over the skipped ones when none was)."""
    made = [update for update in updates if not update.skipped]
    counted = made or updates
    if not counted:
        return {"critic/num_updates": 0}
    names = counted[0].metrics
    return {
        **{name: sum(update.metrics[name] for update in counted) / len(counted) for name in names},
        "critic/grad_norm": sum(update.grad_norm for update in counted) / len(counted),
        "critic/lr": updates[-1].learning_rate,
        "critic/num_updates": len(made),
    }
