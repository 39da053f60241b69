"""A run's temporary folder: everything in it goes with the run, or with the next one."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from remax_megatron.temporary import own_temporary_folder, remove_dead_folders


def test_what_is_left_in_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    with own_temporary_folder() as folder:
        Path(tempfile.mkdtemp()).joinpath("file").write_text("here")
        code = "import tempfile; tempfile.mkdtemp(prefix='child-')"
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
        assert len(list(folder.iterdir())) == 2 and [*tmp_path.iterdir()] == [folder]
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"].startswith(str(tmp_path / "torchinductor_"))
    assert [*tmp_path.iterdir()] == [] and os.environ["TMPDIR"] == str(tmp_path)


def test_folders_of_dead_processes_go_and_all_others_stay(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    stay = {f"remax-run-{os.getpid()}-a", "remax-run-1-b", "remax-run-c", f"other-{dead.pid}-d"}
    locked = f"remax-run-{dead.pid}-in-another-container"
    for name in stay | {f"remax-run-{dead.pid}-e", locked}:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    handle = os.open(tmp_path / locked, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    remove_dead_folders(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == stay | {locked}
    os.close(handle)
    remove_dead_folders(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == stay
