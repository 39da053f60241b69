"""Folders that are built once, appear whole or not at all, and may be asked for by several processes at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from remax_megatron.atomic import replacing_folder
from remax_megatron.errors import UserError

RECIPE = "recipe.json"


def digest(recipe: Any) -> str:
    """12 hex digits that change with any value in `recipe` (anything that JSON can hold)."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]


def build_once(folder: Path, recipe: Any, build: Callable[[Path], object]) -> Path:
    """Make sure that `folder` holds what `build` makes of `recipe`, and return it.

    When the folder is absent, or was built of another recipe, `build` fills an empty folder aside, which is then synced
    and renamed. The folder's recipe.json says of which recipe it is. A second process waits on a lock file beside the
    folder for the first one to end, without a time limit: the lock goes away with the process that holds it.
    UserError when there is a folder that was not made here: it stays as it is.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        wanted = json.dumps({"digest": digest(recipe)}) + "\n"
        if folder.exists() and not (folder / RECIPE).is_file():
            raise UserError(f"{folder} exists and was not made by this command; name another folder, or remove it")
        if not folder.exists() or (folder / RECIPE).read_text() != wanted:
            with replacing_folder(folder) as aside:
                build(aside)
                (aside / RECIPE).write_text(wanted)
    return folder
