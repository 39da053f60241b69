"""Files and folders that appear whole or not at all.

`with replacing(path) as tmp:` hands out a name beside `path` to write to; when the block ends well the file is flushed
to disk and renamed over `path`, otherwise it is removed and `path` stays as it was. `replacing_folder` does the same
with a folder and all files in it. No locking: of two writers the later one wins, whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from remax_megatron.errors import UserError


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields the temporary path (same folder, same suffix, made by the caller). Creates the folder if it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield tmp
        fsync_path(tmp)
        os.replace(tmp, path)
        fsync_path(path.parent)
    finally:
        tmp.unlink(missing_ok=True)


@contextmanager
def written_for(setting: str, value: object) -> Iterator[None]:
    """Turn an OSError of the block, a full disk say, into a UserError that names what the user set to `value`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{setting}={value} cannot be written ({error}); make room, allow writing, or set another folder"
        ) from error


@contextmanager
def replacing_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields an empty folder beside `folder`; renamed to `folder` when the block ends well, removed otherwise.

    An existing `folder` is moved aside for the moment of the rename and then deleted.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    tmp = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir()
    try:
        yield tmp
        for path in tmp.rglob("*"):
            if path.is_file():
                fsync_path(path)
        if folder.exists():
            os.replace(folder, old)
        os.replace(tmp, folder)
        fsync_path(folder.parent)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def fsync_path(path: Path) -> None:
    """Wait until the file or folder `path` is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
