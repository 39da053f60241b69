"""Rules about the number of ranks and how they are divided."""

from __future__ import annotations

from remax_megatron.config.rules.registry import Setup, divisors, numbers, rule
from remax_megatron.config.schema import CRITIC_MEGATRON, MEGATRON, ROLLOUT, ConfigError
from remax_megatron.config.setting import value_of

OFFLOADS = ("param_offload", "grad_offload", "optimizer_offload")
LAYOUT = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size")


@rule
def ranks_match_launcher(setup: Setup) -> None:
    """The launcher started as many ranks as the settings say."""
    trainer = setup.config.trainer
    ranks = trainer.nnodes * trainer.n_gpus_per_node
    if setup.world_size != ranks:
        raise ConfigError(
            f"trainer.nnodes={trainer.nnodes} x trainer.n_gpus_per_node={trainer.n_gpus_per_node} is {ranks} ranks, but"
            f" {setup.world_size} were started; start with torchrun --nnodes {trainer.nnodes} --nproc-per-node"
            f" {trainer.n_gpus_per_node}, or set trainer.n_gpus_per_node to the ranks per node"
        )


@rule
def split_has_two_sides(setup: Setup) -> None:
    """A split run has ranks for the engine and for the policy; others have no such ranks."""
    num_ranks, ahead = setup.rollout.num_ranks, setup.rollout.ahead
    if not setup.sides.is_split:
        for name, value, none in (("num_ranks", num_ranks, "null"), ("ahead", ahead or None, "0")):
            if value is not None:
                raise ConfigError(
                    f"{ROLLOUT}.{name}={value} goes with trainer.placement=split, which is colocated here;"
                    f" set trainer.placement=split, or {ROLLOUT}.{name}={none}"
                )
    elif not 0 < setup.sides.engine < setup.world_size or setup.world_size < 2:
        limit = setup.world_size - 1
        fix = f"set it to 1 to {limit}" if limit else "start more ranks, or set trainer.placement=colocated"
        raise ConfigError(
            f"{ROLLOUT}.num_ranks={'null' if num_ranks is None else num_ranks} leaves no rank for the policy or none"
            f" for the engine: {setup.world_size} were started; {fix}"
        )


@rule
def split_sides_keep_their_memory(setup: Setup) -> None:
    """Where no engine shares its ranks the policy has no need to make room."""
    for group in (MEGATRON, *([CRITIC_MEGATRON] if setup.has_critic else [])) if setup.sides.is_split else ():
        for name in OFFLOADS:
            if value_of(setup.config, f"{group}.{name}"):
                raise ConfigError(
                    f"{group}.{name}=True makes room for an engine that trainer.placement=split has on other ranks; set"
                    f" {group}.{name}=False"
                )


@rule
def ranks_divide_into_replicas(setup: Setup) -> None:
    """The ranks that train are a whole number of replicas of the policy."""
    ranks = setup.sides.policy
    if ranks % (setup.tp * setup.pp):
        raise ConfigError(
            f"{MEGATRON}.tensor_model_parallel_size={setup.tp} x pipeline_model_parallel_size={setup.pp} does not"
            f" divide the {ranks} ranks{' of the policy' if setup.sides.is_split else ''}; set the two so that their"
            f" product divides {ranks}"
        )


@rule
def rollout_tp_divides_ranks(setup: Setup) -> None:
    """The ranks that answer are a whole number of replicas of the engine."""
    tp, ranks = setup.rollout.tensor_model_parallel_size, setup.sides.engine
    if ranks % tp:
        raise ConfigError(
            f"{ROLLOUT}.tensor_model_parallel_size={tp} does not divide the {ranks} ranks"
            f"{' of the engine' if setup.sides.is_split else ''}; set it to {numbers(divisors(ranks))}"
        )


@rule
def virtual_stages_need_a_pipeline(setup: Setup) -> None:
    """Virtual stages need more than one pipeline stage."""
    vpp = setup.megatron.virtual_pipeline_model_parallel_size
    if vpp is not None and vpp > 1 and setup.pp == 1:
        raise ConfigError(
            f"{MEGATRON}.virtual_pipeline_model_parallel_size={vpp} needs pipeline_model_parallel_size above 1, which"
            f" is {setup.pp}; set {MEGATRON}.virtual_pipeline_model_parallel_size=null"
        )


@rule
def critic_has_the_policys_layout(setup: Setup) -> None:
    """The critic is cut between the ranks as the policy is."""
    for name in LAYOUT if setup.has_critic else ():
        critics, policys = getattr(setup.config.critic.megatron, name), getattr(setup.megatron, name)
        if critics not in (None, policys):
            raise ConfigError(
                f"{CRITIC_MEGATRON}.{name}={critics} is not {MEGATRON}.{name}={'null' if policys is None else policys}:"
                f" the critic has the policy's layout; set {CRITIC_MEGATRON}.{name}=null"
            )
