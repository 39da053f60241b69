"""The fit of the efficiencies: runs whose truth is known, and what a file that is none says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from remax_megatron.config.load import load_config, to_yaml
from remax_megatron.config.schema import ConfigError
from remax_megatron.plan.calibrate import calibrate, read_run
from remax_megatron.plan.gpus import GPUS
from remax_megatron.plan.ledger import ledger
from remax_megatron.plan.lengths import Lengths, LogNormal
from remax_megatron.plan.memory import Machine
from remax_megatron.plan.models import sizes_of
from remax_megatron.plan.parts import Efficiencies
from remax_megatron.plan.step_time import step_time

H100 = GPUS["h100-80gb"]
MEGATRON, ROLLOUT = "actor_rollout_ref.actor.megatron", "actor_rollout_ref.rollout"
TRUTH = Efficiencies(
    update_flops=0.31, decode_bandwidth=0.5, decode_step_s=6e-3, exchange_bandwidth=0.5, tensor_s=4e-3, layer_s=2e-4
)
GIB = 2**30


def tensor_parallel(tp: int) -> list[str]:
    return [f"{MEGATRON}.tensor_model_parallel_size={tp}", f"{ROLLOUT}.tensor_model_parallel_size={tp}"]


def a_run(folder: Path, *overrides: str, truth: Efficiencies = TRUTH, beside: float = 1.5) -> Path:
    """A run's folder as the model says it would be under `truth`; an update takes `beside` GiB more than is counted."""
    folder.mkdir()
    config = load_config("qwen2_5_7b", ["data.train_batch_size=128", *overrides]).config
    (folder / "config.yaml").write_text(to_yaml(config))
    facts, world_size = sizes_of(config.actor_rollout_ref.model.path), config.trainer.n_gpus_per_node
    lengths = Lengths("a run", "a test", LogNormal(100, 0, 0), LogNormal.of(240, 150))
    made = step_time(config, facts, world_size, H100, lengths)
    counted = ledger(config, facts, world_size, stack=Machine(H100).stack(config))
    seconds = {f"time/{name}_s": phase.seconds(truth) for name, phase in made.phases.items()}
    record = {"step": 1, "time/step_s": sum(seconds.values()), "time/score_s": 0.0, **seconds}
    record |= {"response/mean_tokens": 240, "response/std_tokens": 150, "batch/num_tokens": 340 * 128 * 4}
    record |= {"memory/update_peak_gib": max(map(counted.peak, ("update", "optimizer"))) / GIB + beside}
    lines = [{"step": 0}, *({**record, "step": step} for step in range(1, 4))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "metrics.jsonl"


def test_one_run_scales_its_phases(tmp_path):
    run = read_run(a_run(tmp_path / "run", *tensor_parallel(2)))
    assert len(run.steps) == 3 and run.world_size == 8 and run.trained_share == 1.0
    found = calibrate([run], H100)
    assert found.before["step"] > 0.2 and found.after["step"] < 0.01
    assert all(error < 0.01 for error in found.after.values())
    assert found.beside["update"] == pytest.approx(1.5 * GIB, rel=1e-6) and "sync" not in found.beside


def test_another_layout_is_predicted_within_a_fifth(tmp_path):
    """Fitted on TP 1 and TP 4, asked for TP 2 with recompute: within 20 % of the truth; unfitted it is not."""
    fitted = [a_run(tmp_path / f"tp{tp}", *tensor_parallel(tp)) for tp in (1, 4)]
    other = read_run(a_run(tmp_path / "other", *tensor_parallel(2), f"{MEGATRON}.sequence_parallel=False"))
    found = calibrate([read_run(path) for path in fitted], H100)
    truth = sum(other.seconds().values())
    for efficiencies, close in ((Efficiencies(), False), (found.efficiencies, True)):
        assert (abs(other.modelled(H100).seconds(efficiencies) / truth - 1) < 0.2) is close


def test_the_command_says_the_errors(tmp_path, capsys):
    from remax_megatron.plan.__main__ import main

    run = str(a_run(tmp_path / "run", *tensor_parallel(2)))
    assert main(["--config-name", "qwen2_5_7b", "--gpu", "h100-80gb", "--calibrate", run]) == 0
    screen = capsys.readouterr().out
    assert "mean error of each phase's time before and after" in screen and "measured beside the count" in screen


def test_rows_without_a_gradient_are_not_counted(tmp_path):
    path = a_run(tmp_path / "run")
    text = path.read_text().replace('"time/score_s"', '"batch/left_out_token_share": 0.25, "time/score_s"')
    path.write_text(text)
    run = read_run(path)
    assert run.trained_share == 0.75
    whole = replace(run, steps=tuple({**step, "batch/left_out_token_share": 0.0} for step in run.steps))
    assumed = Efficiencies()
    part = run.modelled(H100).phases["update"].seconds(assumed) / whole.modelled(H100).phases["update"].seconds(assumed)
    assert part == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize(
    "lines, message",
    [
        ("not json\n", "cannot be read"),
        ('{"step": 0}\n', "has no record of a step"),
        ('{"step": 1, "time/step_s": 1, "time/update_s": 1}\n', "has no config.yaml beside it"),
    ],
)
def test_what_is_no_run(tmp_path, lines, message):
    (tmp_path / "metrics.jsonl").write_text(lines)
    with pytest.raises(ConfigError, match=message):
        read_run(tmp_path / "metrics.jsonl")
