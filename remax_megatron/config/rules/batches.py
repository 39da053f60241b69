"""Rules about batches, mini-batches, micro-batches, and the steps of the engine."""

from __future__ import annotations

import math

from remax_megatron.config.rules.registry import Setup, rule
from remax_megatron.config.schema import ACTOR, MEGATRON, ROLLOUT, ConfigError


@rule
def mini_batches_divide_batch(setup: Setup) -> None:
    """A rollout batch is cut into whole mini-batches."""
    batch = setup.config.data.train_batch_size
    for group, settings in setup.trained:
        mini = settings.ppo_mini_batch_size or batch
        if mini > batch or batch % mini:
            problem = "is larger than" if mini > batch else "does not divide"
            raise ConfigError(
                f"{group}.ppo_mini_batch_size={mini} {problem} data.train_batch_size={batch} (both count prompts);"
                f" set {group}.ppo_mini_batch_size={batch} or a divisor of it"
            )


@rule
def fixed_micro_batches_have_a_size(setup: Setup) -> None:
    """Micro-batches of a fixed number of rows need that number."""
    if not setup.actor.use_dynamic_bsz and setup.actor.ppo_micro_batch_size_per_gpu is None:
        raise ConfigError(
            f"{ACTOR}.use_dynamic_bsz=False needs {ACTOR}.ppo_micro_batch_size_per_gpu, which is null;"
            " set it to a number of rows, or use_dynamic_bsz=True"
        )


@rule
def budget_holds_longest_sequence(setup: Setup) -> None:
    """The longest prompt and answer together fit the token budget."""
    data, longest = setup.config.data, setup.longest_sequence
    for group, settings in setup.trained:
        budget = settings.ppo_max_token_len_per_gpu
        if settings.use_dynamic_bsz and budget < longest:
            raise ConfigError(
                f"{group}.ppo_max_token_len_per_gpu={budget} is below the longest sequence, data.max_prompt_length="
                f"{data.max_prompt_length} + data.max_response_length={data.max_response_length} = {longest} tokens;"
                f" set {group}.ppo_max_token_len_per_gpu to at least {longest}"
            )


@rule
def budget_is_cut_evenly(setup: Setup) -> None:
    """Under sequence parallelism packed micro-batches are padded to a multiple of tp, and stay within the budget."""
    for group, settings in setup.trained:
        budget, tp = settings.ppo_max_token_len_per_gpu, setup.tp
        if settings.use_dynamic_bsz and settings.megatron.sequence_parallel and budget % tp:
            raise ConfigError(
                f"{group}.ppo_max_token_len_per_gpu={budget} is not a multiple of {MEGATRON}.tensor_model_parallel_size"
                f"={tp}, as sequence_parallel=True needs; set it to {math.ceil(budget / tp) * tp}"
            )


@rule
def policy_learns_after_the_warmup(setup: Setup) -> None:
    """The critic's warmup ends before the run does."""
    warmup, steps = setup.config.trainer.critic_warmup, setup.config.trainer.total_training_steps
    if setup.has_critic and steps is not None and warmup >= steps:
        raise ConfigError(
            f"trainer.critic_warmup={warmup} leaves the policy none of the trainer.total_training_steps={steps};"
            f" set trainer.critic_warmup to at most {steps - 1}"
        )


@rule
def engine_step_is_large_enough(setup: Setup) -> None:
    """vLLM's own limits, named before the engine starts; on a CPU prompts are not read in chunks."""
    tokens, seqs = setup.rollout.max_num_batched_tokens, setup.rollout.max_num_seqs
    if tokens < seqs:
        raise ConfigError(
            f"{ROLLOUT}.max_num_batched_tokens={tokens} is below {ROLLOUT}.max_num_seqs={seqs};"
            f" set max_num_batched_tokens to at least {seqs}"
        )
    if setup.on_cpu and tokens < setup.longest_sequence:
        raise ConfigError(
            f"{ROLLOUT}.max_num_batched_tokens={tokens} is below data.max_prompt_length + data.max_response_length ="
            f" {setup.longest_sequence}, which one step of the engine holds on a CPU; set it to at least that"
        )
