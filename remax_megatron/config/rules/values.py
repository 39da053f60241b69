"""Rules about single values, about the algorithm's settings with each other, and about what is not offered.

The first two check the facts that the settings declare (config/setting.py); the others are each for one case.
"""

from __future__ import annotations

from remax_megatron.algorithm.estimators import get_estimator
from remax_megatron.config.rules.registry import Setup, one_of, rule
from remax_megatron.config.schema import ACTOR, MEGATRON, ROLLOUT, SETTINGS, ConfigError, importance_of, rejection_of
from remax_megatron.config.setting import value_of


@rule
def known_choices(setup: Setup) -> None:
    """A setting with a list of legal values has one of them."""
    for key, setting in SETTINGS.items():
        value = value_of(setup.config, key)
        if setting.choices is not None and value not in setting.choices:
            names = ", ".join("null" if choice is None else str(choice) for choice in setting.choices)
            raise ConfigError(
                f"{key}={value} is not offered; set it to {one_of(names, len(setting.choices))}{_reason(setting.why)}"
            )


@rule
def numbers_in_range(setup: Setup) -> None:
    """Numbers are finite and within their range."""
    for key, setting in SETTINGS.items():
        value = value_of(setup.config, key)
        if setting.limits is not None and value is not None and not setting.limits.hold(value):
            raise ConfigError(f"{key}={value} is out of range; set it to {setting.limits.words}{_reason(setting.why)}")


def _reason(why: str) -> str:
    return why and f" ({why})"


@rule
def sampling_is_the_policy(setup: Setup) -> None:
    """Answers are sampled from the whole softmax, whose log-probabilities the policy computes."""
    rollout = setup.rollout
    for name, legal, fix in (("top_p", (1.0,), "1.0"), ("top_k", (-1, 0), "-1")):
        value = getattr(rollout, name)
        if value not in legal:
            raise ConfigError(
                f"{ROLLOUT}.{name}={value} makes the engine's logprobs those of a renormalised distribution, not the"
                f" policy's; set {ROLLOUT}.{name}={fix}"
            )


@rule
def temperatures_are_vllms(setup: Setup) -> None:
    """vLLM (0.24 and 0.32) raises a temperature below 0.01 to 0.01 without a word, and refuses one above 2.

    The policy divides its logits by the rollouts' temperature, so that there the two would differ, and at 0 it cannot;
    greedy rollouts would all be the baseline anyway. Validation may be greedy.
    """
    val = setup.rollout.val_kwargs
    for key, temperature, greedy, fix in (
        (f"{ROLLOUT}.temperature", setup.rollout.temperature, False, ""),
        (f"{ROLLOUT}.val_kwargs.temperature", val.temperature, not val.do_sample, ", or do_sample=False for greedy"),
    ):
        if not (0.01 <= temperature <= 2 or (greedy and temperature == 0)):
            raise ConfigError(f"{key}={temperature} is outside what vLLM samples at; set it to 0.01 to 2.0{fix}")


@rule
def validation_answers_differ(setup: Setup) -> None:
    """Several validation answers per prompt have to be sampled."""
    val = setup.rollout.val_kwargs
    if val.n > 1 and not val.do_sample:
        raise ConfigError(
            f"{ROLLOUT}.val_kwargs.n={val.n} with do_sample=False would score the same greedy answer {val.n} times;"
            f" set {ROLLOUT}.val_kwargs.do_sample=True, or n=1"
        )


@rule
def learning_rate_falls(setup: Setup) -> None:
    """A learning rate that decays falls, after the warmup."""
    for group, settings in setup.trained:
        optim, key = settings.optim, f"{group}.optim"
        if optim.lr_decay_style == "constant":
            continue
        if optim.min_lr > optim.lr:
            raise ConfigError(
                f"{key}.min_lr={optim.min_lr} is above {key}.lr={optim.lr}, from which lr_decay_style="
                f"{optim.lr_decay_style} falls; set {key}.min_lr to at most {optim.lr}"
            )
        if optim.lr_decay_steps is not None and optim.lr_decay_steps <= optim.lr_warmup_steps:
            raise ConfigError(
                f"{key}.lr_decay_steps={optim.lr_decay_steps} counts the warmup too and is not above "
                f"{key}.lr_warmup_steps={optim.lr_warmup_steps}; set {key}.lr_decay_steps above it, or to null"
            )


@rule
def only_gae_discounts(setup: Setup) -> None:
    """The reward of a whole answer is not discounted without a critic."""
    gamma = setup.config.algorithm.gamma
    if gamma != 1 and not setup.has_critic:
        raise ConfigError(
            f"algorithm.gamma={gamma} with algorithm.adv_estimator={setup.config.algorithm.adv_estimator}: the reward"
            " of a whole answer is not discounted; set algorithm.gamma=1.0, or algorithm.adv_estimator=gae"
        )


@rule
def gae_sums_the_kl(setup: Setup) -> None:
    """How much of the later KL a token answers for is said once, by gae's own numbers."""
    algorithm = setup.config.algorithm
    if setup.has_critic and algorithm.use_kl_in_reward and algorithm.kl_reward_mode != "to_go":
        raise ConfigError(
            f"algorithm.kl_reward_mode={algorithm.kl_reward_mode} with algorithm.adv_estimator=gae, of which gamma and"
            " lam say for how much of the later KL a token answers; set algorithm.kl_reward_mode=to_go"
        )


@rule
def estimator_has_its_samples(setup: Setup) -> None:
    """Estimators that compare answers need several per prompt."""
    estimator = get_estimator(setup.config.algorithm.adv_estimator)
    if setup.rollout.n < estimator.min_samples:
        raise ConfigError(
            f"{ROLLOUT}.n={setup.rollout.n} with algorithm.adv_estimator={estimator.name}, which compares the answers"
            f" to a prompt; set {ROLLOUT}.n to at least {estimator.min_samples}"
        )


@rule
def zero_advantage_rows_have_no_gradient(setup: Setup) -> None:
    """Rows of advantage 0 are left out only where they have no gradient."""
    actor = setup.actor
    if not actor.skip_zero_advantage:
        return
    if setup.has_critic:
        raise ConfigError(
            f"{ACTOR}.skip_zero_advantage=True with algorithm.adv_estimator={setup.config.algorithm.adv_estimator}: the"
            " critic learns from every row, and whitened advantages are hardly ever 0; set"
            f" {ACTOR}.skip_zero_advantage=null"
        )
    for key in ("algorithm.use_kl_in_reward", f"{ACTOR}.use_kl_loss", f"{ACTOR}.entropy_coeff"):
        if value := value_of(setup.config, key):
            raise ConfigError(
                f"{ACTOR}.skip_zero_advantage=True would change the gradient: with {key}={value} rows of advantage 0"
                f" have one; set {ACTOR}.skip_zero_advantage=null"
            )


@rule
def refilling_is_unbiased(setup: Setup) -> None:
    """Prompts without a gradient are replaced only where they have none, and where the estimate stays unbiased."""
    config = setup.config
    size, limit = config.data.train_batch_size, config.algorithm.refill_limit
    if not config.algorithm.refill:
        return
    if config.algorithm.adv_estimator not in ("remax", "rloo", "grpo"):
        raise ConfigError(
            f"algorithm.refill=True with algorithm.adv_estimator={config.algorithm.adv_estimator}, under which equal"
            " rewards have a gradient too; set algorithm.refill=False, or adv_estimator to remax, rloo or grpo"
        )
    for key in ("algorithm.use_kl_in_reward", f"{ACTOR}.use_kl_loss", f"{ACTOR}.entropy_coeff"):
        if value := value_of(config, key):
            raise ConfigError(
                f"algorithm.refill=True would drop prompts that have a gradient by {key}={value}; set {key}="
                f"{SETTINGS[key].default}, or algorithm.refill=False"
            )
    if setup.mini_batch != size:
        raise ConfigError(
            f"algorithm.refill=True needs one update per batch, but {ACTOR}.ppo_mini_batch_size={setup.mini_batch} is"
            f" less than data.train_batch_size={size}; set {ACTOR}.ppo_mini_batch_size=null"
        )
    if not config.data.shuffle or size < 2:
        key, fix = ("shuffle", "True") if size > 1 else ("train_batch_size", "2 or more")
        raise ConfigError(
            f"algorithm.refill=True is unbiased only for two or more prompts in random order, and data.{key}="
            f"{getattr(config.data, key)}; set data.{key} to {fix}, or algorithm.refill=False"
        )
    if limit is not None and limit < size:
        raise ConfigError(
            f"algorithm.refill_limit={limit} is below data.train_batch_size={size}, whose prompts it counts too; set"
            f" algorithm.refill_limit to at least {size}, or to null"
        )


@rule
def one_correction_of_the_mismatch(setup: Setup) -> None:
    """The mismatch between engine and policy is corrected once."""
    correction = setup.config.algorithm.rollout_correction
    key = "algorithm.rollout_correction"
    if correction.bypass_old_logprobs and correction.rollout_is is not None:
        raise ConfigError(
            f"{key}.bypass_old_logprobs=True with {key}.rollout_is={correction.rollout_is}: PPO's ratio is then already"
            f" the importance weight; set {key}.rollout_is=null or bypass_old_logprobs=False"
        )
    if correction.bypass_old_logprobs and correction.rollout_rs is not None:
        raise ConfigError(
            f"{key}.bypass_old_logprobs=True leaves {key}.rollout_rs={correction.rollout_rs} no log-probabilities of"
            f" the policy to compare; set {key}.rollout_rs=null or bypass_old_logprobs=False"
        )
    if correction.bypass_old_logprobs and setup.actor.policy_loss != "ppo_clip":
        raise ConfigError(
            f"{key}.bypass_old_logprobs=True needs a loss with a ratio, but {ACTOR}.policy_loss="
            f"{setup.actor.policy_loss}; set {ACTOR}.policy_loss=ppo_clip"
        )


@rule
def answers_written_ahead_are_corrected(setup: Setup) -> None:
    """Answers of weights that are one step older are weighed, or clipped, against the engine's log-probabilities."""
    correction, key = setup.config.algorithm.rollout_correction, "algorithm.rollout_correction"
    corrected = correction.rollout_is is not None or correction.bypass_old_logprobs
    if setup.sides.is_split and setup.rollout.ahead and not corrected:
        raise ConfigError(
            f"{ROLLOUT}.ahead=1 trains on answers of weights one step older, and nothing corrects for that; set"
            f" {key}.rollout_is=token (or sequence), which weighs them, or {key}.bypass_old_logprobs=True, which takes"
            " PPO's clipped ratio against the weights that wrote them"
        )


@rule
def thresholds_are_bounds(setup: Setup) -> None:
    """The thresholds of the corrections are a number or two, in order."""
    correction, key = setup.config.algorithm.rollout_correction, "algorithm.rollout_correction"
    try:
        importance_of(correction)
    except ValueError:
        raise ConfigError(
            f"{key}.rollout_is_threshold={correction.rollout_is_threshold} is no threshold; set it to a number greater"
            " than 0, or to LOWER_UPPER, such as 0.5_5.0"
        ) from None
    try:
        rejection_of(correction)
    except ValueError:
        given = "null" if correction.rollout_rs_threshold is None else correction.rollout_rs_threshold
        raise ConfigError(
            f"{key}.rollout_rs={correction.rollout_rs} with {key}.rollout_rs_threshold={given}, which is no threshold;"
            f" set {key}.rollout_rs_threshold to LOWER_UPPER, both greater than 0, such as 0.99_1.01, or to a number"
            " of at least 1"
        ) from None


@rule
def kl_controller_can_move(setup: Setup) -> None:
    """An adaptive coefficient must stay above 0: one batch moves it by at most 0.2 x its answers / horizon."""
    control, answers = setup.config.algorithm.kl_ctrl, setup.config.data.train_batch_size * setup.rollout.n
    if not setup.config.algorithm.use_kl_in_reward or control.type != "adaptive":
        return
    if control.kl_coef == 0:
        raise ConfigError("algorithm.kl_ctrl.kl_coef=0 stays 0 under algorithm.kl_ctrl.type=adaptive; set it above 0")
    if 0.2 * answers >= control.horizon:
        raise ConfigError(
            f"algorithm.kl_ctrl.horizon={control.horizon} is too short for batches of {answers} answers: one of them"
            f" could take the coefficient to 0; set it above {0.2 * answers:g}"
        )


@rule
def shared_prompts_are_packed_by_tokens(setup: Setup) -> None:
    """Shared prompts need a backend that computes them, and micro-batches by tokens."""
    backend = setup.megatron.attention_backend
    if setup.actor.share_prompts and backend not in ("auto", "flex", "sdpa"):
        raise ConfigError(
            f"{ACTOR}.share_prompts=True cannot be computed by {MEGATRON}.attention_backend={backend}; set"
            f" attention_backend=auto"
        )
    if setup.actor.share_prompts and not setup.actor.use_dynamic_bsz:
        raise ConfigError(
            f"{ACTOR}.share_prompts=True needs {ACTOR}.use_dynamic_bsz=True, which keeps the answers to a prompt"
            f" together; set {ACTOR}.use_dynamic_bsz=True"
        )


@rule
def resumed_checkpoint_is_named(setup: Setup) -> None:
    """Resuming from a path needs the path."""
    trainer = setup.config.trainer
    if trainer.resume_mode == "path" and not trainer.resume_from_path:
        raise ConfigError(
            "trainer.resume_mode=path needs trainer.resume_from_path; set it to a checkpoint's folder, or"
            " resume_mode=auto"
        )


@rule
def packing_is_on(setup: Setup) -> None:
    """Micro-batches are always packed."""
    if not setup.config.actor_rollout_ref.model.use_remove_padding:
        key = "actor_rollout_ref.model.use_remove_padding"
        raise ConfigError(f"{key}=False is not offered: micro-batches are always packed; set {key}=True")


@rule
def no_code_from_model_folders(setup: Setup) -> None:
    """Code from a model folder is never executed."""
    if setup.config.actor_rollout_ref.model.trust_remote_code:
        key = "actor_rollout_ref.model.trust_remote_code"
        raise ConfigError(f"{key}=True is refused: code from a model folder is never executed; set {key}=False")


@rule
def context_parallelism_is_off(setup: Setup) -> None:
    """Context parallelism is not offered."""
    size = setup.megatron.context_parallel_size
    if size != 1:
        raise ConfigError(
            f"{MEGATRON}.context_parallel_size={size}: context parallelism is not offered;"
            f" set {MEGATRON}.context_parallel_size=1"
        )
