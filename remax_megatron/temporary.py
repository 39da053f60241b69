"""The temporary folder of a run: what libraries, workers and sandboxes leave there goes with the run.

Each rank has its own, in the system's, and makes it the default of this process and its children (TMPDIR). A process
that is killed cannot remove its folder: the next run of the same user on that host does. A folder is locked while its
process or a child of it lives, because containers that share a temporary folder do not see each other's processes.
"""

from __future__ import annotations

import fcntl
import getpass
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = "remax-run"


@contextmanager
def own_temporary_folder() -> Iterator[Path]:
    """Yield this process's folder, which is there while the block runs; folders of dead processes are removed."""
    shared = Path(tempfile.gettempdir())
    remove_dead_folders(shared)
    # A cache that is worth keeping, and that torch would put below TMPDIR.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(shared / f"torchinductor_{getpass.getuser()}"))
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}-{os.getpid()}-", dir=shared))
    folder.chmod(0o711)  # the sandbox's programs run as nobody where this process is root's
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    try:
        yield folder
    finally:
        tempfile.tempdir = None
        os.environ.pop("TMPDIR") if before is None else os.environ.update(TMPDIR=before)
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def remove_dead_folders(shared: Path) -> None:
    """Remove the folders in `shared` whose process is gone and that nobody has locked, as far as this user may."""
    for path in shared.glob(f"{PREFIX}-*"):
        owner = re.match(rf"{PREFIX}-(\d+)-", path.name)
        if owner and not Path(f"/proc/{owner[1]}").exists() and not _is_locked(path):
            shutil.rmtree(path, ignore_errors=True)


def _is_locked(folder: Path) -> bool:
    """Whether another process holds the lock of `folder`; also where this one may not ask."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False
