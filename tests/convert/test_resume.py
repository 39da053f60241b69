"""A conversion that was stopped writes only what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from remax_megatron.convert import copying, hf_to_megatron, megatron_to_hf
from remax_megatron.weights.hf_folder import HfWeights
from tests.convert.folders import BF16, FP32, contents, flip, there, write_model


class Interrupted:
    """Counts the jobs that are written; the one after `after` (and all later) is stopped by Ctrl-C half-way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int | None = None):
        self.written: list[str] = []
        self.after = after
        original = copying._Writer.write

        def write(writer, job, progress):
            def stop(num_bytes: int) -> None:
                if self.after is not None and len(self.written) >= self.after:
                    raise KeyboardInterrupt
                progress(num_bytes)

            digests = original(writer, job, stop)
            self.written.append(job.name)
            return digests

        monkeypatch.setattr(copying._Writer, "write", write)


@pytest.mark.parametrize("direction", ["there", "back"])
def test_resume_writes_only_what_is_missing(
    direction: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if direction == "there":
        reference, num_jobs = models / "megatron", 1 + 2 * 7 + 2
        convert, source, kind = hf_to_megatron.main, models / "source", "--hf"
    else:
        reference, num_jobs = models / "hf", 27
        convert, source, kind = megatron_to_hf.main, models / "megatron", "--megatron"
    output, partial = tmp_path / "out", tmp_path / ".out.partial"
    command = [kind, str(source), "--output", str(output), "--workers", "1"]
    jobs = Interrupted(monkeypatch, after=5)
    assert convert(command) == 130
    assert len(jobs.written) == 5 and partial.is_dir() and not output.exists()
    assert "--resume continues with what is in" in capsys.readouterr().err
    assert convert(command) == 2  # without --resume it stays as it is
    assert "add --resume to go on" in capsys.readouterr().err and partial.is_dir()

    journal = partial / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-10])  # the last line cut short: that job is done again
    first, jobs.written, jobs.after = jobs.written[:-1], [], 4
    assert convert([*command, "--resume"]) == 130
    second, jobs.written, jobs.after = jobs.written, [], None
    assert len(second) == 4 and not set(first) & set(second)

    assert convert([*command, "--resume"]) == 0
    assert len(jobs.written) == num_jobs - 8 and not set(first + second) & set(jobs.written)
    assert not partial.exists()
    assert contents(output) == contents(reference)  # the manifest's digests included


def test_resume_does_again_what_was_damaged(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = Interrupted(monkeypatch, after=20)
    with pytest.raises(KeyboardInterrupt):
        megatron_to_hf.convert(models / "megatron", tmp_path / "out", workers=1)
    first, jobs.written, jobs.after = jobs.written, [], None
    for name in first[2:4]:
        extent = HfWeights(models / "source").extents(name)[0]
        flip(tmp_path / ".out.partial" / Path(extent.path).name, extent.offset)
    report = megatron_to_hf.convert(models / "megatron", tmp_path / "out", workers=1, resume=True)
    assert set(jobs.written) & set(first) == set(first[2:4]) and len(jobs.written) == 7 + 2
    assert contents(tmp_path / "out") == contents(models / "hf")
    manifest = json.loads((models / "hf" / "tensor_manifest.json").read_text())["tensors"]
    assert report.digests == {name: entry["digest"] for name, entry in manifest.items()}
    assert report.seconds > 0


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_resume_of_a_change_of_type(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_model(tmp_path / "source", dtype=FP32 if dtype == "bf16" else BF16, bits=False)
    reference = there(source, tmp_path / "reference", "--dtype", dtype)
    command = ["--hf", str(source), "--output", str(tmp_path / "out"), "--workers", "1"]
    jobs = Interrupted(monkeypatch, after=10)
    assert hf_to_megatron.main([*command, "--dtype", dtype]) == 130
    before = contents(tmp_path / ".out.partial")
    assert hf_to_megatron.main([*command, "--resume"]) == 2  # of another type: refused, and left as it was
    assert contents(tmp_path / ".out.partial") == before
    jobs.written, jobs.after = [], None
    assert hf_to_megatron.main([*command, "--dtype", dtype, "--resume"]) == 0
    assert len(jobs.written) == 17 - 10 and contents(tmp_path / "out") == contents(reference)
