"""The folder of a run's checkpoints: what lies in it, which of it is sound, what may go.

    DIR/latest_checkpointed_iteration.txt    "120"
    DIR/config.json, tokenizer files         with them the converters take DIR as a model
    DIR/iter_0000120/.metadata, *.distcp     weights and optimizer, `torch_dist` (see policy/training_state.py)
    DIR/iter_0000120/state.json              the rest of the run's state (checkpoint/state.py)
    DIR/iter_0000120/file_manifest.json      size and xxh3-128 digest of every file
    DIR/.iter_0000130.partial/               being written, or left by a run that died

A digest finds damage. Forgery it does not find, but no file of a checkpoint is unpickled when it is read, and one whose
pickles name anything but records of tensors is refused.

In version 0.1.0 the manifest was called `manifest.json`; checkpoints of that time can be resumed as before.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import xxhash

from remax_megatron.atomic import replacing
from remax_megatron.checkpoint.state import CheckpointError, read_state
from remax_megatron.parallel import watchdog
from remax_megatron.weights.megatron_folder import TRACKER
from remax_megatron.weights.torch_dist import TorchDist

MANIFEST, OLD_MANIFEST = "file_manifest.json", "manifest.json"
READ_BYTES = 16 * 2**20


def iteration_folder(root: Path, step: int) -> Path:
    """Return the folder of the checkpoint of `step`."""
    return root / f"iter_{step:07d}"


def partial_folder(root: Path, step: int) -> Path:
    """Return the folder in which the checkpoint of `step` is written before it is renamed."""
    return root / f".iter_{step:07d}.partial"


def saved_steps(root: Path) -> list[int]:
    """Steps of the checkpoints in `root`, the newest first."""
    found = (re.fullmatch(r"iter_(\d+)", path.name) for path in root.glob("iter_*"))
    return sorted((int(match[1]) for match in found if match), reverse=True)


# Digests -------------------------------------------------------------------------------------------------------------


def file_record(path: Path) -> dict[str, Any]:
    """{"bytes", "digest"} of a file."""
    state, size = xxhash.xxh3_128(), 0
    with open(path, "rb") as file:
        while data := file.read(READ_BYTES):
            state.update(data)
            size += len(data)
    return {"bytes": size, "digest": state.hexdigest()}


def write_manifest(folder: Path, records: dict[str, dict[str, Any]]) -> None:
    """Write the sizes and digests of the files of a checkpoint into its manifest."""
    content = {"digest": "xxh3_128", "files": records}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")


def check_files(folder: Path, part: int = 0, num_parts: int = 1) -> None:
    """CheckpointError, naming the file, when the checkpoint in `folder` is not what its manifest says.

    Sizes are compared of all files, contents of every `num_parts`-th file from number `part` on; part 0 also looks into
    the pickles.
    """
    old = folder / OLD_MANIFEST
    path = old if old.is_file() and not (folder / MANIFEST).is_file() else folder / MANIFEST
    try:
        records = json.loads(path.read_text())["files"]
        expected = {name: (record["bytes"], record["digest"]) for name, record in sorted(records.items())}
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing: {folder} is no checkpoint of a run, or was not copied whole"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    for name, (size, _) in expected.items():
        file = folder / name
        if file.parent != folder or not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if file.stat().st_size != size:
            raise CheckpointError(
                f"{file} has {file.stat().st_size} bytes, {path.name} says {size}: it was cut or changed"
            )
    if unknown := {file.name for file in folder.iterdir()} - expected.keys() - {path.name}:
        raise CheckpointError(f"{folder / min(unknown)} is not in {path.name}: it does not belong there")
    for number, (name, (_, recorded)) in enumerate(expected.items()):
        watchdog.beat(f"checking {folder / name}")
        if number % num_parts == part and file_record(folder / name)["digest"] != recorded:
            raise CheckpointError(f"{folder / name} is not what {path.name} says: it was damaged or changed")
    if part == 0:
        TorchDist(folder).check_pickles()


# What is kept --------------------------------------------------------------------------------------------------------


def best_step(root: Path) -> int | None:
    """The step with the highest accuracy among the checkpoints after whose step there was a validation; of equal ones
    the first."""
    accuracies = {}
    for step in saved_steps(root):
        try:
            accuracies[step] = read_state(iteration_folder(root, step)).accuracy
        except CheckpointError:
            continue  # a damaged one is no best one
    judged = {step: a for step, a in accuracies.items() if isinstance(a, int | float) and math.isfinite(a)}
    return max(judged, key=lambda step: (judged[step], -step)) if judged else None


def prune(root: Path, keep: int) -> list[int]:
    """Remove all but the newest `keep` checkpoints and the best one by validation; returns the removed steps."""
    steps, best = saved_steps(root), best_step(root)
    removed = [step for step in steps[keep:] if step != best]
    for step in removed:
        # First out of sight, so that a half-removed one is never taken for a checkpoint.
        folder = iteration_folder(root, step)
        doomed = folder.with_name(f".{folder.name}.removed")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    return removed


def remove_leftovers(root: Path) -> None:
    """Remove what runs that died left half-written."""
    for path in (*root.glob(".iter_*.partial"), *root.glob(".iter_*.removed")):
        shutil.rmtree(path, ignore_errors=True)


def write_tracker(root: Path, step: int) -> None:
    """Name `step` as the latest checkpoint, as Megatron does."""
    with replacing(root / TRACKER) as path:
        path.write_text(f"{step}\n")
