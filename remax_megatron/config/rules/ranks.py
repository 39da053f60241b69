"""Rules about the number of ranks and how they are divided."""

from __future__ import annotations

from remax_megatron.config.rules.registry import Setup, divisors, numbers, rule
from remax_megatron.config.schema import CRITIC_MEGATRON, MEGATRON, ROLLOUT, ConfigError

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
def ranks_divide_into_replicas(setup: Setup) -> None:
    """The ranks are a whole number of replicas of the policy."""
    if setup.world_size % (setup.tp * setup.pp):
        raise ConfigError(
            f"{MEGATRON}.tensor_model_parallel_size={setup.tp} x pipeline_model_parallel_size={setup.pp} does not"
            f" divide the {setup.world_size} ranks; set the two so that their product divides {setup.world_size}"
        )


@rule
def rollout_tp_divides_ranks(setup: Setup) -> None:
    """The ranks are a whole number of replicas of the engine."""
    tp = setup.rollout.tensor_model_parallel_size
    if setup.world_size % tp:
        raise ConfigError(
            f"{ROLLOUT}.tensor_model_parallel_size={tp} does not divide the {setup.world_size} ranks; set it to"
            f" {numbers(divisors(setup.world_size))}"
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
