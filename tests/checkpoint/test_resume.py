"""Stopping and going on: 6 steps in one go equal 6 steps with an end in between, bit for bit, on real runs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from remax_megatron.checkpoint.folders import check_files, iteration_folder, saved_steps
from remax_megatron.checkpoint.resume import check_same_run
from remax_megatron.checkpoint.state import CheckpointError, RunState
from remax_megatron.config.load import load_config
from remax_megatron.convert import megatron_to_hf
from remax_megatron.demo.word_problems import ensure_data
from remax_megatron.metrics import read_metrics
from tests.checkpoint.test_saver import flip_a_bit

pytestmark = pytest.mark.timeout(600)  # up to three runs, and those of the fixture

REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return float(sum(map(ord, solution_str)) % 3 == 0)
"""
LAYOUTS = {"dp2": (1, 1), "tp2": (2, 1), "pp2": (1, 2)}  # tp, pp
TIMINGS = ("time/", "throughput/", "perf/", "seconds", "gb_per_s", "memory/")
STEPS = 6  # two epochs of three


@pytest.fixture(scope="module")
def settings(demo_policy, tmp_path_factory) -> list[str]:
    """24 prompts in batches of 8: an epoch ends at step 3. Rewards are a hash of the answer, so that every step has a
    gradient; the learning rate is high enough for weights to move."""
    folder = tmp_path_factory.mktemp("settings")
    (folder / "reward.py").write_text(REWARD)
    train, _ = ensure_data(folder / "data")
    import pyarrow.parquet as parquet

    parquet.write_table(parquet.read_table(train).slice(0, 24), folder / "train.parquet")
    return [
        f"actor_rollout_ref.model.path={demo_policy}",
        f"custom_reward_function.path={folder / 'reward.py'}",
        f"data.train_files={folder / 'train.parquet'}",
        "data.train_batch_size=8",
        "data.val_max_samples=16",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=512",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        "actor_rollout_ref.actor.optim.lr_warmup_steps=2",
        "actor_rollout_ref.actor.optim.lr_decay_style=cosine",
        "algorithm.use_kl_in_reward=True",
        "algorithm.kl_ctrl.type=adaptive",
        "algorithm.kl_ctrl.horizon=64",
        "trainer.total_epochs=2",
        "trainer.save_freq=3",
        "trainer.test_freq=3",
        "trainer.val_before_train=True",
    ]


def at(layout: str) -> list[str]:
    tp, pp = LAYOUTS[layout]
    megatron = "actor_rollout_ref.actor.megatron"
    return [f"{megatron}.tensor_model_parallel_size={tp}", f"{megatron}.pipeline_model_parallel_size={pp}"]


def measured(run_dir: Path) -> list[dict]:
    records = read_metrics(run_dir / "metrics.jsonl")
    return [{k: v for k, v in record.items() if not any(t in k for t in TIMINGS)} for record in records]


class InOneGo(dict):
    """Layout -> the folder of a run of all steps in one process, made when it is asked for; data-parallel ranks save
    in the background."""

    def __init__(self, start):
        self._start = start

    def __missing__(self, layout: str) -> Path:
        run_dir = self._start(layout)
        assert saved_steps(run_dir / "checkpoints") == [6, 3]
        coefficients = [record["kl/coef"] for record in measured(run_dir) if "kl/coef" in record]
        assert len(set(coefficients)) == STEPS  # the adaptive coefficient moves: it has to be in the checkpoint
        self[layout] = run_dir
        return run_dir


@pytest.fixture(scope="module")
def in_one_go(torchrun, settings, tmp_path_factory) -> InOneGo:
    def start(layout: str) -> Path:
        run_dir = tmp_path_factory.mktemp(layout) / "run"
        extra = [f"trainer.default_local_dir={run_dir}", f"trainer.async_save={layout == 'dp2'}"]
        finished = torchrun(2, [*settings, *at(layout), *extra])
        assert finished.code == 0, finished.output
        return run_dir

    return InOneGo(start)


def same(run_dir: Path, other: Path) -> None:
    assert [record["step"] for record in measured(run_dir)] == list(range(STEPS + 1))
    for one, two in zip(measured(run_dir), measured(other), strict=True):
        assert one == two
    names = sorted(path.name for path in (other / "hf").iterdir())
    assert sorted(path.name for path in (run_dir / "hf").iterdir()) == names
    for name in names:
        assert (run_dir / "hf" / name).read_bytes() == (other / "hf" / name).read_bytes(), name


def killed_after_step_5(run_dir: Path, copy: Path, layout: str) -> Path:
    """What a run leaves that died in the middle of the checkpoint of step 6."""
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "hf")
    last = iteration_folder(copy / "checkpoints", 6)
    if layout == "tp2":
        flip_a_bit(last / "__1_0.distcp")  # finished, and damaged since
    else:
        last.rename(copy / "checkpoints" / ".iter_0000006.partial")
        (copy / "checkpoints" / ".iter_0000006.partial" / "file_manifest.json").unlink()
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:6]) + '{"step": 6, "rew')
    return copy


@pytest.mark.parametrize("layout", ["tp2", pytest.param("pp2", marks=pytest.mark.slow)])
def test_a_resumed_run_equals_one_that_never_ended(layout, torchrun, settings, in_one_go, tmp_path):
    run_dir = killed_after_step_5(in_one_go[layout], tmp_path / "run", layout)
    finished = torchrun(2, [*settings, *at(layout), f"trainer.default_local_dir={run_dir}"])
    assert finished.code == 0, finished.output
    assert f"Resuming after step 3 from {run_dir}" in finished.output
    assert ("__1_0.distcp is not what file_manifest.json says" in finished.output) == (layout == "tp2")
    same(run_dir, in_one_go[layout])
    check_files(iteration_folder(run_dir / "checkpoints", 6))


def test_a_run_that_is_asked_to_stop_saves_and_goes_on_later(torchrun, settings, in_one_go, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "stop").touch()
    command = [*settings, *at("dp2"), f"trainer.default_local_dir={run_dir}"]
    stopped = torchrun(2, command)
    assert stopped.code == 0, stopped.output
    assert "Stopped after step 1" in stopped.output and not (run_dir / "hf").exists()
    assert saved_steps(run_dir / "checkpoints") == [1] and not (run_dir / "stop").exists()
    assert torchrun(2, command).code == 0
    same(run_dir, in_one_go["dp2"])
    again = torchrun(2, command)
    assert again.code == 0 and "The run is complete: 6 steps" in again.output
    same(run_dir, in_one_go["dp2"])


def test_another_layout_goes_on_with_the_same_run(torchrun, settings, in_one_go, tmp_path):
    checkpoint = iteration_folder(in_one_go["tp2"] / "checkpoints", 3)
    extra = ["trainer.resume_mode=path", f"trainer.resume_from_path={checkpoint}"]
    extra += [f"trainer.rollout_data_dir={tmp_path}/rollouts", "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=300"]
    finished = torchrun(2, [*settings, *at("pp2"), *extra, f"trainer.default_local_dir={tmp_path / 'run'}"])
    assert finished.code == 0, finished.output
    first, expected = measured(tmp_path / "run")[0], measured(in_one_go["tp2"])[4]
    assert first["step"] == expected["step"] == 4
    for key in ("actor/loss", "actor/grad_norm", "reward/mean", "kl/coef", "actor/lr"):
        assert first[key] == pytest.approx(expected[key], abs=1e-5), key
    dumps = [(tmp_path / "rollouts" / f"{step}.jsonl").read_text().splitlines() for step in (4, 5, 6)]
    prompts = [json.loads(line)["prompt"]["index"] for dump in dumps for line in dump]
    assert sorted(prompts) == list(range(24)) and prompts != list(range(24))  # the second epoch, in its order
    converted = tmp_path / "converted"
    megatron_to_hf.convert(in_one_go["tp2"] / "checkpoints", converted)
    exported = in_one_go["tp2"] / "hf" / "model.safetensors"
    assert (converted / "model.safetensors").read_bytes() == exported.read_bytes()


def test_damage_everywhere_ends_the_run_before_anything_is_lost(torchrun, settings, in_one_go, tmp_path):
    run_dir = Path(shutil.copytree(in_one_go["dp2"], tmp_path / "run"))
    command = [*settings, *at("dp2"), f"trainer.default_local_dir={run_dir}"]
    for step in (3, 6):
        flip_a_bit(iteration_folder(run_dir / "checkpoints", step) / "__0_0.distcp")
    damaged = torchrun(2, command)
    assert damaged.code != 0 and "no other one is sound" in damaged.output
    assert "iter_0000003/__0_0.distcp is not what file_manifest.json says" in damaged.output
    assert measured(run_dir) == measured(in_one_go["dp2"])  # nothing was lost


def test_a_threshold_that_was_saved_as_a_number_is_the_same_as_text():
    config = load_config("demo").config
    saved = dataclasses.asdict(config)
    saved["algorithm"]["rollout_correction"]["rollout_is_threshold"] = 2.0
    check_same_run(RunState(1, 1, 1, {}, "digest", saved), config, "digest")
    saved["algorithm"]["rollout_correction"]["rollout_is_threshold"] = 3.0
    with pytest.raises(CheckpointError, match=r"rollout_is_threshold \(was 3.0, is 2.0\)"):
        check_same_run(RunState(1, 1, 1, {}, "digest", saved), config, "digest")
