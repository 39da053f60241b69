"""The run's folder: nothing that an earlier run left is lost, and a run that is gone on with finds what is its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from remax_megatron.checkpoint.folders import iteration_folder, saved_steps
from remax_megatron.config.load import load_config
from remax_megatron.config.schema import ConfigError
from remax_megatron.run_folder import start_run_folder


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
    assert moved == ["hf", "iter_0000006"]  # the later checkpoint, and the result of the longer run


def test_a_checkpoint_of_another_folder_begins_new_records(earlier, tmp_path):
    start_run_folder(config(tmp_path / "other"), (iteration_folder(earlier / "checkpoints", 3), 3))
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["config.yaml"]
    assert saved_steps(earlier / "checkpoints") == [6, 3]


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"trainer\.default_local_dir=.*file/run cannot be written"):
        start_run_folder(config(tmp_path / "file" / "run"), None)
