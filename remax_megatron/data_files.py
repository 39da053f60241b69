"""The files that a data setting names: paths, folders and patterns."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from pathlib import Path

from remax_megatron.errors import UserError

SUFFIXES = (".parquet", ".json", ".jsonl")
OF_DATASETS = ("dataset_info.json", "dataset_infos.json", "state.json")  # what the library `datasets` puts beside them


def data_files(named: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The files of one name or several, in order; `~` is expanded.

    A folder stands for the files of SUFFIXES in it, a pattern (`part-*.parquet`, `**` for folders) for those that it
    matches, both sorted by name. A name that is neither is returned as it is, whether it exists or not.
    """
    names = [named] if isinstance(named, str | os.PathLike) else list(named)
    return [file for name in names for file in _files_of(expanded(name))]


def expanded(name: str | os.PathLike[str]) -> Path:
    """The path `name` with its `~` expanded. UserError for the home directory of a user that does not exist."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(f"{name}: {error}; write the path itself") from error


def _files_of(path: Path) -> list[Path]:
    try:
        if path.is_dir():
            found = (file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
            return sorted(file for file in found if not file.name.startswith(".") and file.name not in OF_DATASETS)
        if not path.exists() and glob.has_magic(str(path)):
            whole = [parent for parent in path.parents if parent.is_dir()][0]  # its name may hold [ and ] itself
            pattern = str(path.relative_to(whole))
            found = (whole / name for name in sorted(glob.glob(pattern, root_dir=whole, recursive=True)))
            return [file for file in found if file.is_file()]
    except OSError as error:  # no right to look, a name that is too long
        raise UserError(f"the data file {path} cannot be looked for: {error.strerror}; set another path") from error
    return [path]
