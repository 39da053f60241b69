"""One run from its checked settings to its end: read the inputs, find the checkpoint, build (build.py), train, export.

`__main__.py` calls `run` on every rank.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
import torch.distributed as dist

from remax_megatron.checkpoint.resume import check_same_run, find_checkpoint
from remax_megatron.checkpoint.state import RunState
from remax_megatron.config.cli import reported_errors
from remax_megatron.config.schema import Config, ConfigError, as_list, has_critic, sides_of
from remax_megatron.console import set_up_logging
from remax_megatron.guards import MismatchError, NonFiniteError
from remax_megatron.inputs import Inputs, check_ranks_agree, prepare_inputs, steps_out_of_reach, total_steps
from remax_megatron.model_facts import ModelFacts
from remax_megatron.out_of_memory import explained, record_history
from remax_megatron.parallel import cpu_platform, watchdog
from remax_megatron.parallel.failure import ends_all_ranks
from remax_megatron.parallel.first_rank import from_first_rank
from remax_megatron.parallel.layout import init_distributed
from remax_megatron.parallel.link import Link
from remax_megatron.parallel.whole_run import wait_for_all, whole_run
from remax_megatron.phases import PhaseTimer
from remax_megatron.profiling import StepProfiler, cuda_event, named_range
from remax_megatron.run_folder import checkpoints_folder, lock_run_folder
from remax_megatron.temporary import own_temporary_folder
from remax_megatron.weights.critic_folder import critic_config
from remax_megatron.weights.hf_folder import write_hf_folder
from remax_megatron.weights.megatron_folder import model_folder

if TYPE_CHECKING:
    from remax_megatron.build import Start
    from remax_megatron.policy.trained_model import TrainedModel
    from remax_megatron.trainer import Trainer

log = logging.getLogger(__name__)


def run(config: Config, facts: ModelFacts, notes: list[str]) -> None:
    """Train as `config` says. Every rank of the launcher calls; returns when the policy is exported."""
    is_first = os.environ.get("RANK", "0") == "0"
    set_up_logging(is_first=is_first, with_information="console" in config.trainer.logger)
    with ExitStack() as clean_up:
        clean_up.enter_context(own_temporary_folder())
        with reported_errors():
            inputs = prepare_inputs(config, facts)
        notes = [*notes, *inputs.notes, *steps_out_of_reach(config, len(inputs.train_prompts))]
        for note in notes if is_first else ():
            print("note:", note, flush=True)
        device = _join_ranks(config)
        clean_up.callback(cpu_platform.remove_own_shared_memory)
        timer = _timer(config, device)
        with ends_all_ranks(clean_up.close), explained(config, facts, device, lambda: timer.failed_in):
            last_word = _run(config, facts, inputs, device, timer, clean_up)
            clean_up.close()
            _leave(last_word)


def _run(
    config: Config, facts: ModelFacts, inputs: Inputs, device: torch.device, timer: PhaseTimer, clean_up: ExitStack
) -> str:
    """Resume or start, train and export, or validate alone; returns a last word.

    `inputs` and `facts` are those of `config`, `device` is this rank's, `timer` times the phases, and `clean_up` is
    closed however the run ends. Collective.
    """
    from remax_megatron.build import Start  # Megatron needs what init_distributed has prepared

    watchdog.start(config.trainer.watchdog_timeout_s, clean_up.close)
    whole = whole_run()
    link = Link(whole, device, config.trainer.collective_timeout_s) if whole.num_engine_ranks else None
    start = Start(config, facts, inputs, check_ranks_agree(config, inputs, link), None, device, timer, link)
    return _serve(start, link, clean_up) if link and whole.is_engine_only else _lead(start, clean_up)


def _lead(start: Start, clean_up: ExitStack) -> str:
    """What the ranks do that hold the policy; the arguments and the last word are those of `_run`. Collective."""
    from remax_megatron.build import build_trainer

    config, inputs, link = start.config, start.inputs, start.link
    lock_run_folder(config)
    checkpoint = find_checkpoint(config, checkpoints_folder(config))
    if checkpoint is not None:
        check_same_run(checkpoint[1], config, start.prompts_digest)
    is_complete = checkpoint is not None and _is_complete(config, inputs, checkpoint[1])
    if link is not None:
        link.share(not is_complete)
    if checkpoint is not None and is_complete:
        return f"The run is complete: {checkpoint[1].step} steps. A larger trainer.total_epochs continues it."
    trainer = build_trainer(replace(start, checkpoint=checkpoint))
    if trainer.collector.pool is not None:
        clean_up.callback(trainer.collector.pool.close)
    if config.trainer.val_only:
        return _validate(trainer)
    _train(trainer, inputs)
    return trainer.learner.stalls.last_word()


def _serve(start: Start, link: Link, clean_up: ExitStack) -> str:
    """What a rank does that holds the engine alone: it answers until the policy's ranks, at the other end of `link`,
    have done. The last word is theirs."""
    from remax_megatron.build import build_service

    with watchdog.idle():
        begins = link.share()
    if begins:
        service = build_service(start, link)
        if service.collector.pool is not None:
            clean_up.callback(service.collector.pool.close)
        service.run()
        service.collector.close()
    return ""


def _join_ranks(config: Config) -> torch.device:
    """Join the process group; returns this rank's device. What dead runs left in shared memory is removed."""
    sides, trainer = sides_of(config, int(os.environ.get("WORLD_SIZE", "1"))), config.trainer
    device = init_distributed(trainer.device, trainer.collective_timeout_s, sides.engine * sides.is_split)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        cpu_platform.remove_dead_shared_memory()
    record_history(device)
    return device


def _is_complete(config: Config, inputs: Inputs, state: RunState) -> bool:
    """Whether nothing is left to do after `state`. Collective."""
    all_steps = state.step >= total_steps(config, len(inputs.train_prompts))
    asks = config.trainer.resume_mode == "auto" and not config.trainer.val_only
    return asks and all_steps and _is_exported(config)


def _train(trainer: Trainer, inputs: Inputs) -> None:
    """Train and export; also when the run has to stop while the policy's own weights are sound. Collective."""
    from remax_megatron.rollout.bridge import CanaryError

    try:
        finished = trainer.train()
    except (CanaryError, NonFiniteError, MismatchError):  # raised on every rank
        trainer.saver.finish()
        _export(trainer, inputs)
        raise
    if finished:
        _export(trainer, inputs)
    _close(trainer)


def _validate(trainer: Trainer) -> str:
    """Validate alone; returns a last word for people. Collective."""
    step = trainer.validate_only()
    _close(trainer)
    return f"Validated after step {step}: with trainer.val_only=True nothing is trained or exported."


def _close(trainer: Trainer) -> None:
    trainer.collector.close()
    if trainer.writer is not None:
        trainer.writer.close()


def _is_exported(config: Config) -> bool:
    """Whether the result of the run is there, as rank 0 sees it. Collective."""
    names = ("hf", *(["critic"] if has_critic(config) else []))
    folders = [Path(config.trainer.default_local_dir) / name for name in names]
    return from_first_rank(lambda: not config.trainer.export_hf or all(one.exists() for one in folders), ConfigError)


def _leave(last_word: str) -> NoReturn:
    """The orderly end of this process. Every rank calls."""
    wait_for_all()  # the first rank to leave makes the launcher end the others
    watchdog.stop()
    if whole_run().rank == 0:
        print(last_word)
    sys.stdout.flush()
    sys.stderr.flush()
    # vLLM and gloo tear down in an order that may wait for a peer; everything worth keeping is on disk.
    os._exit(0)


def _timer(config: Config, device: torch.device) -> PhaseTimer:
    """The timer of the run's phases, which also tells the watchdog and a profiler of them."""
    trainer, rank = config.trainer, dist.get_rank()
    profiler = StepProfiler(as_list(trainer.profile_steps), Path(trainer.default_local_dir) / "profile", rank, device)
    return PhaseTimer(
        around=(watchdog.phase, partial(named_range, device=device)),
        around_step=profiler.around_step,
        event=cuda_event if device.type == "cuda" else None,
    )


def _export(trainer: Trainer, inputs: Inputs) -> None:
    """Write the trained models as Hugging Face folders and draw the curves. Collective; rank 0 writes."""
    writer, learner, run_dir = trainer.writer, trainer.learner, Path(trainer.config.trainer.default_local_dir)
    if trainer.config.trainer.export_hf:
        if learner.critic is not None:
            assert inputs.critic is not None, "the inputs of a run with a critic have one"
            source = model_folder(inputs.critic.folder)
            _export_model(trainer, learner.critic.critic, run_dir / "critic", source, critic_config)
        _export_model(trainer, learner.policy, run_dir / "hf", Path(inputs.model_folder))
    if writer is not None and writer.path.stat().st_size:
        from remax_megatron.plots import plot_curves

        plot_curves(writer.path, run_dir / "curves.png")
        log.info("Curves: %s", run_dir / "curves.png")


def _export_model(
    trainer: Trainer, model: TrainedModel, folder: Path, source: Path, change_config: Callable[[bytes], bytes] = bytes
) -> None:
    """Write `model` into `folder`, with the side files of `source`, whose config.json `change_config` changes."""
    config = trainer.config
    dtype = getattr(torch, config.actor_rollout_ref.actor.megatron.dtype)
    stream = model.weight_stream(dtype, config.actor_rollout_ref.rollout.sync_bucket_mb * 2**20)
    if trainer.writer is None:
        for _ in stream:
            pass
    else:
        write_hf_folder(folder, iter(stream), source, facts=model.facts, change_config=change_config)
        log.info("Trained model: %s", folder)
