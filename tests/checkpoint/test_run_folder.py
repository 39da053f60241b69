"""The run's folder: nothing that an earlier run left is lost, and a run that is gone on with finds what is its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from remax_megatron.checkpoint.folders import iteration_folder, saved_steps
from remax_megatron.config.load import load_config
from remax_megatron.config.schema import ConfigError
from remax_megatron.run_folder import start_run_folder
from remax_megatron.weights.megatron_folder import TRACKER
from tests.ranks import run_ranks


def config(folder: Path):
    return load_config("demo", [f"trainer.default_local_dir={folder}"]).config


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A run of 6 steps with checkpoints at 3 and 6."""
    folder = tmp_path / "run"
    for step in (3, 6):
        iteration_folder(folder / "checkpoints", step).mkdir(parents=True)
    (folder / "hf").mkdir()
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(7)))
    return folder


def test_a_new_run_moves_what_is_there_aside(earlier):
    start_run_folder(config(earlier), None)
    assert sorted(path.name for path in earlier.iterdir()) == ["config.yaml", "previous-1"]
    assert saved_steps(earlier / "previous-1" / "checkpoints") == [6, 3]
    (earlier / "metrics.jsonl").write_text("")
    start_run_folder(config(earlier), None)
    assert sorted(path.name for path in (earlier / "previous-2").iterdir()) == ["config.yaml", "metrics.jsonl"]


def test_a_resumed_run_keeps_its_records_up_to_the_checkpoint(earlier):
    start_run_folder(config(earlier), (iteration_folder(earlier / "checkpoints", 3), 3))
    assert len((earlier / "metrics.jsonl").read_text().splitlines()) == 4
    assert saved_steps(earlier / "checkpoints") == [3]
    moved = sorted(path.name for path in (earlier / "previous-1").iterdir())
    assert moved == ["hf", "iter_0000006", "metrics.jsonl"]  # the later checkpoint, and what belongs to it
    assert len((earlier / "previous-1" / "metrics.jsonl").read_text().splitlines()) == 7
    assert (earlier / "checkpoints" / TRACKER).read_text() == "3\n"


def test_validation_alone_leaves_the_run_of_its_checkpoint_as_it_is(earlier):
    before = {path.name: path.read_bytes() if path.is_file() else None for path in earlier.rglob("*")}
    settings = config(earlier)
    settings.trainer.val_only = True
    start_run_folder(settings, (iteration_folder(earlier / "checkpoints", 3), 3))
    assert {path.name: path.read_bytes() if path.is_file() else None for path in earlier.rglob("*")} == before


def test_a_checkpoint_of_another_folder_begins_new_records(earlier, tmp_path):
    start_run_folder(config(tmp_path / "other"), (iteration_folder(earlier / "checkpoints", 3), 3))
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["config.yaml"]
    assert saved_steps(earlier / "checkpoints") == [6, 3]


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"trainer\.default_local_dir=.*file/run cannot be written"):
        start_run_folder(config(tmp_path / "file" / "run"), None)


def lock_worker(folder: str) -> list[str]:
    """Two ranks lock the folder while another process holds it, and again when that has ended. What is said."""
    import subprocess
    import sys

    import torch.distributed as dist

    from remax_megatron import run_folder
    from remax_megatron.parallel.layout import init_distributed

    init_distributed("cpu", 60)
    run_folder.LOCKED_AFTER_S = 1.0
    holder = None
    if dist.get_rank() == 0:
        Path(folder).mkdir()
        code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('held'); input()"
        command = [sys.executable, "-uc", code, f"{folder}/lock"]
        holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    dist.barrier()
    said = []
    for _ in range(2):
        try:
            run_folder.lock_run_folder(config(Path(folder)))
            said.append("")
        except ConfigError as error:
            said.append(str(error))
        if holder is not None and holder.poll() is None:
            holder.communicate(b"\n")
    run_folder.check_shared(config(Path(folder)))
    return said


def test_a_folder_belongs_to_one_run_at_a_time(tmp_path):
    first, second = run_ranks("tests.checkpoint.test_run_folder:lock_worker", 2, str(tmp_path / "run"), 100, preload=())
    assert first == second and "is in use by another run" in first[0] and first[1] == ""
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]
