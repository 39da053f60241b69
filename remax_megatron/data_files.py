"""The files that a data setting names: paths, folders and patterns."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from pathlib import Path

SUFFIXES = (".parquet", ".json", ".jsonl")


def data_files(named: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The files of one name or several, in order; `~` is expanded.

    A folder stands for the files of SUFFIXES in it, a pattern (`part-*.parquet`, `**` for folders) for those that it
    matches, both sorted by name. A name that is neither is returned as it is, whether it exists or not.
    """
    names = [named] if isinstance(named, str | os.PathLike) else list(named)
    return [file for name in names for file in _files_of(Path(name).expanduser())]


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
    if not path.exists() and glob.has_magic(str(path)):
        return [Path(found) for found in sorted(glob.glob(str(path), recursive=True)) if Path(found).is_file()]
    return [path]
