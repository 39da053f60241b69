"""A small part of benchmarks/scale.py: its table, and its check on runs whose times the model made."""

from __future__ import annotations

import subprocess
import sys

from tests import ROOT
from tests.plan.test_calibrate import a_run, tensor_parallel


def test_the_table_and_the_check(tmp_path):
    for tp in (1, 2, 4):
        a_run(tmp_path / f"tp{tp}", *tensor_parallel(tp), "trainer.device=cpu")
    command = [sys.executable, "-m", "benchmarks.scale", "--sizes", "8,16", "--models", "7B", "--answers", "gsm8k"]
    command += ["--runs", str(tmp_path), "--picture", str(tmp_path / "scale.png")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "modelled, not measured on a GPU" in done.stdout and (tmp_path / "scale.png").stat().st_size > 10_000
    assert done.stdout.splitlines()[-1].startswith("RESULT memory_error=")
    assert len([line for line in done.stdout.splitlines() if line.split()[:2] == ["7B", "gsm8k"]]) == 4
