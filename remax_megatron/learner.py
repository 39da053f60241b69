"""From the rows of a rollout batch to optimizer steps: what must be known of the rows first, what can be left out.

    rewards -> advantages (algorithm/estimators) -> a KL in the reward, if any -> mini-batches -> weights of the tokens
    -> rows without a gradient dropped -> old log-probabilities where a ratio can differ from 1 -> updates

Every rank calls with the same rows and comes to the same decisions. What an update must not be made of is guards.py;
here such updates are counted, reported, and stop the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from remax_megatron.algorithm.advantages import training_rows
from remax_megatron.algorithm.aggregation import weigh_rows
from remax_megatron.algorithm.estimators import get_estimator
from remax_megatron.algorithm.estimators.reward_softmax import effective_sample_size
from remax_megatron.algorithm.kl import AdaptiveKl, FixedKl, kl_controller, token_kl, with_kl_in_reward
from remax_megatron.batching.packed import row_groups
from remax_megatron.config.schema import Config, skips_zero_advantage
from remax_megatron.flops import RowGroup
from remax_megatron.guards import (
    MISMATCH,
    NONFINITE,
    MismatchError,
    NonFiniteError,
    keep,
    mismatch_limit,
    mismatch_records,
    nonfinite_records,
)
from remax_megatron.phases import PhaseTimer
from remax_megatron.types import Rollout, Row

if TYPE_CHECKING:
    from remax_megatron.policy.policy import Policy, UpdateResult
    from remax_megatron.policy.reference import Reference


@dataclass
class Learned:
    """The rows of a batch, the optimizer steps that were taken, the rows that were computed for them, once per pass, as
    they were packed, and the metrics of what was left out or added."""

    rows: list[Row]
    updates: list[UpdateResult]
    packed: list[RowGroup]
    metrics: dict[str, float] = field(default_factory=dict)


class Learner:
    """The policy, the reference where a KL asks for one, and the settings of the algorithm."""

    def __init__(
        self,
        config: Config,
        policy: Policy,
        reference: Reference | None,
        say: Callable[[str], None],
        timer: PhaseTimer | None = None,
    ):
        self.config, self.policy, self.reference, self.say = config, policy, reference, say
        self.timer = timer or PhaseTimer()
        algorithm, control = config.algorithm, config.algorithm.kl_ctrl
        self.estimator = get_estimator(
            algorithm.adv_estimator,
            norm_by_std=algorithm.norm_adv_by_std_in_grpo,
            temperature=algorithm.reward_softmax_temperature,
        )
        self.kl: FixedKl | AdaptiveKl = FixedKl(0.0)
        if algorithm.use_kl_in_reward:
            self.kl = kl_controller(control.type, control.kl_coef, control.target_kl, control.horizon)
        self.skips = skips_zero_advantage(config)
        correction, actor = algorithm.rollout_correction, config.actor_rollout_ref.actor
        self._has_ratio = actor.policy_loss == "ppo_clip" or correction.rollout_is is not None
        rollout, dtype = config.actor_rollout_ref.rollout, actor.megatron.dtype
        self._mismatch_limit = mismatch_limit(rollout.mismatch_threshold, dtype, rollout.dtype or dtype)
        self._guards_dir = Path(config.trainer.default_local_dir) / "guards"
        self.nonfinite_in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know of the batches before, for JSON."""
        return {"kl": self.kl.state_dict(), "nonfinite_in_a_row": self.nonfinite_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kl.load_state_dict(state["kl"])
        self.nonfinite_in_a_row = state["nonfinite_in_a_row"]

    def learn(self, rollouts: Sequence[Rollout], label: str, step: int = 0) -> Learned:
        """Take all optimizer steps of one rollout batch, the run's `step`. Collective; `label` begins the lines of the
        log. NonFiniteError or MismatchError, on every rank, when the run has to stop."""
        actor = self.config.actor_rollout_ref.actor
        rows = training_rows(rollouts, self.estimator)
        with self.timer.phase("score"):
            metrics = self._put_kl_in_reward(rows) if self.config.algorithm.use_kl_in_reward else {}
        size = (actor.ppo_mini_batch_size or len(rollouts)) * self.config.actor_rollout_ref.rollout.n
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        for part in parts:
            weigh_rows(part, actor.loss_agg_mode)
        if self.skips:
            parts = [[row for row in part if any(row.advantages)] for part in parts]
        trained = [row for part in parts for row in part]
        with self.timer.phase("score"):
            self._add_logprobs(trained, num_updates=sum(bool(part) for part in parts) * actor.ppo_epochs)
        packed: list[RowGroup] = []
        updates = self._updates([part for part in parts * actor.ppo_epochs if part], label, step, packed)
        if len(updates) < len(parts) * actor.ppo_epochs:
            left = len(parts) * actor.ppo_epochs - len(updates)
            self.say(f"{label}: {left} update(s) left out: every advantage in them is 0")
        if self.estimator.name == "reward_softmax":
            rewards = [[sample.reward for sample in rollout.samples] for rollout in rollouts]
            temperature = self.config.algorithm.reward_softmax_temperature
            metrics["advantage/effective_sample_size"] = effective_sample_size(rewards, temperature)
        metrics["guard/nonfinite_updates"] = sum(update.skipped == NONFINITE for update in updates)
        metrics["guard/nonfinite_in_a_row"] = self.nonfinite_in_a_row
        return Learned(rows, updates, packed, metrics | _left_out(rows, trained, updates))

    def _put_kl_in_reward(self, rows: list[Row]) -> dict[str, float]:
        """Change the advantages by the KL of every token, then adapt its coefficient; returns the metrics."""
        assert self.reference is not None
        algorithm = self.config.algorithm
        if algorithm.kl_penalty == "full":
            kls = self.policy.full_kl(rows, self.reference)
        else:
            kls = []
            policy, reference = self.policy.logprobs(rows), self.reference.logprobs(rows)
            for row, mine, other in zip(rows, policy, reference, strict=True):
                kls.append(token_kl(torch.tensor(mine), torch.tensor(other), algorithm.kl_penalty).tolist())
                row.old_logprobs, row.ref_logprobs = mine, other
        means = []
        for row, kl in zip(rows, kls, strict=True):
            outcome = row.advantages[0] if row.advantages else 0.0
            row.advantages = with_kl_in_reward(outcome, kl, self.kl.coef, algorithm.kl_reward_mode)
            if kl:
                means.append(sum(kl) / len(kl))
        mean = sum(means) / max(len(means), 1)
        metrics = {"kl/reward_mean": mean, "kl/coef": self.kl.coef}
        if math.isfinite(mean):  # otherwise the loss is not finite either, and the guards have it
            self.kl.update(mean, len(rows))
        return metrics

    def _add_logprobs(self, rows: list[Row], num_updates: int) -> None:
        """Give `rows` the log-probabilities their updates need: the old ones where a ratio can differ from 1."""
        actor = self.config.actor_rollout_ref.actor
        if self.config.algorithm.rollout_correction.bypass_old_logprobs:
            for row in rows:
                row.old_logprobs = row.rollout_logprobs
        elif num_updates <= 1 or not self._has_ratio:
            for row in rows:
                row.old_logprobs = None
        elif any(row.old_logprobs is None for row in rows):
            for row, logprobs in zip(rows, self.policy.logprobs(rows), strict=True):
                row.old_logprobs = logprobs
        if actor.use_kl_loss and actor.kl_loss_type != "full" and any(row.ref_logprobs is None for row in rows):
            assert self.reference is not None
            for row, logprobs in zip(rows, self.reference.logprobs(rows), strict=True):
                row.ref_logprobs = logprobs

    def _updates(self, parts: Sequence[list[Row]], label: str, step: int, packed: list[RowGroup]) -> list[UpdateResult]:
        """An optimizer step on each of `parts`; what each computes is added to `packed`."""
        updates: list[UpdateResult] = []
        for number, part in enumerate(parts, start=1):
            # Until a step is made the weights are those that wrote the answers, and engine and policy must agree.
            limit = self._mismatch_limit if all(update.skipped for update in updates) else None
            update = self._update(part, label, limit, packed)
            updates.append(update)
            if update.skipped == MISMATCH:
                self._stop_for_mismatch(part, update, label, step)
            if update.skipped == NONFINITE:
                self.nonfinite_in_a_row += 1
                self._report_nonfinite(
                    part, update, f"{label}: update {number} of {len(parts)}", f"{step}-update{number}"
                )
            else:
                self.nonfinite_in_a_row = 0
        return updates

    def _update(self, rows: list[Row], label: str, limit: float | None, packed: list[RowGroup]) -> UpdateResult:
        schedule, actor = self.policy.schedule(rows), self.config.actor_rollout_ref.actor
        for rank in schedule:
            for batch in rank:
                packed += row_groups(rows, batch, actor.share_prompts)
                if actor.use_dynamic_bsz:
                    num_tokens = self.policy.num_computed_tokens(rows, batch)
                    self.say(f"{label}: Dynamic Batch: {len(batch)} samples ({num_tokens} tokens)")
        return self.policy.update(rows, schedule, self.reference, limit)

    def _report_nonfinite(self, rows: list[Row], update: UpdateResult, which: str, where: str) -> None:
        """Keep the rows of a skipped update and say it; NonFiniteError when it is one too many. Collective."""
        found = update.nonfinite_rows
        logprobs = self.policy.logprobs([rows[i] for i in found] if found else rows)
        file = self._guards_dir / f"nonfinite-step{where}.jsonl"
        kept = keep(file, nonfinite_records(rows, found, logprobs), self.policy.layout.rank)
        limit = self.config.trainer.max_nonfinite_updates
        blame = f"{len(found)} of {len(rows)} rows have such a loss" if found else "no row's loss is to blame"
        what = f"loss {update.loss:g}, gradient norm {update.grad_norm:g}; {blame}, {kept}"
        if self.nonfinite_in_a_row < limit:
            self.say(
                f"{which} was skipped, the weights were not changed: {what}. {self.nonfinite_in_a_row} in a row, "
                f"trainer.max_nonfinite_updates={limit} end the run"
            )
            return
        raise NonFiniteError(
            f"{which} was skipped, the weights were not changed: {what}. It is number {self.nonfinite_in_a_row} in a "
            f"row, and trainer.max_nonfinite_updates={limit}. Look for what is not finite in that file: advantages "
            "come from the reward function; log-probabilities come from the weights, which a lower "
            "actor_rollout_ref.actor.optim.lr or an actor_rollout_ref.actor.optim.clip_grad of 1.0 may keep sound; "
            "a higher trainer.max_nonfinite_updates skips more"
        )

    def _stop_for_mismatch(self, rows: list[Row], update: UpdateResult, label: str, step: int) -> None:
        """MismatchError with the worst token, after the worst rows are on the disk. Collective."""
        records = mismatch_records(rows, self.policy.logprobs(rows))
        kept = keep(self._guards_dir / f"mismatch-step{step}.jsonl", records, self.policy.layout.rank)
        worst = records[0]["worst"]
        raise MismatchError(
            f"{label}: the rollout engine's log-probabilities are not the policy's: they differ by "
            f"{update.mismatch_mean:.3g} nats on average over {update.num_response_tokens} response tokens, limit "
            f"{self._mismatch_limit:g} (actor_rollout_ref.rollout.mismatch_threshold); worst in row "
            f"{records[0]['row']} at response position {worst['position']}, token {worst['token']}: policy "
            f"{worst['policy']:.6f}, engine {worst['engine']:.6f}; {kept}. No step was made with them. Rounding alone "
            "is within 1e-3 in float32 and 0.2 in bfloat16: set a higher limit only if yours is known to be larger"
        )


def _left_out(rows: Sequence[Row], trained: Sequence[Row], updates: Sequence[UpdateResult]) -> dict[str, float]:
    """Shares, 0 to 1, of the batch's tokens that were never trained, and of the trained ones that sharing saved."""
    total, kept = sum(row.num_tokens for row in rows), sum(row.num_tokens for row in trained)
    packed, computed = (sum(getattr(u, name) for u in updates) for name in ("num_tokens", "num_computed_tokens"))
    return {
        "batch/left_out_token_share": 1 - kept / total,
        "batch/shared_token_share": 1 - computed / packed if packed else 0.0,
    }
