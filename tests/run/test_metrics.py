"""Metrics: every writer with the real library, the console's words, and the picture."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from remax_megatron import plots
from remax_megatron.atomic import written_for
from remax_megatron.errors import UserError
from remax_megatron.metrics import MetricsWriter, console_lines, read_metrics, truncate_metrics
from tests.logged import logged_lines

STEP = {
    "epoch": 1,
    "actor/loss": 0.1891,
    "reward/mean": 0.5121,
    "baseline/mean": 0.4,
    "advantage/mean": 0.1121,
    "throughput/trained_tokens_per_s": 8123.4,
    "throughput/generated_tokens_per_s": 900.6,
    "sync/seconds": 0.118,
}
LINE = (
    "Epoch 1, Step 3: Actor Loss: 0.189, Reward: 0.512, Baseline: 0.400, Advantage: +0.112, "
    "Trained Tokens/s: 8123, Generated Tokens/s: 901, Sync: 0.12s"
)


def writer(run_dir: Path, *loggers: str, **kwargs: object) -> MetricsWriter:
    return MetricsWriter(run_dir, list(loggers), "project", "experiment", "data:\n  seed: 1\n", **kwargs)


def test_metrics_jsonl_is_always_written_and_continued(tmp_path: Path) -> None:
    first = writer(tmp_path / "run")
    first.log(1, {"reward/mean": 0.5, "batch/num_tokens": 123, "actor/loss": float("nan"), "x": float("-inf")})
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()  # before close: each line is flushed
    assert lines == ['{"step": 1, "reward/mean": 0.5, "batch/num_tokens": 123, "actor/loss": null, "x": null}']
    first.close()
    first.close()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rew')  # what a killed run leaves
    second = writer(tmp_path / "run")
    second.log(2, {"val/accuracy": 0.25})
    second.close()
    assert [r["step"] for r in read_metrics(second.path)] == [1, 2]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["metrics.jsonl"]


def test_records_of_later_steps_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    truncate_metrics(path, 2)
    assert not path.exists()
    path.write_text('{"step": 1}\n{"step": 2, "a": 1}\nnonsense\n{"step": 3}\n{"step": 2, "cut')
    truncate_metrics(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2, "a": 1}\n'


def test_values_must_be_numbers(tmp_path: Path) -> None:
    metrics = writer(tmp_path)
    with pytest.raises(TypeError, match="metric 'a' must be an int or a float, found str: '1'"):
        metrics.log(1, {"a": "1"})  # type: ignore[dict-item]
    metrics.close()
    assert metrics.path.read_text() == ""


def test_console(tmp_path: Path) -> None:
    with logged_lines() as lines:
        metrics = writer(tmp_path, "console")
        metrics.log(3, {**STEP, "val/accuracy": 0.4784})
        metrics.close()
        writer(tmp_path).log(4, STEP)  # the console is not asked for
    assert lines == [LINE, "Validation Accuracy: 47.8%"]
    assert console_lines(0, {"val/accuracy": 1.0}) == ["Validation Accuracy: 100.0%"]
    assert console_lines(1, {"time/step_s": 1.0}) == []


def test_unknown_logger(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="trainer.logger names 'mlflow', which is unknown; use console, wandb, tensorboard"
    ):
        writer(tmp_path / "run", "console", "mlflow")
    assert not (tmp_path / "run").exists()


def test_a_logger_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError):
        import wandb  # noqa: F401
    with pytest.raises(ValueError, match="trainer.logger names 'wandb', which is not installed: pip install wandb"):
        writer(tmp_path, "wandb")


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = writer(tmp_path, "tensorboard")
    metrics.log(1, {"reward/mean": 0.25})
    metrics.log(2, {"reward/mean": 0.5})
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 0.25), (2, 0.5)]


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    metrics = writer(tmp_path, "wandb")
    metrics.log(1, {"reward/mean": 0.25})
    metrics.close()
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(run.glob("*.wandb"))


def test_loggers_are_imported_only_when_asked_for() -> None:
    code = (
        "import sys, remax_megatron.metrics; print([m for m in ('wandb', 'torch', 'tensorboard') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "[]\n"


def run_of(path: Path, steps: int) -> Path:
    records = [{"step": 0, "val/accuracy": 0.21}]
    for step in range(1, steps + 1):
        record = {"step": step, "reward/mean": 0.3 + 0.5 * step / steps, "baseline/mean": 0.2 + 0.6 * step / steps}
        if step % 20 == 0:
            record["val/accuracy"] = 0.21 + 0.6 * step / steps
        records.append(record)
    records[3]["reward/mean"] = None  # what a NaN became
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png = tmp_path / "out" / "curves.png"
    assert plots.main([str(run_of(tmp_path / "metrics.jsonl", 60)), str(png)]) == 0
    content = png.read_bytes()
    assert content.startswith(b"\x89PNG") and content.endswith(b"IEND\xaeB`\x82")
    width, height = int.from_bytes(content[16:20]), int.from_bytes(content[20:24])
    assert (width, height) == (1500, 600)
    assert [p.name for p in png.parent.iterdir()] == ["curves.png"]

    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')  # nothing of what is drawn: an empty picture, no error
    assert plots.main([str(tmp_path / "metrics.jsonl"), str(png)]) == 0
    for text, message in (("", "no records to draw"), ("{", ":1: not JSON"), ("{}", ":1: not a metrics record")):
        (tmp_path / "metrics.jsonl").write_text(text)
        assert plots.main([str(tmp_path / "metrics.jsonl"), str(png)]) == 2
        assert message in capsys.readouterr().err


def test_wandb_is_online_where_one_has_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key in the environment, or by `wandb login` in netrc; WANDB_MODE before both."""
    from remax_megatron.metrics import _wandb_mode

    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _wandb_mode("https://api.wandb.ai") == "offline"
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password " + "k" * 40 + "\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert _wandb_mode("https://api.wandb.ai") == "online"
    assert _wandb_mode("https://wandb.example.org") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert _wandb_mode("https://wandb.example.org") == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert _wandb_mode("https://api.wandb.ai") == "offline"
    monkeypatch.setenv("WANDB_MODE", "onlin")
    with pytest.raises(UserError, match="WANDB_MODE=onlin is none of wandb's modes; set it to one of online, offline"):
        _wandb_mode("https://api.wandb.ai")


def test_wandb_without_a_network_is_one_error_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(UserError, match="wandb, which could not be started .*set WANDB_MODE=offline"):
        writer(tmp_path, "wandb")
    assert time.monotonic() - began < 30


def test_records_that_cannot_be_written_name_the_setting() -> None:
    said = r"trainer\.rollout_data_dir=/full cannot be written \(.*No space left"
    with pytest.raises(UserError, match=said), written_for("trainer.rollout_data_dir", "/full"):
        Path("/dev/full").write_text("x")
