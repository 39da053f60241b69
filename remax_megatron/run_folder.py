"""The folder of a run, `trainer.default_local_dir`: started anew, or resumed from a checkpoint.

metrics.jsonl config.yaml curves.png hf/    records, settings and result
checkpoints/                                see checkpoint/folders.py
guards/                                     rows that the guards of the update wrote down
previous-N/                                 what an earlier run left; nothing is deleted
lock                                        held by the run that works in the folder
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

import torch.distributed as dist
from filelock import BaseFileLock, FileLock, Timeout

from remax_megatron.atomic import replacing, written_for
from remax_megatron.checkpoint.folders import iteration_folder, saved_steps, write_tracker
from remax_megatron.config.load import to_yaml
from remax_megatron.config.schema import Config, ConfigError, as_list
from remax_megatron.config.setting import value_of
from remax_megatron.metrics import truncate_metrics
from remax_megatron.parallel.first_rank import from_first_rank

RECORDS = ("metrics.jsonl", "config.yaml", "curves.png", "hf", "guards", "tensorboard", "wandb-id")
LOCKED_AFTER_S = 30.0  # what a run that was killed may take to be gone
_lock: BaseFileLock | None = None  # held as long as the process lives
LISTED_WITHIN_S = 30.0


def checkpoints_folder(config: Config) -> Path:
    """Return the folder of the run's checkpoints."""
    return Path(config.trainer.default_local_dir) / "checkpoints"


def lock_run_folder(config: Config) -> None:
    """Make the folder this run's own. ConfigError, on every rank, when another run works in it.

    Collective; rank 0 holds the lock, and the system takes it back when the process ends. A file system without locks
    is left without.
    """
    from_first_rank(lambda: _lock_folder(config), ConfigError)


def refuse_inputs_inside(config: Config) -> None:
    """ConfigError when an input lies among what an earlier run left in the folder, which a run moves aside."""
    folder = Path(config.trainer.default_local_dir)
    taken = [(folder / name).resolve() for name in (*RECORDS, "checkpoints")]
    for key in ("actor_rollout_ref.model.path", "data.train_files", "data.val_files", "custom_reward_function.path"):
        for path in as_list(value_of(config, key)):
            own = Path(path).expanduser().resolve()
            if place := next((place for place in (own, *own.parents) if place in taken), None):
                raise ConfigError(
                    f"{key}={path} lies in {place}, which a run in trainer.default_local_dir={folder} moves aside; "
                    "set trainer.default_local_dir to another folder, or move the input out of it first"
                )


def _lock_folder(config: Config) -> None:
    """Take the lock; before that, see that the folders of records can be written."""
    global _lock
    folder = Path(config.trainer.default_local_dir)
    for key in ("trainer.rollout_data_dir", "trainer.validation_data_dir"):
        if value_of(config, key) is not None and not (config.trainer.val_only and "rollout" in key):
            with written_for(key, value_of(config, key)):
                Path(value_of(config, key)).mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=value_of(config, key)):
                    pass
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "lock").touch()
    except OSError as error:
        raise _not_writable(folder, error) from error
    _lock = FileLock(folder / "lock")
    try:
        _lock.acquire(timeout=LOCKED_AFTER_S, poll_interval=0.5)
    except Timeout:
        raise ConfigError(
            f"trainer.default_local_dir={folder} is in use by another run; wait for its end, or set it to another "
            "folder"
        ) from None
    except (OSError, NotImplementedError):  # no locks on this file system
        _lock = None


def _not_writable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"trainer.default_local_dir={folder} cannot be written ({error}); set it to a writable folder")


def start_run_folder(config: Config, resumed: tuple[Path, int] | None) -> Path:
    """Make the folder ready and save the settings; `resumed` is the checkpoint that the run resumes from, and its step.

    If the checkpoint is of this folder, records of later steps are removed, because they will be made again;
    checkpoints newer than the resumed step move to previous-N/, with a copy of metrics.jsonl, and so does the result of
    a shorter run. Otherwise all that an earlier run left moves there.
    With trainer.val_only a folder whose checkpoint is validated stays as it is.
    ConfigError when the folder cannot be written.
    """
    folder, checkpoints = Path(config.trainer.default_local_dir), checkpoints_folder(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in (*folder.glob(".hf.*.tmp"), *folder.glob(".hf.*.old")):  # of an export that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        if resumed is not None and resumed[0].resolve().parent == checkpoints.resolve():
            if config.trainer.val_only:
                return folder
            step, records = resumed[1], folder / "metrics.jsonl"
            later = [iteration_folder(checkpoints, other) for other in saved_steps(checkpoints) if other > step]
            aside = _move_aside(folder, [*later, folder / "hf"])
            if later and aside is not None and records.exists():
                shutil.copy2(records, aside)
            write_tracker(checkpoints, step)
            truncate_metrics(records, step)
        else:
            _move_aside(folder, [folder / name for name in RECORDS] + [checkpoints])
        with replacing(folder / "config.yaml") as path:
            path.write_text(to_yaml(config))
    except OSError as error:
        raise _not_writable(folder, error) from error
    return folder


def check_shared(config: Config) -> None:
    """ConfigError, on every rank, when a rank does not see what rank 0 writes into the folder. Collective.

    A file system that caches listings is given `LISTED_WITHIN_S`.
    """
    name = [f".shared-{os.urandom(8).hex()}"]
    dist.broadcast_object_list(name, src=0)
    path = Path(config.trainer.default_local_dir) / name[0]
    if dist.get_rank() == 0:
        path.touch()
    deadline = time.monotonic() + LISTED_WITHIN_S
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    sees: list = [None] * dist.get_world_size()
    dist.all_gather_object(sees, path.exists())
    if dist.get_rank() == 0:
        path.unlink()
    if blind := [rank for rank, found in enumerate(sees) if not found]:
        raise ConfigError(
            f"trainer.default_local_dir={path.parent}: ranks {blind} do not see what rank 0 writes there, and every "
            "rank writes its part of a checkpoint; set it to a folder that all nodes share, or trainer.save_freq=-1"
        )


def _move_aside(folder: Path, paths: list[Path]) -> Path | None:
    """To the next free previous-N/ of `folder`, which is returned, as far as `paths` exist."""
    paths = [path for path in paths if path.exists()]
    if not paths:
        return None
    number = next(i for i in range(1, 10**6) if not (folder / f"previous-{i}").exists())
    aside = folder / f"previous-{number}"
    aside.mkdir()
    for path in paths:
        shutil.move(path, aside / path.name)
    return aside
