"""What users ran into, on real runs: each works as they meant, or ends in one error before anything is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from remax_megatron.metrics import read_metrics
from tests import ROOT

TP = "actor_rollout_ref.actor.megatron.tensor_model_parallel_size"
HASH = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(sum(map(ord, solution_str)) % 3 == 0), "why": f"{len(solution_str)} characters"}
"""
NEVER = "def compute_score(data_source, solution_str, ground_truth, extra_info=None): return 0.0"


def reward(folder: Path, code: str) -> str:
    path = folder / "my_reward.py"
    path.write_text(code)
    return f"custom_reward_function.path={path}"


def test_replicas_without_a_prompt_and_texts_in_the_dumps(torchrun, demo_policy, tmp_path):
    """One training prompt and one validation prompt for two replicas, and a last validation batch of one."""
    run_dir = tmp_path / "run"
    settings = [
        f"actor_rollout_ref.model.path={demo_policy}",
        reward(tmp_path, HASH),
        "data.train_batch_size=1",
        "data.val_max_samples=3",
        "data.val_batch_size=2",
        "trainer.total_training_steps=2",
        f"trainer.default_local_dir={run_dir}",
        f"trainer.rollout_data_dir={run_dir}/rollouts",
        f"trainer.validation_data_dir={run_dir}/validation",
    ]
    finished = torchrun(2, settings)
    assert finished.code == 0, finished.output
    assert [record["step"] for record in read_metrics(run_dir / "metrics.jsonl")] == [0, 1, 2]
    (rollout,) = [json.loads(line) for line in (run_dir / "rollouts" / "1.jsonl").read_text().splitlines()]
    assert rollout["text"].endswith("<|im_start|>assistant\n")
    for answer in (rollout["greedy"], *rollout["samples"]):
        assert answer["notes"] == {"why": f"{len(answer['text'])} characters"}
    validated = [json.loads(line) for line in (run_dir / "validation" / "2.jsonl").read_text().splitlines()]
    assert len(validated) == 3 and all("characters" in answer["notes"]["why"] for answer in validated)


@pytest.mark.slow  # what is said is tested in test_stalls.py
def test_a_run_that_learned_nothing_says_so(torchrun, demo_policy, tmp_path):
    settings = [f"actor_rollout_ref.model.path={demo_policy}", reward(tmp_path, NEVER), "data.train_batch_size=4"]
    settings += ["trainer.total_training_steps=3", "trainer.save_freq=2", "trainer.val_before_train=False"]
    command = [
        *settings,
        "data.val_files=null",
        "trainer.test_freq=-1",
        f"trainer.default_local_dir={tmp_path / 'run'}",
    ]
    finished = torchrun(2, command)
    assert finished.code == 0, finished.output
    assert finished.output.count("In each of the last 3 steps every reward was equal") == 1
    last = [line for line in finished.output.splitlines() if line.strip()][-1]
    assert last.startswith(
        "NOTHING WAS LEARNED in 3 steps, the policy is what it was: in the last 3 steps every reward"
    )
    assert [record.get("stall/no_update") for record in read_metrics(tmp_path / "run" / "metrics.jsonl")][-3:] == [
        1,
        2,
        3,
    ]
    (tmp_path / "my_reward.py").write_text(HASH)  # edited between a save and its resume
    longer = torchrun(2, [*command, "trainer.total_training_steps=4"])
    assert longer.code == 0, longer.output
    assert "my_reward.py is not what it was at the checkpoint of step 3" in longer.output
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 4


def started(overrides: list[str], **environment: str) -> subprocess.CompletedProcess:
    """The trainer in one process, to where it ends at its start."""
    command = [sys.executable, "-m", "remax_megatron", "trainer.n_gpus_per_node=1", f"{TP}=1", *overrides]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120)


@pytest.mark.vllm_cpu
@pytest.mark.e2e
@pytest.mark.parametrize(
    ("key", "name"),
    [("actor_rollout_ref.model.path", "hf"), ("data.train_files", "checkpoints"), ("data.val_files", "guards")],
)
def test_an_input_in_the_run_s_own_folder_is_refused_and_stays(key, name, demo_inputs, tmp_path):
    place = tmp_path / "run" / name
    given = next(value for value in demo_inputs if value.startswith(f"{key}=")).partition("=")[2]
    if Path(given).is_dir():
        path = Path(shutil.copytree(given, place))
    else:
        place.mkdir(parents=True)
        path = Path(shutil.copy(given, place))
    done = started([*demo_inputs, f"{key}={path}", f"trainer.default_local_dir={tmp_path / 'run'}"])
    assert done.returncode == 2 and f"error: {key}={path} lies in {place}" in done.stderr
    assert path.exists() and not (tmp_path / "run" / "previous-1").exists()


@pytest.mark.vllm_cpu
@pytest.mark.e2e
@pytest.mark.parametrize("key", ["trainer.rollout_data_dir", "trainer.validation_data_dir"])
def test_folders_of_records_are_tried_at_the_start(key, demo_inputs, tmp_path):
    (tmp_path / "file").write_text("x")
    done = started([*demo_inputs, f"{key}={tmp_path / 'file' / 'x'}", f"trainer.default_local_dir={tmp_path / 'run'}"])
    assert done.returncode == 2 and f"error: {key}={tmp_path}/file/x cannot be written" in done.stderr
    assert done.stderr.count("\n") < 4, done.stderr


@pytest.mark.vllm_cpu
@pytest.mark.e2e
def test_a_home_that_cannot_be_written_is_no_obstacle_to_the_start(demo_inputs, tmp_path):
    """Up to the first thing after the start: a folder that is in the way."""
    (tmp_path / "file").write_text("x")
    settings = [*demo_inputs, f"trainer.rollout_data_dir={tmp_path / 'file' / 'x'}"]
    done = started([*settings, f"trainer.default_local_dir={tmp_path / 'run'}"], HOME="/proc/nowhere")
    assert done.returncode == 2 and "error: trainer.rollout_data_dir" in done.stderr
