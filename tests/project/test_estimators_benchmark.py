"""The arithmetic of benchmarks/estimators.py, on records by hand; its settings are legal."""

from __future__ import annotations

import math

import pytest

from benchmarks import estimators
from benchmarks.demo_runs import Curve
from remax_megatron.config.load import load_config
from remax_megatron.config.rules import validate


def record(step: int, accuracy: float | None = None, **more: float) -> dict:
    made = {"step": step, "time/step_s": 2.0, "time/rollout_s": 0.5, "throughput/generated_tokens_per_s": 100.0} | more
    return made if accuracy is None else made | {"val/accuracy": accuracy}


def records(*accuracies: float | None) -> list[dict]:
    return [{"step": 0, "val/accuracy": 0.0}, *(record(step, one) for step, one in enumerate(accuracies, start=1))]


def test_a_curve_adds_up_seconds_and_tokens() -> None:
    slow = [entry | {"time/step_s": 9.0} for entry in records(None, 0.5, None, 0.96)]
    curve = Curve.of(slow, records(None, 0.5, None, 0.96))  # its seconds are those of the other run
    assert (curve.steps, curve.accuracy) == ([0, 2, 4], [0.0, 0.5, 0.96])
    assert (curve.seconds, curve.tokens) == ([0.0, 4.0, 8.0], [0.0, 100.0, 200.0])
    assert curve.first(0.5, "seconds") == 4.0 and curve.first(0.95, "tokens") == 200.0
    assert math.isinf(curve.first(0.99, "steps"))


def test_medians_leave_out_the_first_steps() -> None:
    made = [
        record(step, **{"time/step_s": seconds}) for step, seconds in enumerate((99.0, 50.0, 1.0, 2.0, 9.0), start=1)
    ]
    assert estimators.median(made, "time/step_s") == 2.0
    assert estimators.fastest(made, "step") == 1.0


@pytest.mark.parametrize("name", ["ReMax", "ReMax, refill", "RLOO", "GRPO", "REINFORCE", "PPO"])
def test_every_method_answers_each_prompt_five_times(name: str) -> None:
    config = load_config("demo", list(estimators.METHODS[name])).config
    validate(config, estimators.RANKS, None)
    assert config.actor_rollout_ref.rollout.n + (config.algorithm.adv_estimator == "remax") == 5


def test_noise_over_signal() -> None:
    """|g|^2 = 1 and V = 2 of a batch: 3 for a batch, 1 + 2/16 for sixteen at once."""
    assert estimators.noise_of(3.0, 1.125) == pytest.approx(2.0)
