"""From the rows of a rollout batch to optimizer steps: what must be known of the rows first, what can be left out.

    rewards -> advantages (algorithm/estimators) -> a KL in the reward, if any -> the critic's part, if there is one
    (critic_update.py) -> mini-batches -> weights of the tokens
    -> rows without a gradient dropped -> old log-probabilities where a ratio can differ from 1 -> updates

Every rank calls with the same rows and comes to the same decisions. What an update must not be made of is guards.py.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from remax_megatron.algorithm.advantages import are_informative, training_rows
from remax_megatron.algorithm.aggregation import weigh_rows
from remax_megatron.algorithm.bounds import Bounds
from remax_megatron.algorithm.estimators.reward_softmax import effective_sample_size
from remax_megatron.algorithm.kl import AdaptiveKl, FixedKl, kl_controller, token_kl, with_kl_in_reward
from remax_megatron.algorithm.refill import weight_factor
from remax_megatron.algorithm.rejection import SUMS as REJECTION_SUMS
from remax_megatron.algorithm.rejection import kept_rows, rejection_metrics
from remax_megatron.batching.packed import row_groups
from remax_megatron.config.schema import Config, estimator_of, rejection_of, skips_zero_advantage
from remax_megatron.flops import RowGroup
from remax_megatron.guards import Guards, mismatch_limit
from remax_megatron.phases import PhaseTimer
from remax_megatron.stalls import Stalls
from remax_megatron.types import Rollout, Row

if TYPE_CHECKING:
    from remax_megatron.critic_update import CriticLearner
    from remax_megatron.policy.policy import Policy
    from remax_megatron.policy.reference import Reference
    from remax_megatron.policy.trained_model import UpdateResult

log = logging.getLogger(__name__)


@dataclass
class LearnResult:
    """The rows of a batch, the optimizer steps that were taken, the rows that were computed for them, once per pass, as
    they were packed, and the metrics of what was left out or added."""

    rows: list[Row]
    updates: list[UpdateResult]
    packed: list[RowGroup]
    metrics: dict[str, float] = field(default_factory=dict)


class Learner:
    """The policy, the reference where a KL asks for one, PPO's critic, and the settings of the algorithm."""

    def __init__(
        self,
        config: Config,
        policy: Policy,
        reference: Reference | None,
        timer: PhaseTimer | None = None,
        critic: CriticLearner | None = None,
    ):
        self.config, self.policy, self.reference, self.critic = config, policy, reference, critic
        self.timer = timer or PhaseTimer()
        algorithm, control = config.algorithm, config.algorithm.kl_ctrl
        self.estimator = estimator_of(config)
        self.kl: FixedKl | AdaptiveKl = FixedKl(0.0)
        if algorithm.use_kl_in_reward:
            self.kl = kl_controller(control.type, control.kl_coef, control.target_kl, control.horizon)
        self.skips = skips_zero_advantage(config)
        correction, actor = algorithm.rollout_correction, config.actor_rollout_ref.actor
        self._has_ratio = actor.policy_loss == "ppo_clip" or correction.rollout_is is not None
        self._has_ratio |= correction.rollout_rs is not None
        self._rejection = rejection_of(correction) if correction.rollout_rs_denominator == "kept" else None
        rollout, dtype = config.actor_rollout_ref.rollout, actor.megatron.dtype
        self.stalls = Stalls()
        self.guards = Guards(
            policy,
            Path(config.trainer.default_local_dir) / "guards",
            max_nonfinite=config.trainer.max_nonfinite_updates,
            # Answers that are written ahead are of older weights, whose log-probabilities differ by more than rounding.
            mismatch_limit=None
            if rollout.ahead
            else mismatch_limit(rollout.mismatch_threshold, dtype, rollout.dtype or dtype),
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know of the batches before, for JSON."""
        critic = {} if self.critic is None else {"critic": self.critic.state_dict()}
        return {"kl": self.kl.state_dict(), "stalls": self.stalls.state_dict(), **self.guards.state_dict(), **critic}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.kl.load_state_dict(state["kl"])
        self.guards.load_state_dict(state)
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])
        if "stalls" in state:  # checkpoints of earlier versions have none
            self.stalls.load_state_dict(state["stalls"])

    def learn(self, rollouts: Sequence[Rollout], label: str, step: int = 0) -> LearnResult:
        """Take all optimizer steps of one rollout batch, the run's `step`. Collective; `label` begins the lines of the
        log. NonFiniteError or MismatchError, on every rank, when the run has to stop."""
        actor = self.config.actor_rollout_ref.actor
        rows = training_rows(rollouts, self.estimator)
        with self.timer.phase("score"):
            metrics = self._make_advantages(rows)
        of_policy = rows
        if self.critic is not None:
            metrics |= self.critic.learn(rows, len(rollouts), label, step)
            of_policy = [] if self.critic.is_warming_up(step) else rows
        refills, wanted = self.config.algorithm.refill, self.config.data.train_batch_size
        mini_batch = len(rollouts) if refills else actor.ppo_mini_batch_size or len(rollouts)
        size = mini_batch * self.config.actor_rollout_ref.rollout.n
        parts = [of_policy[i : i + size] for i in range(0, len(of_policy), size)]
        if self._rejection is not None:
            with self.timer.phase("score"):
                parts = self._reject(parts, self._rejection, metrics)
        for part in filter(None, parts):
            weigh_rows(part, actor.loss_agg_mode)
        if refills:
            metrics |= refill_weights(rows, are_informative(rollouts, self.estimator), wanted)
        if self.skips:
            parts = [[row for row in part if any(row.advantages)] for part in parts]
        trained = [row for part in parts for row in part]
        with self.timer.phase("score"):
            self._add_logprobs(trained, num_updates=sum(bool(part) for part in parts) * actor.ppo_epochs)
        packed: list[RowGroup] = []
        updates = self._updates([part for part in parts * actor.ppo_epochs if part], label, step, packed)
        if len(updates) < len(parts) * actor.ppo_epochs:
            left = len(parts) * actor.ppo_epochs - len(updates)
            why = "" if self._rejection is None else ", or every answer is rejected"
            log.info("%s: %d update(s) left out: every advantage in them is 0%s", label, left, why)
        if self.estimator.name == "reward_softmax":
            rewards = [[sample.reward for sample in rollout.samples] for rollout in rollouts]
            temperature = self.config.algorithm.reward_softmax_temperature
            metrics["advantage/effective_sample_size"] = effective_sample_size(rewards, temperature)
        metrics |= self.guards.metrics(updates) | _left_out(rows, trained, updates)
        made = metrics.get("critic/num_updates", 0) + sum(not update.skipped for update in updates)
        metrics |= self.stalls.observe(rollouts, int(made))
        return LearnResult(rows, updates, packed, metrics)

    def _make_advantages(self, rows: list[Row]) -> dict[str, float]:
        """Make advantages of outcomes, by a KL in the reward and a critic where there are any; returns the metrics."""
        outcomes = [row.advantages[0] if row.advantages else 0.0 for row in rows]
        beta, mode = self.kl.coef, self.config.algorithm.kl_reward_mode
        kls, metrics = None, {}
        if self.config.algorithm.use_kl_in_reward:
            kls, metrics = self._kls(rows)
        if self.critic is not None:
            metrics |= self.critic.advantages(rows, outcomes, kls, beta)
        elif kls is not None:
            for row, outcome, kl in zip(rows, outcomes, kls, strict=True):
                if not row.masked:
                    row.advantages = with_kl_in_reward(outcome, kl, beta, mode)
        return metrics

    def _kls(self, rows: list[Row]) -> tuple[list[list[float]], dict[str, float]]:
        """The KL of every token, by which the coefficient is then adapted, and the metrics."""
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
        means = [sum(kl) / len(kl) for kl in kls if kl]
        mean = sum(means) / max(len(means), 1)
        metrics = {"kl/reward_mean": mean, "kl/coef": self.kl.coef}
        if math.isfinite(mean):  # otherwise the loss is not finite either, and the guards have it
            self.kl.update(mean, len(rows))
        return kls, metrics

    def _reject(self, parts: Sequence[list[Row]], bounds: Bounds, metrics: dict[str, float]) -> list[list[Row]]:
        """What is kept of `parts`, before anything is counted; [] of one without a token that is. Adds to `metrics`."""
        rows = [row for part in parts for row in part if row.response_ids]
        if any(row.old_logprobs is None for row in rows):
            for row, logprobs in zip(rows, self.policy.logprobs(rows), strict=True):
                row.old_logprobs = logprobs
        ours, engines = ([x for row in rows for x in getattr(row, f"{name}_logprobs")] for name in ("old", "rollout"))
        lengths = [len(row.response_ids) for row in rows]
        kept, sums = kept_rows(torch.tensor(ours), torch.tensor(engines), lengths, bounds)
        metrics |= rejection_metrics(dict(zip(REJECTION_SUMS, sums.tolist(), strict=True)))
        rejected = {id(row) for row, is_kept in zip(rows, kept.tolist(), strict=True) if not is_kept}
        left = [[row for row in part if id(row) not in rejected] for part in parts]
        return [part if any(row.response_ids for row in part) else [] for part in left]

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
        """Take an optimizer step on each of `parts`; what each computes is added to `packed`."""
        updates: list[UpdateResult] = []
        for number, part in enumerate(parts, start=1):
            update = self._update(part, label, self.guards.mismatch_limit(updates), packed)
            updates.append(update)
            self.guards.check(update, part, label=label, number=number, count=len(parts), step=step)
        return updates

    def _update(self, rows: list[Row], label: str, limit: float | None, packed: list[RowGroup]) -> UpdateResult:
        schedule, actor = self.policy.schedule(rows), self.config.actor_rollout_ref.actor
        for rank in schedule:
            for batch in rank:
                packed += row_groups(rows, batch, actor.share_prompts)
                if actor.use_dynamic_bsz:
                    num_tokens = self.policy.num_computed_tokens(rows, batch)
                    log.info("%s: Dynamic Batch: %d samples (%d tokens)", label, len(batch), num_tokens)
        return self.policy.update(rows, schedule, self.reference, limit)


def refill_weights(rows: Sequence[Row], informative: Sequence[bool], wanted: int) -> dict[str, float]:
    """Make the weights of `rows` unbiased where further prompts were drawn until `wanted` were informative; the
    prompts are those that were drawn and used. Returns the metrics."""
    factor = weight_factor(sum(informative), len(informative), wanted)
    for row in rows:
        row.weight = None if row.weight is None else row.weight * factor
    return {
        "refill/drawn_prompts": len(informative),
        "refill/informative_share": sum(informative) / len(informative),
        "refill/weight_factor": factor,
    }


def _left_out(rows: Sequence[Row], trained: Sequence[Row], updates: Sequence[UpdateResult]) -> dict[str, float]:
    """Shares, 0 to 1, of the batch's tokens that were never trained, and of the trained ones that sharing saved."""
    total, kept = sum(row.num_tokens for row in rows), sum(row.num_tokens for row in trained)
    packed, computed = (sum(getattr(u, name) for u in updates) for name in ("num_tokens", "num_computed_tokens"))
    return {
        "batch/left_out_token_share": 1 - kept / total,
        "batch/shared_token_share": 1 - computed / packed if packed else 0.0,
    }
