"""Remarks on legal settings that have no effect here."""

from __future__ import annotations

from collections.abc import Iterator

from remax_megatron.config.rules.ranks import OFFLOADS
from remax_megatron.config.rules.registry import Setup, remark
from remax_megatron.config.schema import (
    ACTOR,
    CRITIC,
    CRITIC_MEGATRON,
    MEGATRON,
    ROLLOUT,
    SETTINGS,
    as_list,
    needs_reference,
)
from remax_megatron.config.setting import value_of

OF_THE_CRITIC = ("algorithm.lam", "trainer.critic_warmup", *(key for key in SETTINGS if key.startswith(f"{CRITIC}.")))


@remark
def offload_on_cpu(setup: Setup) -> Iterator[str]:
    """Offloads do nothing on a CPU."""
    for group in (MEGATRON, CRITIC_MEGATRON) if setup.has_critic else (MEGATRON,):
        switched_on = [name for name in OFFLOADS if value_of(setup.config, f"{group}.{name}")]
        if switched_on and setup.on_cpu:
            yield f"{group}.{{{','.join(switched_on)}}}=True has no effect: the run is on the CPU"


@remark
def param_offload_on_gpu(setup: Setup) -> Iterator[str]:
    """The policy's weights stay on the GPU."""
    for_critic = setup.has_critic and setup.config.critic.megatron.param_offload is None
    if setup.megatron.param_offload and not setup.on_cpu:
        yield (
            f"{MEGATRON}.param_offload=True {'acts on the critic alone' if for_critic else 'has no effect'}: the canary"
            " of every weight sync needs the policy's weights beside the engine; grad_offload and optimizer_offload do"
            " free memory during rollouts"
        )


@remark
def reference_offload(setup: Setup) -> Iterator[str]:
    """The reference's offload does nothing without a reference."""
    if setup.config.actor_rollout_ref.ref.megatron.param_offload and not needs_reference(setup.config):
        yield "actor_rollout_ref.ref.megatron.param_offload=True has no effect: no KL term asks for a reference policy"


@remark
def kl_numbers_without_kl(setup: Setup) -> Iterator[str]:
    """Settings of a KL do nothing where it is off."""
    of_reward = ("kl_penalty", "kl_reward_mode", *(f"kl_ctrl.{n}" for n in ("type", "kl_coef", "horizon", "target_kl")))
    for switch, keys in (
        ("algorithm.use_kl_in_reward", [f"algorithm.{name}" for name in of_reward]),
        (f"{ACTOR}.use_kl_loss", [f"{ACTOR}.kl_loss_coef", f"{ACTOR}.kl_loss_type"]),
    ):
        for key in keys:
            value = value_of(setup.config, key)
            if value != SETTINGS[key].default and not value_of(setup.config, switch):
                yield f"{key}={value} has no effect: {switch}=False"


@remark
def reinforce_has_no_ratio(setup: Setup) -> Iterator[str]:
    """Without a ratio, later updates of a batch are off-policy."""
    updates = setup.config.data.train_batch_size // setup.mini_batch * setup.actor.ppo_epochs
    if setup.actor.policy_loss == "reinforce" and updates > 1:
        yield f"{ACTOR}.policy_loss=reinforce makes {updates} updates per batch, all but the first off-policy"


@remark
def answers_written_ahead_differ(setup: Setup) -> Iterator[str]:
    """Answers of older weights are not expected to have the policy's log-probabilities."""
    if setup.rollout.ahead and setup.rollout.mismatch_threshold is not None:
        yield (
            f"{ROLLOUT}.mismatch_threshold={setup.rollout.mismatch_threshold} has no effect: with {ROLLOUT}.ahead=1 the"
            " answers are of other weights; the canary compares engine and policy after every weight sync"
        )


@remark
def settings_of_the_other_device(setup: Setup) -> Iterator[str]:
    """Some settings of the engine act on a CPU alone, or on a GPU alone."""
    on_cpu = setup.on_cpu
    for name in ("gpu_memory_utilization", "enforce_eager") if on_cpu else ("kv_cache_gib",):
        key = f"{ROLLOUT}.{name}"
        if value_of(setup.config, key) != SETTINGS[key].default:
            yield f"{key}={value_of(setup.config, key)} has no effect: the run is on the {'CPU' if on_cpu else 'GPU'}"


@remark
def greedy_validation(setup: Setup) -> Iterator[str]:
    """A greedy validation samples nothing."""
    val = setup.rollout.val_kwargs
    for name, without_effect in (("temperature", (0.0, 1.0)), ("top_p", (1.0,)), ("top_k", (-1, 0, 1))):
        value = getattr(val, name)
        if not val.do_sample and value not in without_effect:
            yield f"{ROLLOUT}.val_kwargs.{name}={value} has no effect: do_sample=False is greedy"


@remark
def unused_numbers_of_the_learning_rate(setup: Setup) -> Iterator[str]:
    """A learning rate that does not decay has no end, and a warmup has one length."""
    for group, settings in setup.trained:
        optim, key = settings.optim, f"{group}.optim"
        warms_up_by_share = optim.lr_warmup_steps_ratio > 0 and optim.lr_warmup_steps <= 0
        if optim.lr_warmup_steps_ratio > 0 and optim.lr_warmup_steps > 0:
            yield (
                f"{key}.lr_warmup_steps_ratio={optim.lr_warmup_steps_ratio} has no effect: lr_warmup_steps="
                f"{optim.lr_warmup_steps} goes before it"
            )
        if optim.lr_decay_style == "constant":
            if optim.min_lr:
                yield f"{key}.min_lr={optim.min_lr} has no effect: lr_decay_style=constant"
            if optim.lr_decay_steps is not None and not warms_up_by_share:
                yield f"{key}.lr_decay_steps={optim.lr_decay_steps} has no effect: lr_decay_style=constant"


@remark
def resume_path_without_mode(setup: Setup) -> Iterator[str]:
    """A path to resume from is read in one mode only."""
    trainer = setup.config.trainer
    if trainer.resume_from_path and trainer.resume_mode != "path":
        yield (
            f"trainer.resume_from_path={trainer.resume_from_path} has no effect: resume_mode={trainer.resume_mode};"
            " it is read with resume_mode=path"
        )


@remark
def critic_without_one(setup: Setup) -> Iterator[str]:
    """Settings of the critic do nothing where there is none."""
    given = {key: value_of(setup.config, key) for key in OF_THE_CRITIC}
    changed = [f"{key}={value}" for key, value in given.items() if value != SETTINGS[key].default]
    if changed and not setup.has_critic:
        yield (
            f"{', '.join(changed)} {'has' if len(changed) == 1 else 'have'} no effect: algorithm.adv_estimator="
            f"{setup.config.algorithm.adv_estimator} has no critic"
        )


@remark
def unused_micro_batch_size(setup: Setup) -> Iterator[str]:
    """A number of rows does nothing where micro-batches are packed by tokens."""
    for group in (ACTOR, CRITIC) if setup.has_critic else (ACTOR,):
        key = f"{group}.ppo_micro_batch_size_per_gpu"
        if setup.actor.use_dynamic_bsz and value_of(setup.config, key) is not None:
            yield f"{key}={value_of(setup.config, key)} has no effect: use_dynamic_bsz=True packs by tokens"


@remark
def no_validation_data(setup: Setup) -> Iterator[str]:
    """Without validation data there is no validation."""
    if not as_list(setup.config.data.val_files):
        yield "data.val_files is not set: there will be no validation"
