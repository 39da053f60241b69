"""Policy, checkpoints and the life cycle of the engine on a GPU: parts of benchmarks/gpu.py, and what they must find.

The parts run whole, but the engine has a small model and two rounds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

pytestmark = pytest.mark.gpu


def run(part: str, folder: Path, *options: str) -> dict[str, dict]:
    """The cases of `part` on a GPU, by name; none of them may have failed."""
    file = folder / "gpu.json"
    command = [sys.executable, "benchmarks/gpu.py", "--parts", part, "--json", str(file), "--limit", f"{part}=240"]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())["parts"][part]
    assert found["outcome"] == "done", done.stdout
    assert not [case for case in found["cases"] if "failed" in case], done.stdout
    return {case["case"]: case for case in found["cases"]}


def test_log_probabilities_and_gradients_are_those_of_transformers(tmp_path):
    cases = run("parity", tmp_path)
    rounding = cases["transformers bfloat16"]["gradient"]
    measured = {name: case for name, case in cases.items() if "gradient" in case}
    assert {"local float32 sdpa none", "local bfloat16 varlen none", "local bfloat16 flex shared none"} <= set(measured)
    for name, case in measured.items():
        limits = (1e-4, 1e-4) if " float32 " in name else (2e-2, 1.5 * rounding)
        assert case["logprob_mean"] <= limits[0] and case["gradient"] <= limits[1], (name, case)


def test_a_resumed_run_has_the_losses_of_the_run_that_went_on(tmp_path):
    for name, case in run("resume", tmp_path).items():
        assert len(set(case["losses"])) == len(case["losses"]), "the loss does not depend on the weights"
        assert case["loss_difference"] <= 1e-6, (name, case)


def test_the_engine_sleeps_and_wakes_with_the_weights_it_is_sent(tmp_path):
    """The canary ends a round that computes with other weights."""
    cases = run("cycle", tmp_path, "--tiny")
    for number in (1, 2):
        assert cases[f"round {number}"]["canary_mean"] <= 2e-2
        assert cases[f"round {number}"]["asleep_gib"] < cases["start"]["used_gib"]
