"""Folders that are built once, appear whole or not at all, and may be asked for by several processes at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from remax_megatron.atomic import replacing_folder


def digest(recipe: Any) -> str:
    """12 hex digits that change with any value in `recipe` (anything that JSON can hold)."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]


def build_once(folder: Path, build: Callable[[Path], object]) -> Path:
    """Returns `folder`; when it is absent, `build` fills an empty folder aside, which is then synced and renamed.

    A second process waits on a lock file beside the folder for the first one to end, without a time limit: the lock
    goes away with the process that holds it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not folder.is_dir():
            with replacing_folder(folder) as aside:
                build(aside)
    return folder
