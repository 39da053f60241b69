"""A new folder that appears whole or not at all, and that a second process can go on with.

It is made under a hidden name beside the output (".NAME.partial") and renamed at the end. A journal in it says which
jobs are done, with the digest of every tensor they wrote. After Ctrl-C or kill -9 it stays, for --resume; after any
other error it is removed, with the parents that were made for it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from remax_megatron.atomic import fsync_path
from remax_megatron.errors import UserError

JOURNAL = "journal.jsonl"


class ConversionError(UserError):
    """A conversion that cannot be done, or cannot go on."""


class _LeaveAlone(ConversionError):
    """What lies in the partial folder is not this process's to remove."""


@dataclass
class Journal:
    """`done`: what an earlier process recorded, job -> digests of its tensors. Threads may share one."""

    file: TextIO
    done: dict[str, dict[str, str]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def record(self, job: str, digests: dict[str, str]) -> None:
        """Note that `job` is done; a later run with --resume does not repeat it."""
        with self.lock:
            self.file.write(json.dumps({"job": job, "digests": digests}) + "\n")
            self.file.flush()


@contextlib.contextmanager
def partial_folder(output: Path, num_bytes: int, fingerprint: str, resume: bool) -> Iterator[tuple[Path, Journal]]:
    """The folder to write `num_bytes` in, and its journal; when the block ends well it becomes `output`.

    `fingerprint` tells apart conversions of other input. ConversionError as `copying.write_folder` says.
    """
    _refuse_existing(output)
    partial = output.with_name(f".{output.name}.partial")
    made: list[Path] = []  # parents of the output that are new, the innermost first
    try:
        if os.path.lexists(partial) and not resume:
            with contextlib.suppress(NotADirectoryError), _locked(partial, output):
                pass
            raise ConversionError(
                f"an interrupted conversion to {output} lies in {partial}; add --resume to go on with it, or delete it"
            )
        made = [folder for folder in output.parents if not folder.exists()]
        output.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(output.parent).free
        if partial.exists():
            free += sum(path.stat().st_blocks * 512 for path in partial.rglob("*") if path.is_file())
        if num_bytes > free:
            _remove_empty(made)
            raise ConversionError(
                f"--output {output} needs {num_bytes / 1e9:.2f} GB, but {output.parent} has {free / 1e9:.2f} GB free; "
                "make room, or write somewhere else"
            )
        partial.mkdir(exist_ok=True)
    except OSError as error:
        _remove_empty(made)
        raise ConversionError(
            f"--output {output} cannot be written: {error.strerror}: {error.filename}; choose another place"
        ) from error
    try:
        with _locked(partial, output):
            with open(partial / JOURNAL, "a+", encoding="utf-8", errors="replace") as file:
                yield partial, Journal(file, _read(file, fingerprint, output))
            (partial / JOURNAL).unlink()
            for path in (partial, *partial.rglob("*")):
                fsync_path(path)
            _refuse_existing(output)
            os.rename(partial, output)
            fsync_path(output.parent)
    except KeyboardInterrupt:
        print(f"interrupted; --resume continues with what is in {partial}", file=sys.stderr)
        raise
    except _LeaveAlone:
        raise
    except (OSError, UserError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        _remove_empty(made)
        if isinstance(error, UserError):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"--output {output}: the disk is full; free {num_bytes / 1e9:.2f} GB, or write somewhere else"
            raise ConversionError(message) from error
        raise ConversionError(f"--output {output}: {error}") from error


def _read(file: TextIO, fingerprint: str, output: Path) -> dict[str, dict[str, str]]:
    """What an earlier process did; a last line cut short is dropped. Starts the journal when it is empty."""
    file.seek(0)
    lines = []
    for text in file.read().splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    if not lines:
        file.write(json.dumps({"fingerprint": fingerprint}) + "\n")
        file.flush()
        return {}
    if lines[0].get("fingerprint") != fingerprint:
        raise _LeaveAlone(
            f"--resume: the interrupted conversion to {output} was of other input, or with other settings; "
            f"repeat its command, or delete {output.with_name(f'.{output.name}.partial')}"
        )
    file.write("\n")  # ends a line that was cut short
    return {line["job"]: line["digests"] for line in lines[1:] if "job" in line}


@contextlib.contextmanager
def _locked(partial: Path, output: Path) -> Iterator[None]:
    """This process alone works in the folder `partial`, which is still the one of that name."""
    handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            renamed = os.fstat(handle).st_ino != os.stat(partial).st_ino
        except OSError as error:
            raise _LeaveAlone(f"another process is converting to {output}; wait for it, or choose another") from error
        if renamed:
            raise _LeaveAlone(f"another process has just finished {output}; choose another")
        yield
    finally:
        os.close(handle)


def _refuse_existing(output: Path) -> None:
    if os.path.lexists(output):
        raise ConversionError(f"--output {output} exists; remove it, or choose another")


def _remove_empty(folders: Iterable[Path]) -> None:
    """Remove `folders`, the innermost first, as far as nothing is in them."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()
