"""PPO in real runs: policy and critic learn, stop, go on bit for bit, and are exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from remax_megatron.checkpoint.folders import iteration_folder, saved_steps
from remax_megatron.convert import megatron_to_hf
from tests.checkpoint.test_resume import at, measured
from tests.run.small_run import small_run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
STEPS = 4


@pytest.fixture(scope="module")
def settings(demo_policy, tmp_path_factory) -> list[str]:
    return [
        *small_run(demo_policy, tmp_path_factory.mktemp("settings")),
        "data.val_files=null",
        "trainer.test_freq=-1",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "algorithm.adv_estimator=gae",
        "algorithm.gamma=0.99",
        "algorithm.lam=0.95",
        "algorithm.use_kl_in_reward=True",
        "critic.optim.lr=1e-3",
        "critic.optim.lr_warmup_steps=3",
        "critic.ppo_epochs=2",
        "trainer.critic_warmup=1",
        f"trainer.total_training_steps={STEPS}",
        "trainer.save_freq=2",
    ]


@pytest.fixture(
    scope="module", params=["tp2", *(pytest.param(layout, marks=pytest.mark.slow) for layout in ("dp2", "pp2"))]
)
def run(request, torchrun, settings, tmp_path_factory) -> tuple[str, Path]:
    """(layout, folder) of a run in one go; data-parallel ranks save in the background."""
    run_dir = tmp_path_factory.mktemp(request.param) / "run"
    extra = [f"trainer.default_local_dir={run_dir}", f"trainer.async_save={request.param == 'dp2'}"]
    finished = torchrun(2, [*settings, *at(request.param), *extra])
    assert finished.code == 0, finished.output
    return request.param, run_dir


def test_both_learn(run) -> None:
    records = measured(run[1])
    assert [record["step"] for record in records] == list(range(STEPS + 1))
    # Two mini-batches: two updates of the policy after the warmup, and twice as many, in two epochs, of the critic.
    assert [record["actor/num_updates"] for record in records[1:]] == [0, 2, 2, 2]
    assert [record["critic/num_updates"] for record in records[1:]] == [4] * STEPS
    assert [record["critic/lr"] for record in records[1:]] == pytest.approx([1e-3] * STEPS)
    assert records[1]["critic/value_mean"] != 0.0 and records[1]["critic/explained_variance"] == pytest.approx(
        0.0, abs=1e-9
    )
    assert all(record["critic/grad_norm"] > 0 for record in records[1:])
    assert "variance/remax" not in records[1]  # no greedy answers were generated


def test_it_goes_on_as_if_it_had_never_ended(run, torchrun, settings, tmp_path) -> None:
    layout, run_dir = run
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "hf")
    shutil.rmtree(copy / "critic")
    shutil.rmtree(iteration_folder(copy / "checkpoints", STEPS))
    assert saved_steps(copy / "checkpoints") == [2]
    finished = torchrun(2, [*settings, *at(layout), f"trainer.default_local_dir={copy}"])
    assert finished.code == 0, finished.output
    assert measured(copy) == measured(run_dir)
    for folder in ("hf", "critic"):
        names = sorted(path.name for path in (run_dir / folder).iterdir())
        assert sorted(path.name for path in (copy / folder).iterdir()) == names and "config.json" in names
        for name in names:
            assert (copy / folder / name).read_bytes() == (run_dir / folder / name).read_bytes(), name


def test_the_critic_is_a_model_that_transformers_reads(run) -> None:
    from transformers import AutoModelForTokenClassification

    folder = run[1] / "critic"
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForTokenClassification"] and config["id2label"] == {"0": "VALUE"}
    critic, found = AutoModelForTokenClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        values = critic.eval()(torch.tensor([[5, 6, 7, 8]])).logits
    assert values.shape == (1, 4, 1) and values.abs().max() > 0


@pytest.mark.slow
def test_a_new_run_starts_with_it(run, torchrun, settings, tmp_path) -> None:
    given = [*settings, *at(run[0]), f"critic.model.path={run[1] / 'critic'}", "trainer.total_training_steps=1"]
    finished = torchrun(
        2, [*given, "trainer.critic_warmup=0", "trainer.save_freq=-1", f"trainer.default_local_dir={tmp_path}"]
    )
    assert finished.code == 0, finished.output
    first = measured(tmp_path)[1]
    assert abs(first["critic/explained_variance"]) > 1e-3  # it knows something: no value of a new head of 0


def test_its_checkpoint_converts_to_the_policy(run, tmp_path) -> None:
    checkpoint = iteration_folder(run[1] / "checkpoints", STEPS)
    megatron_to_hf.convert(checkpoint, tmp_path / "hf")
    name = "model.safetensors"
    assert (tmp_path / "hf" / name).read_bytes() == (run[1] / "hf" / name).read_bytes()
