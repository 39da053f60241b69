"""Whether a setting fits its devices: the ledger against a limit, the engine's share against what it must hold, and the
numbers beside it: the largest token budget, the memory of the host, the disk. Nothing is measured here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from remax_megatron.config.rules import validate
from remax_megatron.config.schema import ACTOR, Config, ConfigError, sides_of
from remax_megatron.config.setting import set_value
from remax_megatron.model_facts import ModelFacts
from remax_megatron.plan.engine_time import WORKSPACE, cache_bytes_per_token, cache_tokens
from remax_megatron.plan.gpus import Gpu
from remax_megatron.plan.ledger import (
    BYTES,
    CARD_MARGIN,
    OF_THE_ENGINE,
    Ledger,
    Stack,
    engine_weights,
    installed_stack,
    ledger,
    parameters,
)

ENGINE = "engine"  # the phase of a share that does not hold its weights and one answer
BESIDE = "measured beside the count"


@dataclass(frozen=True)
class Machine:
    """The devices of a plan: `gpu`, whether it is a CPU, and what a run has measured there.

    asleep  bytes beside torch's memory while the engine sleeps (memory/engine_asleep_gib), None: not measured
    beside  bytes by phase that a run took beyond what the ledger counts
    """

    gpu: Gpu
    on_cpu: bool = False
    asleep: int | None = None
    beside: Mapping[str, int] = field(default_factory=dict)

    @property
    def limit(self) -> int:
        """Bytes of a device that the ledger may count: all but CARD_MARGIN's rest, or what was measured where more."""
        return int(min(CARD_MARGIN * self.gpu.memory, self.gpu.memory - (self.asleep or 0)))

    def stack(self, config: Config) -> Stack:
        """What computes: on a GPU Transformer Engine is taken to be installed, as make install-gpu does it."""
        return installed_stack(config, self.on_cpu, has_te=not self.on_cpu)


@dataclass(frozen=True)
class Memory:
    """The ledger of the rank that needs most, against `limit` bytes; the engine's share lacks `short` bytes."""

    made: Ledger
    limit: int
    short: int
    rank: int

    @property
    def phase(self) -> str:
        """Name the phase that needs most, or the engine where its share is too small."""
        return ENGINE if self.short > 0 and self.made.peak() <= self.limit else self.made.worst

    @property
    def over(self) -> int:
        """Bytes that are too many; not above 0 where all fits."""
        return max(self.made.peak() - self.limit, self.short)

    @property
    def fits(self) -> bool:
        """Tell whether all phases do."""
        return self.over <= 0

    @property
    def headroom(self) -> int:
        """Bytes of the device that the ledger leaves within its limit."""
        return self.limit - self.made.peak()


def memory(config: Config, facts: ModelFacts, world_size: int, machine: Machine) -> Memory:
    """Count the memory of `config` for a model of `facts` on `world_size` devices of `machine`."""
    made = ledger(
        config,
        facts,
        world_size,
        card=machine.gpu.memory,
        on_cpu=machine.on_cpu,
        stack=machine.stack(config),
    )
    if machine.beside:
        phases = {
            phase: terms | ({BESIDE: more} if (more := max(0, machine.beside.get(phase, 0))) else {})
            for phase, terms in made.phases.items()
        }
        made = replace(made, phases=phases)
    longest = config.data.max_prompt_length + config.data.max_response_length
    lacking = longest - cache_tokens(config, facts, machine.gpu, machine.on_cpu)
    short = lacking * cache_bytes_per_token(config, facts)
    policy_ranks = sides_of(config, world_size).policy
    per_stage = policy_ranks // config.actor_rollout_ref.actor.megatron.pipeline_model_parallel_size
    of_engine = made.worst.startswith(OF_THE_ENGINE)
    return Memory(made, machine.limit, short, policy_ranks if of_engine else made.stage * per_stage)


def largest_budget(config: Config, facts: ModelFacts, world_size: int, machine: Machine) -> int | None:
    """Find the largest token budget that fits, in steps of TP tokens, up to all tokens of an update; None: none does,
    or micro-batches are made of a number of rows."""
    actor, data = config.actor_rollout_ref.actor, config.data
    if not actor.use_dynamic_bsz:
        return None
    changed, tp = copy.deepcopy(config), actor.megatron.tensor_model_parallel_size
    longest = data.max_prompt_length + data.max_response_length
    rows = (actor.ppo_mini_batch_size or data.train_batch_size) * config.actor_rollout_ref.rollout.n
    low, high = -(-longest // tp), -(-rows * longest // tp)

    def fits(steps: int) -> bool:
        set_value(changed, f"{ACTOR}.ppo_max_token_len_per_gpu", steps * tp)
        return memory(changed, facts, world_size, machine).fits

    if not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low * tp


def engine_terms(config: Config, facts: ModelFacts, machine: Machine) -> dict[str, int]:
    """Bytes of the engine's share: weights, what is assumed for activations and graphs, and the cache that is left."""
    weights, tokens = engine_weights(config, facts), cache_tokens(config, facts, machine.gpu, machine.on_cpu)
    terms = {"weights": weights, "activations and graphs (assumed)": WORKSPACE * (not machine.on_cpu)}
    return terms | {"cache": max(0, tokens) * cache_bytes_per_token(config, facts)}


def host_bytes(config: Config, facts: ModelFacts, world_size: int) -> int:
    """Bytes of a node's memory that offloads take, on GPUs: Adam's state, and the reference policy's weights."""
    megatron = config.actor_rollout_ref.actor.megatron
    tp, pp = megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size
    count = max(parameters(facts, tp, pp, megatron.virtual_pipeline_model_parallel_size or 1))
    weight, state = BYTES[megatron.dtype]
    shards = sides_of(config, world_size).policy // (tp * pp) if megatron.use_distributed_optimizer else 1
    away = count * state // shards * megatron.optimizer_offload
    away += count * weight * config.actor_rollout_ref.ref.megatron.param_offload
    return away * config.trainer.n_gpus_per_node


def is_valid(config: Config, facts: ModelFacts, world_size: int) -> bool:
    """Tell whether the trainer's rules take `config`."""
    try:
        validate(config, world_size, facts)
    except ConfigError:
        return False
    return True
