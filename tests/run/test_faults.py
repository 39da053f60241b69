"""Two kills of a rank, one of them in a save: the short form of benchmarks/faults.py, and its verdict.

Launchers that end as no launcher should show that the benchmark would tell.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys

import pytest

from tests import ROOT

LAUNCHER = """
import os, subprocess, sys, time
mark = os.environ["REMAX_FAULTS_WATCH"] + "/1"
rank = f"import os, time; open({mark!r}, 'w').write(f'{{os.getpid()}} 1 update'); time.sleep(60)"
process = subprocess.Popen([sys.executable, "-c", rank], start_new_session=True)
process.wait()
if sys.argv[1] == "hangs":
    time.sleep(60)
if sys.argv[1] == "leaves a rank behind":
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
sys.exit(sys.argv[1] != "says that all is well")
"""


@pytest.mark.slow
@pytest.mark.vllm_cpu
@pytest.mark.timeout(600)  # it starts four runs; under a minute on two cores of its own
def test_killed_ranks_cost_no_more_than_the_steps_since_the_last_checkpoint(demo_policy, tmp_path):
    command = [sys.executable, "benchmarks/faults.py", "--kills=2", "--aims", "save", "update", "--steps=5"]
    command += ["--policy", demo_policy, "--work", str(tmp_path / "work"), "--json", str(tmp_path / "result.json")]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=450)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)  # it ends its runs
            process.wait(10)
    assert process.returncode == 0, output
    assert output.splitlines()[-1] == (
        "RESULT kills=2.000 hangs=0.000 clean_exits=0.000 lost_steps=0.000 mismatched=0.000"
    ), output
    attempts = json.loads((tmp_path / "result.json").read_text())["attempts"]
    assert sorted(attempt["aim"]["phase"] for attempt in attempts if attempt["killed"]) == ["save", "update"]
    last = attempts[-1]
    assert last["killed"] is None and last["code"] == 0 and last["saved"] == last["logged"] == 5


@pytest.mark.parametrize(
    ("launcher", "hung", "code"),
    [
        ("ends", False, 1),
        ("says that all is well", False, 0),
        ("hangs", True, None),
        ("leaves a rank behind", True, 1),
    ],
)
def test_the_end_of_an_attempt_is_told_from_other_ends(launcher, hung, code, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    faults = importlib.import_module("faults")

    def start(options, work, folder, watch, background, log):
        command = [sys.executable, "-c", LAUNCHER, launcher]
        return subprocess.Popen(command, env=os.environ | {faults.WATCH: str(watch)}, start_new_session=True)

    monkeypatch.setattr(faults, "start", start)
    monkeypatch.setattr(faults, "HANG_S", 3.0)
    monkeypatch.setattr(faults, "LEFT_OVER_S", 1.0)
    aim = faults.Aim("update", rank=1, step=3, delay_s=0.1)
    found = faults.attempt(argparse.Namespace(), tmp_path, 1, done=2, background=False, aim=aim)
    assert found.killed is not None and found.fell_in == "update"
    assert (found.hung, found.code) == (hung, code)
    assert faults.processes_of(tmp_path / "watch") == []
