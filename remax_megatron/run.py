"""One run from its checked settings to its end: read the inputs, find the checkpoint, build, train, export.

`__main__.py` calls `run` on every rank.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
import torch.distributed as dist
from tqdm import tqdm

from remax_megatron.checkpoint.folders import RunState
from remax_megatron.checkpoint.resume import check_same_run, find_checkpoint
from remax_megatron.config.cli import reported_errors
from remax_megatron.config.load import to_yaml
from remax_megatron.config.rules import as_list
from remax_megatron.config.schema import Config, ConfigError, needs_reference, recompute_of
from remax_megatron.flops import UpdateFlops, peak_bf16_tflops
from remax_megatron.guards import MismatchError, NonFiniteError
from remax_megatron.inputs import Inputs, check_agreement, prepare_inputs
from remax_megatron.memory_probe import memory_probe
from remax_megatron.metrics import MetricsWriter
from remax_megatron.model_facts import ModelFacts
from remax_megatron.out_of_memory import explained, record_history
from remax_megatron.parallel import cpu_platform, watchdog
from remax_megatron.parallel.failure import ends_all_ranks
from remax_megatron.parallel.first_rank import from_first_rank
from remax_megatron.parallel.layout import init_distributed, init_model_parallel
from remax_megatron.phases import PhaseTimer
from remax_megatron.profiling import StepProfiler, cuda_event, named_range
from remax_megatron.rewards.pool import RewardPool
from remax_megatron.run_folder import check_shared, checkpoints_folder, lock_run_folder, start_run_folder
from remax_megatron.weights.hf_folder import side_files, write_hf_folder
from remax_megatron.weights.megatron_folder import model_folder

if TYPE_CHECKING:
    from remax_megatron.trainer import Trainer


def run(config: Config, facts: ModelFacts, notes: list[str]) -> None:
    """Train as `config` says. Every rank of the launcher calls; returns when the policy is exported."""
    quiet_libraries()
    is_first = os.environ.get("RANK", "0") == "0"
    with reported_errors():
        inputs = prepare_inputs(config, facts)
    if is_first:
        for note in notes:
            print("note:", note, flush=True)
    from remax_megatron.rollout.bridge import CanaryError
    from remax_megatron.trainer import total_steps

    device = init_distributed(config.trainer.device, config.trainer.collective_timeout_s)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        cpu_platform.remove_dead_shared_memory()
    cleanups: list[Callable[[], None]] = [cpu_platform.remove_own_shared_memory]

    def clean_up() -> None:
        for cleanup in cleanups:
            cleanup()

    record_history(device)
    timer = _timer(config, device)
    with ends_all_ranks(clean_up), explained(config, facts, device, lambda: timer.failed_in):
        watchdog.start(config.trainer.watchdog_timeout_s, clean_up)
        prompts_digest = check_agreement(config, inputs)
        lock_run_folder(config)
        checkpoint = find_checkpoint(config, checkpoints_folder(config), print if is_first else lambda line: None)
        if checkpoint is not None:
            check_same_run(checkpoint[1], config, prompts_digest)
            steps = total_steps(config, len(inputs.train_prompts))
            complete = config.trainer.resume_mode == "auto" and checkpoint[1].step >= steps
            if complete and _is_exported(config):
                _leave(f"The run is complete: {steps} steps. A larger trainer.total_epochs goes on from there.")
        trainer = _build(config, facts, inputs, prompts_digest, checkpoint, device, is_first, timer)
        if trainer.collector.pool is not None:
            cleanups.append(trainer.collector.pool.close)
        try:
            finished = trainer.train()
        except (CanaryError, NonFiniteError, MismatchError):
            trainer.saver.finish()
            _export(trainer, inputs.model_folder)  # every rank is here, and the policy's own weights are sound
            raise
        if finished:
            _export(trainer, inputs.model_folder)
        _close(trainer)
        cpu_platform.remove_own_shared_memory()
        _leave()


def _is_exported(config: Config) -> bool:
    """Whether the result of the run is there, as rank 0 sees it. Collective."""
    hf = Path(config.trainer.default_local_dir) / "hf"
    return from_first_rank(lambda: not config.trainer.export_hf or hf.exists(), ConfigError)


def _leave(last_word: str | None = None) -> NoReturn:
    """The orderly end of this process. Every rank calls."""
    dist.barrier()  # the first rank to leave makes the launcher end the others
    watchdog.stop()
    if last_word is not None and dist.get_rank() == 0:
        print(last_word)
    sys.stdout.flush()
    sys.stderr.flush()
    # vLLM and gloo tear down in an order that may wait for a peer; everything worth keeping is on disk.
    os._exit(0)


def _build(
    config: Config,
    facts: ModelFacts,
    inputs: Inputs,
    prompts_digest: str,
    checkpoint: tuple[Path, RunState] | None,
    device: torch.device,
    is_first: bool,
    timer: PhaseTimer,
) -> Trainer:
    """Megatron's groups, the policy, the engine, the bridge between them, and the loop over it all, in the state of
    `checkpoint` where there is one. Collective."""
    from remax_megatron.algorithm.estimators import get_estimator
    from remax_megatron.checkpoint.saver import Saver
    from remax_megatron.learner import Learner
    from remax_megatron.policy.policy import Policy
    from remax_megatron.policy.reference import Reference
    from remax_megatron.policy.training_state import TrainingState
    from remax_megatron.rollout.bridge import Bridge
    from remax_megatron.rollout.collect import Collector
    from remax_megatron.rollout.engine import Engine
    from remax_megatron.trainer import Trainer

    trainer, actor, rollout = config.trainer, config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    folder, state = checkpoint or (None, None)
    done = state.step if state else 0
    writer = None
    if is_first:
        run_dir = start_run_folder(config, (folder, done) if folder else None)
        names = (trainer.project_name, trainer.experiment_name)
        writer = MetricsWriter(run_dir, trainer.logger, *names, to_yaml(config), first_step=done, echo=_print_line)
    if trainer.save_freq > 0:
        check_shared(config)
    say = writer.say if writer else lambda line: None
    if folder:
        say(f"Resuming after step {done} from {folder}")
    layout = init_model_parallel(
        device,
        tp=actor.megatron.tensor_model_parallel_size,
        pp=actor.megatron.pipeline_model_parallel_size,
        vpp=actor.megatron.virtual_pipeline_model_parallel_size,
        seed=trainer.seed,
        timeout_s=trainer.collective_timeout_s,
    )
    say(
        f"{layout.world_size} ranks on {device.type}: TP {layout.tp}, PP {layout.pp}, DP {layout.dp}; "
        f"vLLM TP {rollout.tensor_model_parallel_size}"
    )
    policy = Policy(
        facts,
        layout,
        actor,
        model_folder=str(folder or inputs.model_folder),
        temperature=rollout.temperature,
        recompute=recompute_of(config),
        correction=config.algorithm.rollout_correction,
        log=say,
        timer=timer,
    )
    reference = None
    if needs_reference(config):
        reference = Reference(
            facts,
            layout,
            actor,
            model_folder=inputs.model_folder,
            temperature=rollout.temperature,
            offload=config.actor_rollout_ref.ref.megatron.param_offload,
            log=say,
        )
    training_state = TrainingState(policy)
    if folder and state:
        training_state.load_optimizer(folder, state.num_updates)
    policy.release_training_memory()  # vLLM measures what is free when it starts
    dtype = rollout.dtype or actor.megatron.dtype
    engine = Engine(
        inputs.model_folder,
        inputs.tokenizer,
        rollout,
        dtype=dtype,
        max_prompt_length=config.data.max_prompt_length,
        max_response_length=config.data.max_response_length,
        seed=trainer.seed,
        device=device,
        tied_embeddings=facts.tied_embeddings,
        stop_token_ids=inputs.stop_token_ids,
        greedy=get_estimator(config.algorithm.adv_estimator).needs_greedy,
    )
    if state:
        engine.weight_version = state.weight_version - 1  # the first sync sends the weights of that version once more
    bridge = Bridge(
        policy,
        engine,
        inputs.train_prompts.prompts,
        dtype=dtype,
        bucket_bytes=rollout.sync_bucket_mb * 2**20,
        threshold=rollout.canary_threshold,
    )
    timer.probe = memory_probe(device, engine.unmapped_bytes)
    timer.pop()  # what the start took is no step's
    pool = None
    if engine.leads_replica:
        custom, reward = config.custom_reward_function, config.reward
        pool = RewardPool(
            reward.num_workers, reward.timeout_s, path=custom.path, name=custom.name, memory_gib=reward.memory_gib
        )
    collector = Collector(engine, pool, config.reward.max_failure_share, timer)
    learner = Learner(config, policy, reference, say, timer)
    if state:
        learner.load_state_dict(state.learner)
    saver = Saver(
        checkpoints_folder(config),
        training_state,
        layout,
        side_files(model_folder(inputs.model_folder), policy.dtype),
        keep=trainer.max_ckpt_to_keep,
        in_background=trainer.async_save,
        say=say,
    )
    return Trainer(
        config,
        learner,
        bridge,
        collector,
        inputs.train_prompts,
        inputs.val_prompts,
        timer,
        UpdateFlops(
            facts,
            recompute_of(config),
            num_devices=layout.world_size,
            num_chunks=layout.pp * layout.vpp,
            peak_tflops=_peak_tflops(device, policy.dtype),
        ),
        writer,
        saver,
        prompts_digest,
        done,
    )


def _peak_tflops(device: torch.device, dtype: torch.dtype) -> float | None:
    """What the device could do in bfloat16, where that is what it computes in and known."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return peak_bf16_tflops(torch.cuda.get_device_name(device))


def _timer(config: Config, device: torch.device) -> PhaseTimer:
    """The timer of the run's phases, which also tells the watchdog and a profiler of them."""
    trainer, rank = config.trainer, dist.get_rank()
    profiler = StepProfiler(as_list(trainer.profile_steps), Path(trainer.default_local_dir) / "profile", rank, device)
    return PhaseTimer(
        around=(watchdog.phase, partial(named_range, device=device)),
        around_step=profiler.around_step,
        event=cuda_event if device.type == "cuda" else None,
    )


def _export(trainer: Trainer, model_folder: str) -> None:
    """Write the trained policy as a Hugging Face folder and draw the curves. Collective; rank 0 writes."""
    config, writer = trainer.config, trainer.writer
    run_dir = Path(config.trainer.default_local_dir)
    if config.trainer.export_hf:
        dtype = getattr(torch, config.actor_rollout_ref.actor.megatron.dtype)
        stream = trainer.learner.policy.weight_stream(dtype, config.actor_rollout_ref.rollout.sync_bucket_mb * 2**20)
        if writer is not None:
            write_hf_folder(run_dir / "hf", iter(stream), model_folder)
            writer.say(f"Trained policy: {run_dir / 'hf'}")
        else:
            for _ in stream:
                pass
    if writer is not None and writer.path.stat().st_size:
        from remax_megatron.plots import plot_curves

        plot_curves(writer.path, run_dir / "curves.png")
        writer.say(f"Curves: {run_dir / 'curves.png'}")


def _close(trainer: Trainer) -> None:
    """End the engine, the reward workers and the records."""
    trainer.collector.close()
    if trainer.writer is not None:
        trainer.writer.close()


def _print_line(line: str) -> None:
    """To standard output, above the progress bar where there is one to see."""
    if sys.stderr.isatty():
        tqdm.write(line)
    else:
        print(line, flush=True)


def quiet_libraries() -> None:
    """Silence what libraries say at every start about optional packages that this stack leaves out on purpose."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    if os.environ.get("RANK", "0") != "0":
        logging.getLogger("remax_megatron").setLevel(logging.ERROR)
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # absent on the CPU stack on purpose
    for module in ("megatron", "torch", "transformers", "vllm"):
        warnings.filterwarnings("ignore", module=module)
