"""Which one change of a setting makes a run fit the memory of its devices; the cheapest in time is named.

Each candidate is counted by the ledger and checked by the rules that the trainer has. Nothing is measured.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from remax_megatron.config.rules import validate
from remax_megatron.config.schema import (
    ACTOR,
    CRITIC_MEGATRON,
    MEGATRON,
    ROLLOUT,
    Config,
    ConfigError,
    expects_cpu,
    has_critic,
    recompute_of,
)
from remax_megatron.config.setting import set_value
from remax_megatron.model_facts import ModelFacts

TOKENS = f"{ACTOR}.ppo_max_token_len_per_gpu"
GRANULARITY = f"{MEGATRON}.override_transformer_config.recompute_granularity"
TP = f"{MEGATRON}.tensor_model_parallel_size"
SHARE = f"{ROLLOUT}.gpu_memory_utilization"
ROLLOUT_TP = f"{ROLLOUT}.tensor_model_parallel_size"
CACHE = f"{ROLLOUT}.kv_cache_gib"
TOKEN_STEP = 1000
SHARE_STEP = 0.05


@dataclass(frozen=True)
class Change:
    """`key`=`value` makes the peak `need` bytes."""

    key: str
    value: Any
    need: int


def fitting_change(
    config: Config, facts: ModelFacts, world_size: int, limit: int, need: Callable[[Config], int]
) -> Change | None:
    """The first change, in order of what it costs, that brings `need` down to `limit` bytes; None where no single one
    does. `need` counts the peak of a configuration."""
    for key, value in _candidates(config):
        changed = with_setting(config, key, value)
        try:
            validate(changed, world_size, facts)
        except ConfigError:
            continue
        if (size := need(changed)) <= limit:
            return Change(key, value, size)
    return None


def with_setting(config: Config, key: str, value: Any) -> Config:
    """A copy of `config` with `value` under the dotted `key`."""
    changed = copy.deepcopy(config)
    set_value(changed, key, value)
    return changed


def _candidates(config: Config) -> Iterator[tuple[str, Any]]:
    """(key, value), cheapest first: gradients are dropped and made anew; a shorter micro-batch keeps its kernels busy
    down to half of what was wished; recompute repeats a part of the forward pass, in full all of it; the optimizer is
    copied twice a step; a smaller engine answers fewer prompts at once; more tensor parallelism talks in every layer.
    """
    actor, rollout, on_cpu = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout, expects_cpu(config)
    longest = config.data.max_prompt_length + config.data.max_response_length
    budget, granularity = actor.ppo_max_token_len_per_gpu, recompute_of(config).granularity
    fewer = range(math.ceil(budget / TOKEN_STEP - 1) * TOKEN_STEP, longest, -TOKEN_STEP)
    lengths = [*fewer, longest] if actor.use_dynamic_bsz else []
    if not on_cpu:
        yield f"{MEGATRON}.grad_offload", True
        if has_critic(config):
            yield from ((f"{CRITIC_MEGATRON}.{name}_offload", True) for name in ("grad", "param"))
    yield from ((TOKENS, tokens) for tokens in lengths if 2 * tokens >= budget)
    if granularity == "none":
        yield GRANULARITY, "selective"
    if on_cpu:
        yield CACHE, rollout.kv_cache_gib / 2
    else:
        yield f"{MEGATRON}.optimizer_offload", True
        if has_critic(config):
            yield f"{CRITIC_MEGATRON}.optimizer_offload", True
        for steps in range(math.ceil(rollout.gpu_memory_utilization / SHARE_STEP) - 1, 0, -1):
            yield SHARE, round(steps * SHARE_STEP, 2)
    if granularity != "full":
        yield GRANULARITY, "full"
    yield from ((TOKENS, tokens) for tokens in lengths if 2 * tokens < budget)
    for times in (2, 4, 8):
        yield TP, times * actor.megatron.tensor_model_parallel_size
    # An engine whose share does not hold its weights and a cache: more of the card, or of the cards.
    share = rollout.gpu_memory_utilization
    larger = () if on_cpu else range(1, int((0.9 - share) / SHARE_STEP) + 1)
    yield from ((SHARE, round(share + SHARE_STEP * steps, 2)) for steps in larger)
    yield from ((ROLLOUT_TP, times * rollout.tensor_model_parallel_size) for times in (2, 4, 8))
