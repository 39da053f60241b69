"""The parts of a run, built from its settings in the order in which they need memory. Collective; Megatron is imported
here, so the process must be prepared first (`init_distributed`)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from remax_megatron.checkpoint.pending import read_pending
from remax_megatron.checkpoint.saver import Saver
from remax_megatron.checkpoint.state import RunState, restore, restore_optimizers, reward_file_digest
from remax_megatron.config.load import to_yaml
from remax_megatron.config.schema import (
    Actor,
    Config,
    critic_as_actor,
    estimator_of,
    has_critic,
    needs_reference,
    recompute_of,
)
from remax_megatron.critic_update import CriticLearner
from remax_megatron.flops import UpdateFlops, peak_bf16_tflops
from remax_megatron.inputs import Inputs, reward_pool, total_steps
from remax_megatron.memory_probe import memory_probe
from remax_megatron.metrics import MetricsWriter
from remax_megatron.model_facts import ModelFacts
from remax_megatron.parallel.layout import Layout, init_model_parallel
from remax_megatron.parallel.link import Link
from remax_megatron.phases import PhaseTimer
from remax_megatron.policy.critic import Critic
from remax_megatron.policy.policy import Policy
from remax_megatron.policy.reference import Reference
from remax_megatron.policy.settings import PolicySettings
from remax_megatron.policy.training_state import TrainingState
from remax_megatron.rewards.length import LengthRules
from remax_megatron.rollout.batches import WrittenHere
from remax_megatron.rollout.bridge import Bridge
from remax_megatron.rollout.collect import Collector
from remax_megatron.rollout.engine import Engine
from remax_megatron.rollout.remote import EngineService, RemoteBatches, RemoteCollector, RemoteEngine, WeightFormat
from remax_megatron.run_folder import check_shared, checkpoints_folder, start_run_folder
from remax_megatron.trainer import Trainer
from remax_megatron.update import Learner
from remax_megatron.weights.buckets import plan_buckets
from remax_megatron.weights.critic_folder import CRITIC
from remax_megatron.weights.hf_folder import side_files
from remax_megatron.weights.megatron_folder import model_folder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    config          checked settings
    facts           sizes of the model
    inputs          the model's folder, the tokenizer and the prompts
    prompts_digest  of the training prompts, for checkpoints
    checkpoint      folder and state to resume from, None for a new run
    device          of this rank
    timer           of the run's phases
    link            to the ranks of the other side, None where every rank holds policy and engine
    """

    config: Config
    facts: ModelFacts
    inputs: Inputs
    prompts_digest: str
    checkpoint: tuple[Path, RunState] | None
    device: torch.device
    timer: PhaseTimer
    link: Link | None = None

    @property
    def dtype(self) -> str:
        """Of the engine: the policy's, unless it has one of its own."""
        rollout = self.config.actor_rollout_ref.rollout
        return rollout.dtype or self.config.actor_rollout_ref.actor.megatron.dtype

    @property
    def step(self) -> int:
        """Finished steps."""
        return self.checkpoint[1].step if self.checkpoint else 0

    def total_updates(self, actor: Actor) -> int:
        """Optimizer steps of the whole run, if none is left out, of the policy or, with its settings, the critic."""
        size = self.config.data.train_batch_size
        per_batch = size // (actor.ppo_mini_batch_size or size) * actor.ppo_epochs
        return total_steps(self.config, len(self.inputs.train_prompts)) * per_batch


def build_trainer(start: Start) -> Trainer:
    """The training loop over all parts, in the state of the checkpoint where there is one."""
    reward_file_digest(start.config.custom_reward_function.path)  # before a user edits the file
    layout = build_layout(start)
    writer = build_writer(start, layout.rank)
    learner, training_states = build_learner(start, layout)
    engine, collector, batches = build_remote(start) if start.link else build_here(start)
    if start.checkpoint:
        restore(start.checkpoint[1], learner, engine)
        batches.pending = read_pending(start.checkpoint[0], start.inputs.train_prompts)
    return Trainer(
        config=start.config,
        learner=learner,
        bridge=build_bridge(start, learner.policy, engine),
        batches=batches,
        collector=collector,
        train_prompts=start.inputs.train_prompts,
        val_prompts=start.inputs.val_prompts,
        timer=start.timer,
        flops=build_flops(start, layout),
        writer=writer,
        saver=build_saver(start, training_states, layout),
        prompts_digest=start.prompts_digest,
        start_step=start.step,
    )


def build_here(start: Start) -> tuple[Engine, Collector, WrittenHere]:
    """The engine in this rank, and what answers and scores with it."""
    engine = build_engine(start)
    collector = build_collector(start, engine)
    return engine, collector, WrittenHere(collector, start.inputs.train_prompts, start.config)


def build_service(start: Start, link: Link) -> EngineService:
    """What the ranks do that hold the engine alone, for those of the policy at the other end of `link`."""
    engine, collector, batches = build_here(start)
    return EngineService(link, engine, collector, batches, weight_format(start))


def build_remote(start: Start) -> tuple[RemoteEngine, RemoteCollector, RemoteBatches]:
    """The engine of other ranks, as those of the policy use it."""
    config, link, timer = start.config, start.link, start.timer
    assert link is not None, "a split run has a link"
    timer.probe = memory_probe(start.device)
    timer.pop()
    engine = RemoteEngine(link, start.inputs.tokenizer, weight_format(start))
    collector = RemoteCollector(link, engine, timer, config.reward.max_failure_share)
    return engine, collector, RemoteBatches(link, engine, timer, ahead=config.actor_rollout_ref.rollout.ahead == 1)


def weight_format(start: Start) -> WeightFormat:
    """How weights travel to an engine on ranks of its own: in the buckets in which the policy gathers them."""
    rollout, megatron = start.config.actor_rollout_ref.rollout, start.config.actor_rollout_ref.actor.megatron
    dtype = getattr(torch, start.dtype)
    buckets = plan_buckets(
        start.facts,
        megatron.tensor_model_parallel_size,
        megatron.pipeline_model_parallel_size,
        megatron.virtual_pipeline_model_parallel_size or 1,
        dtype.itemsize,
        rollout.sync_bucket_mb * 2**20,
    )
    return WeightFormat(tuple(bucket.hf_tensors for bucket in buckets), dtype)


def build_layout(start: Start) -> Layout:
    """Megatron's process groups, and where this rank stands in them."""
    config = start.config
    megatron, rollout = config.actor_rollout_ref.actor.megatron, config.actor_rollout_ref.rollout
    layout = init_model_parallel(
        start.device,
        tp=megatron.tensor_model_parallel_size,
        pp=megatron.pipeline_model_parallel_size,
        vpp=megatron.virtual_pipeline_model_parallel_size,
        seed=config.trainer.seed,
        timeout_s=config.trainer.collective_timeout_s,
    )
    sizes = f"TP {layout.tp}, PP {layout.pp}, DP {layout.dp}; vLLM TP {rollout.tensor_model_parallel_size}"
    log.info("%d ranks on %s: %s", layout.world_size, start.device.type, sizes)
    return layout


def build_writer(start: Start, rank: int) -> MetricsWriter | None:
    """On rank 0 the writer of metrics, in a folder that is ready for it; checks that all ranks see the folder."""
    config, trainer, writer = start.config, start.config.trainer, None
    if rank == 0:
        resumed = (start.checkpoint[0], start.step) if start.checkpoint else None
        folder, names = start_run_folder(config, resumed), (trainer.project_name, trainer.experiment_name)
        writer = MetricsWriter(folder, trainer.logger, *names, to_yaml(config), first_step=start.step)
    if trainer.save_freq > 0:
        check_shared(config)
    if start.checkpoint:
        log.info("Resuming after step %d from %s", start.step, start.checkpoint[0])
    return writer


def build_learner(start: Start, layout: Layout) -> tuple[Learner, list[TrainingState]]:
    """The policy with the checkpoint's weights and optimizer, or the model's weights, and what learns with it; the
    reference policy has the model's weights always."""
    config, model = start.config, start.inputs.model_folder
    settings = PolicySettings.of(config, start.total_updates(config.actor_rollout_ref.actor))
    folder = start.checkpoint[0] if start.checkpoint else model
    policy = Policy(start.facts, layout, settings, str(folder), start.timer)
    reference = None
    if needs_reference(config):
        offload = config.actor_rollout_ref.ref.megatron.param_offload
        reference = Reference(start.facts, layout, settings, model, offload=offload)
    training_states = [TrainingState(policy)]
    critic = build_critic(start, layout) if has_critic(config) else None
    if critic is not None:
        training_states.append(TrainingState(critic, CRITIC))
    if start.checkpoint:
        restore_optimizers(start.checkpoint[1], start.checkpoint[0], training_states)
    for model_in_training in (policy, critic):
        if model_in_training is not None:
            model_in_training.release_training_memory()  # vLLM measures what is free when it starts
    learns = None if critic is None else CriticLearner(config, critic, start.timer)
    return Learner(config, policy, reference, start.timer, learns), training_states


def build_critic(start: Start, layout: Layout) -> Critic:
    """PPO's critic with the checkpoint's weights, or those that it starts from."""
    config = start.config
    settings = PolicySettings.of_critic(config, start.total_updates(critic_as_actor(config)))
    found, cliprange = start.inputs.critic, config.critic.cliprange_value
    assert found is not None, "the inputs of a run with a critic have one"
    folder, prefix = (str(start.checkpoint[0]), CRITIC) if start.checkpoint else (found.folder, "")
    return Critic(found.facts, layout, settings, folder, start.timer, cliprange=cliprange, prefix=prefix)


def build_engine(start: Start) -> Engine:
    """vLLM in this rank. From here on the timer knows its memory, and what came before counts to no step."""
    config, inputs = start.config, start.inputs
    engine = Engine(
        inputs.model_folder,
        inputs.tokenizer,
        config.actor_rollout_ref.rollout,
        dtype=start.dtype,
        max_prompt_length=config.data.max_prompt_length,
        max_response_length=config.data.max_response_length,
        seed=config.trainer.seed,
        device=start.device,
        tied_embeddings=start.facts.tied_embeddings,
        stop_token_ids=inputs.stop_token_ids,
        greedy=estimator_of(config).needs_greedy,
        keep_special_tokens=config.reward.keep_special_tokens,
        sleeps=start.link is None,
    )
    start.timer.probe = memory_probe(start.device, engine.unmapped_bytes)
    start.timer.pop()
    return engine


def build_bridge(start: Start, policy: Policy, engine: Engine | RemoteEngine) -> Bridge:
    """The way of the policy's weights into the engine."""
    rollout = start.config.actor_rollout_ref.rollout
    return Bridge(
        policy,
        engine,
        start.inputs.train_prompts.prompts,
        dtype=start.dtype,
        bucket_bytes=rollout.sync_bucket_mb * 2**20,
        threshold=rollout.canary_threshold,
    )


def build_collector(start: Start, engine: Engine) -> Collector:
    """The engine with the processes that score its answers; those belong to the first rank of each replica."""
    reward = start.config.reward
    pool = reward_pool(start.config, reward.num_workers) if engine.leads_replica else None
    limit = start.config.data.max_response_length
    lengths = LengthRules(reward.cut_answers, limit, reward.overlong_buffer, reward.overlong_penalty)
    return Collector(engine, pool, reward.max_failure_share, start.timer, lengths)


def build_saver(start: Start, training_states: list[TrainingState], layout: Layout) -> Saver:
    """The writer of checkpoints."""
    trainer = start.config.trainer
    dtype = getattr(torch, start.config.actor_rollout_ref.actor.megatron.dtype)
    return Saver(
        checkpoints_folder(start.config),
        training_states,
        layout,
        side_files(model_folder(start.inputs.model_folder), dtype),
        keep=trainer.max_ckpt_to_keep,
        in_background=trainer.async_save,
    )


def build_flops(start: Start, layout: Layout) -> UpdateFlops:
    """The count of an update's floating-point operations, against the device's peak where that is known."""
    peak = None
    if start.device.type == "cuda" and start.config.actor_rollout_ref.actor.megatron.dtype == "bfloat16":
        peak = peak_bf16_tflops(torch.cuda.get_device_name(start.device))
    return UpdateFlops(
        start.facts,
        recompute_of(start.config),
        num_devices=layout.world_size,
        num_chunks=layout.pp * layout.vpp,
        peak_tflops=peak,
    )
