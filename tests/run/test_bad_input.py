"""Bad input: one clear `error:` line and exit code 2, before any process group or engine starts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import ROOT

pytestmark = pytest.mark.e2e

MEGATRON = "actor_rollout_ref.actor.megatron"


def run(tmp_path: Path, *overrides: str) -> subprocess.CompletedProcess:
    """The real entry as one rank; the model path is given by each case."""
    command = [sys.executable, "-m", "remax_megatron", "trainer.n_gpus_per_node=1"]
    command += [f"{MEGATRON}.tensor_model_parallel_size=1", f"trainer.default_local_dir={tmp_path}/run", *overrides]
    ranks = next((o.split("=")[1] for o in reversed(overrides) if o.startswith("trainer.n_gpus_per_node")), "1")
    environment = os.environ | {"WORLD_SIZE": ranks, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def no_columns(folder: Path) -> str:
    pq.write_table(pa.table({"question": ["1+1?"], "answer": ["2"]}), folder / "train.parquet")
    return str(folder / "train.parquet")


def overlong(folder: Path) -> str:
    row = {"data_source": "word_problems", "prompt": "Ben has 2 eggs. " * 200, "reward_model": {"ground_truth": "2"}}
    (folder / "train.jsonl").write_text(json.dumps(row) + "\n")
    return str(folder / "train.jsonl")


def truncated(folder: Path) -> str:
    whole = Path(no_columns(folder))
    whole.write_bytes(whole.read_bytes()[:100])
    return str(whole)


def damaged_tokenizer(policy: str, folder: Path) -> str:
    shutil.copytree(policy, folder / "model")
    (folder / "model" / "tokenizer.json").write_text("{")
    return str(folder / "model")


def other_model(folder: Path) -> str:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return str(folder)


CASES = {
    "unknown key": (lambda p, f: ["actor_rollout_ref.actor.optim.learning_rate=1"], ["learning_rate", "optim.lr"]),
    "tp does not divide the heads": (
        lambda p, f: [
            f"actor_rollout_ref.model.path={p}",
            f"{MEGATRON}.tensor_model_parallel_size=3",
            "trainer.n_gpus_per_node=3",
        ],
        ["tensor_model_parallel_size=3", "4 attention heads", "one of 1, 2, 4"],
    ),
    "the demo's inputs are not prepared": (
        lambda p, f: [f"data.train_files={f}/train.parquet"],
        ["train.parquet", "no such file", "python -m remax_megatron.demo.prepare"],
    ),
    "the demo's model is not prepared": (
        lambda p, f: ["actor_rollout_ref.model.path=not/prepared/policy"],
        ["not/prepared/policy", "no such folder", "python -m remax_megatron.demo.prepare"],
    ),
    "missing model folder": (lambda p, f: [f"actor_rollout_ref.model.path={f}/nowhere"], ["nowhere", "no such folder"]),
    "not a Qwen2 folder": (lambda p, f: [f"actor_rollout_ref.model.path={other_model(f)}"], ["llama", "Qwen2"]),
    "parquet without the columns": (
        lambda p, f: [f"actor_rollout_ref.model.path={p}", f"data.train_files={no_columns(f)}"],
        ["train.parquet", "prompt"],
    ),
    "truncated parquet": (
        lambda p, f: [f"actor_rollout_ref.model.path={p}", f"data.train_files={truncated(f)}"],
        ["train.parquet"],
    ),
    "budget below the longest sequence": (
        lambda p, f: ["actor_rollout_ref.actor.ppo_max_token_len_per_gpu=60"],
        ["ppo_max_token_len_per_gpu=60", "80"],
    ),
    "zero usable prompts": (
        lambda p, f: [f"actor_rollout_ref.model.path={p}", f"data.train_files={overlong(f)}"],
        ["max_prompt_length"],
    ),
    "damaged tokenizer": (
        lambda p, f: [f"actor_rollout_ref.model.path={damaged_tokenizer(p, f)}"],
        ["tokenizer cannot be read"],
    ),
    "sampling that is not the policy": (lambda p, f: ["actor_rollout_ref.rollout.top_p=0.9"], ["top_p=0.9"]),
    "batch larger than the data": (
        lambda p, f: [f"actor_rollout_ref.model.path={p}", "data.train_batch_size=100000"],
        ["train_batch_size=100000", "usable prompts"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_error_line(case, demo_policy, demo_data, tmp_path):
    make, words = CASES[case]
    folder = tmp_path / "input"
    folder.mkdir()
    done = run(tmp_path, *demo_data, *make(demo_policy, folder))
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2, done.stderr
    assert len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    for word in words:
        assert word in errors[0], errors[0]
    assert "vLLM" not in done.stdout and not (tmp_path / "run").exists()
