"""The learning rate by hand: warmup, line, half a cosine, and what the settings make of a run's length."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from remax_megatron.config.schema import LR_DECAY_STYLES, Actor, Config, Optim
from remax_megatron.policy.learning_rate import LearningRate, learning_rate
from remax_megatron.policy.settings import PolicySettings

# peak 1, floor 0.1, two steps of warmup, decayed at 6: done is 0, 1/4, 2/4, 3/4 at steps 2 to 5.
GOLDEN = {
    "constant": [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
    "linear": [0.5, 1.0, 1.0, 0.775, 0.55, 0.325, 0.1, 0.1],
    # 0.1 + 0.9 * (1 + cos(pi / 4)) / 2 = 0.1 + 0.9 * 0.8535534, and 0.1 + 0.9 * 0.1464466
    "cosine": [0.5, 1.0, 1.0, 0.8681981, 0.55, 0.2318019, 0.1, 0.1],
}


@pytest.mark.parametrize("style", LR_DECAY_STYLES)
def test_rates_by_hand(style):
    schedule = LearningRate(1.0, 0.1, style, warmup_steps=2, decay_steps=6)
    assert [schedule(n) for n in range(8)] == pytest.approx(GOLDEN[style], abs=1e-7)


@pytest.mark.parametrize("style", LR_DECAY_STYLES)
def test_the_decay_is_that_of_megatron_core(style):
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    ours = LearningRate(3e-6, 2e-7, style, warmup_steps=3, decay_steps=20)
    for made in range(3, 25):
        theirs = SimpleNamespace(
            max_lr=3e-6, min_lr=2e-7, init_lr=0.0, lr_decay_style=style, lr_warmup_steps=3, lr_decay_steps=20
        )
        theirs.num_steps = made
        assert ours(made) == pytest.approx(OptimizerParamScheduler.get_lr(theirs, {}), rel=1e-12)


def test_without_a_warmup_the_first_step_has_the_peak_and_the_last_one_is_above_the_floor():
    assert [LearningRate(4.0, style="linear", decay_steps=4)(n) for n in range(5)] == [4.0, 3.0, 2.0, 1.0, 0.0]
    assert LearningRate(4.0)(10**6) == 4.0


def test_a_warmup_as_long_as_the_run_is_never_decayed():
    schedule = LearningRate(1.0, style="cosine", warmup_steps=4, decay_steps=2)
    assert [schedule(n) for n in range(5)] == [0.25, 0.5, 0.75, 1.0, 0.0]


@pytest.mark.parametrize(
    ("changes", "total", "warmup", "decay"),
    [
        ({}, None, 0, None),
        ({"lr_warmup_steps": 5}, 100, 5, 100),
        ({"lr_warmup_steps_ratio": 0.1}, 55, 5, 55),  # rounded down
        ({"lr_warmup_steps_ratio": 0.1, "lr_warmup_steps": 7}, 100, 7, 100),  # the number goes before the share
        ({"lr_warmup_steps_ratio": 0.1, "lr_warmup_steps": -1}, 100, 10, 100),
        ({"lr_warmup_steps_ratio": 0.1, "lr_decay_steps": 40}, 100, 4, 40),
    ],
)
def test_steps_of_the_settings(changes, total, warmup, decay):
    schedule = learning_rate(Optim(**changes), total)
    assert (schedule.warmup_steps, schedule.decay_steps) == (warmup, decay)


def test_the_policy_is_told_the_length_of_the_run():
    config = Config()
    config.actor_rollout_ref.actor.optim.lr_decay_style = "linear"
    config.actor_rollout_ref.actor.optim.min_lr = 1e-7
    schedule = PolicySettings.of(config, total_updates=10).learning_rate()
    assert schedule == LearningRate(1e-6, 1e-7, "linear", 0, 10)
    assert PolicySettings(Actor()).learning_rate()(3) == 1e-6
