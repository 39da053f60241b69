"""Resuming a run: which checkpoint, whether it is sound, and whether the settings still mean the same run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist

from remax_megatron.checkpoint.folders import (
    check_files,
    iteration_folder,
    saved_steps,
)
from remax_megatron.checkpoint.state import STATE, CheckpointError, RunState, read_state, reward_file_digest
from remax_megatron.config.schema import SETTINGS, Config
from remax_megatron.config.setting import MUST_MATCH, value_of
from remax_megatron.errors import UserError
from remax_megatron.parallel.first_rank import from_first_rank
from remax_megatron.weights.megatron_folder import checkpoint_folder

log = logging.getLogger(__name__)


def find_checkpoint(config: Config, root: Path) -> tuple[Path, RunState] | None:
    """The checkpoint to resume from, None for a new run. Collective over the world; the same on every rank.

    trainer.resume_mode=auto takes the newest sound checkpoint in `root` and logs why newer ones are passed over. path
    takes the one that is named, until the run that was begun from it has checkpoints of its own: the same command goes
    on. CheckpointError when there are checkpoints but none is sound.
    """
    trainer = config.trainer
    if trainer.resume_mode == "disable":
        return None
    if trainer.resume_mode == "path":
        assert trainer.resume_from_path is not None  # a rule
        own = from_first_rank(lambda: _begun_from(trainer.resume_from_path or "", root), CheckpointError)
        named = from_first_rank(lambda: _named_checkpoint(Path(trainer.resume_from_path or "")), CheckpointError)
        candidates = [*(iteration_folder(root, step) for step in own), named]
    else:
        steps = from_first_rank(lambda: saved_steps(root), CheckpointError)
        candidates = [iteration_folder(root, step) for step in steps]
    problems = []
    for folder in candidates:
        problem = _problem(folder)
        if problem is None:
            return folder, read_state(folder)
        problems.append(problem)
        if folder != candidates[-1]:
            log.warning("%s: passed over, an earlier checkpoint is tried", problem)
    if not problems:
        return None
    fix = "name another checkpoint" if trainer.resume_mode == "path" else "no other one is sound"
    raise CheckpointError(
        f"trainer.resume_mode={trainer.resume_mode}: {problems[-1]}; {fix}, or set trainer.resume_mode=disable to "
        "begin anew"
    )


def check_same_run(state: RunState, config: Config, train_prompts: str) -> None:
    """CheckpointError when `config` would make another run of the one that `state` is of; names the keys."""
    differing = []
    for key, setting in SETTINGS.items():
        if setting.on_resume == MUST_MATCH:
            saved, now = _saved_value(state.config, key), value_of(config, key)
            if saved != now:
                differing.append(f"{key} (was {saved}, is {now})")
    if state.train_prompts != train_prompts:
        differing.append(f"the prompts of data.train_files={config.data.train_files} (other ones, or in another order)")
    own = config.custom_reward_function.path
    if state.reward_file not in (None, reward_file_digest(own)) and own is not None:
        log.warning(
            "custom_reward_function.path=%s is not what it was at the checkpoint of step %d: rewards from here on are "
            "those of the file as it is now",
            *(own, state.step),
        )
    if differing:
        raise CheckpointError(
            f"trainer.resume_mode={config.trainer.resume_mode}: the checkpoint of step {state.step} is of another run: "
            f"{'; '.join(differing)}. Set them as they were, or begin anew with trainer.resume_mode=disable or another "
            "trainer.default_local_dir"
        )


def _saved_value(saved: dict[str, Any], key: str) -> Any:
    """A key that the saved settings do not have yet had its default; a text may have been a number before."""
    value: Any = saved
    for name in key.split("."):
        if not isinstance(value, dict) or name not in value:
            return SETTINGS[key].default
        value = value[name]
    return str(value) if SETTINGS[key].is_text and isinstance(value, float) else value


def _named_checkpoint(path: Path) -> Path:
    if not path.is_dir():
        raise CheckpointError(f"trainer.resume_from_path={path} is not a folder; name a checkpoint")
    return checkpoint_folder(path)


def _begun_from(path: str, root: Path) -> list[int]:
    """Steps, the newest first, of the checkpoints in `root` that a run wrote which was begun from `path`."""
    steps = []
    for step in saved_steps(root):
        try:
            trainer = read_state(iteration_folder(root, step)).config.get("trainer", {})
        except CheckpointError:
            continue
        if (trainer.get("resume_mode"), trainer.get("resume_from_path")) == ("path", path):
            steps.append(step)
    return steps


def _problem(folder: Path) -> str | None:
    """What is wrong with the checkpoint, the same on every rank; each reads its share of the files."""
    mine = None
    try:
        step = read_state(folder).step
        if folder.name.startswith("iter_") and folder.name != iteration_folder(folder.parent, step).name:
            raise CheckpointError(f"{folder / STATE} is that of step {step}")
        check_files(folder, dist.get_rank(), dist.get_world_size())
    except (UserError, OSError) as error:
        mine = str(error)
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return next((problem for problem in found if problem is not None), None)
