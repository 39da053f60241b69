"""The folder of a run, `trainer.default_local_dir`: begun anew, or gone on with from a checkpoint.

metrics.jsonl config.yaml curves.png hf/    records, settings and result
checkpoints/                                see checkpoint/folders.py
guards/                                     rows that the guards of the update wrote down
previous-N/                                 what an earlier run left; nothing is deleted
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch.distributed as dist

from remax_megatron.atomic import replacing
from remax_megatron.checkpoint.folders import iteration_folder, saved_steps
from remax_megatron.config.load import to_yaml
from remax_megatron.config.schema import Config, ConfigError
from remax_megatron.metrics import truncate_metrics

RECORDS = ("metrics.jsonl", "config.yaml", "curves.png", "hf", "guards")
LISTED_WITHIN_S = 30.0


def checkpoints_folder(config: Config) -> Path:
    return Path(config.trainer.default_local_dir) / "checkpoints"


def start_run_folder(config: Config, resumed: tuple[Path, int] | None) -> Path:
    """Make the folder ready and save the settings; `resumed` is the checkpoint that is gone on from, and its step.

    A checkpoint of this folder: records of later steps are dropped, they will be made again; later checkpoints, damaged
    or of a branch that is left, and the result of a shorter run move to previous-N/. Otherwise all that an earlier run
    left moves there.
    ConfigError when the folder cannot be written.
    """
    folder, checkpoints = Path(config.trainer.default_local_dir), checkpoints_folder(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if resumed is not None and resumed[0].resolve().parent == checkpoints.resolve():
            step = resumed[1]
            truncate_metrics(folder / "metrics.jsonl", step)
            later = [iteration_folder(checkpoints, other) for other in saved_steps(checkpoints) if other > step]
            _move_aside(folder, [*later, folder / "hf"])
        else:
            _move_aside(folder, [folder / name for name in RECORDS] + [checkpoints])
        with replacing(folder / "config.yaml") as path:
            path.write_text(to_yaml(config))
    except OSError as error:
        raise ConfigError(
            f"trainer.default_local_dir={folder} cannot be written ({error}); set it to a writable folder"
        ) from error
    return folder


def check_shared(config: Config) -> None:
    """ConfigError, on every rank, when a rank does not see the folder that rank 0 has made. Collective.

    A file system that caches listings is given `LISTED_WITHIN_S`.
    """
    path = Path(config.trainer.default_local_dir) / "config.yaml"
    dist.barrier()  # rank 0 has made it
    deadline = time.monotonic() + LISTED_WITHIN_S
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    sees: list = [None] * dist.get_world_size()
    dist.all_gather_object(sees, path.exists())
    if blind := [rank for rank, found in enumerate(sees) if not found]:
        raise ConfigError(
            f"trainer.default_local_dir={path.parent}: ranks {blind} do not see what rank 0 writes there, and every "
            "rank writes its part of a checkpoint; set it to a folder that all nodes share, or trainer.save_freq=-1"
        )


def _move_aside(folder: Path, paths: list[Path]) -> None:
    """To the next free previous-N/ of `folder`, as far as `paths` exist."""
    paths = [path for path in paths if path.exists()]
    if not paths:
        return
    number = next(i for i in range(1, 10**6) if not (folder / f"previous-{i}").exists())
    aside = folder / f"previous-{number}"
    aside.mkdir()
    for path in paths:
        os.replace(path, aside / path.name)
