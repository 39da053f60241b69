"""What policy, reference and critic are told beside their model and layout."""

from __future__ import annotations

from dataclasses import dataclass, field

from remax_megatron.algorithm.losses import Clip
from remax_megatron.algorithm.objective import Objective
from remax_megatron.config.schema import (
    Actor,
    Config,
    RolloutCorrection,
    critic_as_actor,
    importance_of,
    recompute_of,
    rejection_of,
)
from remax_megatron.policy.learning_rate import LearningRate, learning_rate
from remax_megatron.types import NO_RECOMPUTE, Recompute


@dataclass(frozen=True)
class PolicySettings:
    """The actor's settings, the temperature of the rollouts, which the policy's logits are divided by, what the
    backward pass computes again, how the mismatch with the engine is corrected, and the optimizer steps of the whole
    run, which a learning rate that decays needs."""

    actor: Actor
    temperature: float = 1.0
    recompute: Recompute = NO_RECOMPUTE
    correction: RolloutCorrection = field(default_factory=RolloutCorrection)
    total_updates: int | None = None

    @classmethod
    def of(cls, config: Config, total_updates: int | None = None) -> PolicySettings:
        """Take the policy's part out of all settings."""
        return cls(
            config.actor_rollout_ref.actor,
            config.actor_rollout_ref.rollout.temperature,
            recompute_of(config),
            config.algorithm.rollout_correction,
            total_updates,
        )

    @classmethod
    def of_critic(cls, config: Config, total_updates: int | None = None) -> PolicySettings:
        """Take the critic's part out of all settings."""
        return cls(critic_as_actor(config), recompute=recompute_of(config), total_updates=total_updates)

    def learning_rate(self) -> LearningRate:
        """The schedule of the learning rate that these settings describe."""
        return learning_rate(self.actor.optim, self.total_updates)

    def objective(self) -> Objective:
        """The loss that these settings describe."""
        actor, correction = self.actor, self.correction
        low, high = actor.clip_ratio_low, actor.clip_ratio_high
        return Objective(
            policy_loss=actor.policy_loss,
            clip=Clip(
                low=actor.clip_ratio if low is None else low,
                high=actor.clip_ratio if high is None else high,
                dual=actor.clip_ratio_c,
            ),
            entropy_coeff=actor.entropy_coeff,
            kl_kind=actor.kl_loss_type if actor.use_kl_loss else None,
            kl_coef=actor.kl_loss_coef,
            importance_level=correction.rollout_is,
            importance_bounds=importance_of(correction),
            rejection_bounds=rejection_of(correction) if correction.rollout_rs_denominator == "all" else None,
        )
