"""How long a run is, by its prompts, and what is said when it cannot be as long as it was asked to be."""

from __future__ import annotations

import pytest

from remax_megatron.config.schema import Config
from remax_megatron.inputs import steps_out_of_reach, total_steps


def settings(batch: int, epochs: int, steps: int | None) -> Config:
    config = Config()
    config.data.train_batch_size, config.trainer.total_epochs, config.trainer.total_training_steps = (
        batch,
        epochs,
        steps,
    )
    return config


@pytest.mark.parametrize(
    ("num_prompts", "batch", "epochs", "asked", "steps", "epochs_for_it"),
    [
        (64, 8, 1, 50, 8, 7),  # 8 steps an epoch: 50 need 6 epochs and 2 steps
        (70, 8, 2, 17, 16, 3),  # the last 6 prompts of an epoch are no batch
        (10, 10, 1, 2, 1, 2),
    ],
)
def test_a_run_that_is_shorter_than_asked_says_so(num_prompts, batch, epochs, asked, steps, epochs_for_it):
    config = settings(batch, epochs, asked)
    assert total_steps(config, num_prompts) == steps
    (note,) = steps_out_of_reach(config, num_prompts)
    for words in (f"total_training_steps={asked} has no effect", f"give {steps} (", f"total_epochs={epochs_for_it}"):
        assert words in note
    config.trainer.total_epochs = epochs_for_it
    assert steps_out_of_reach(config, num_prompts) == [] and total_steps(config, num_prompts) == asked


@pytest.mark.parametrize(("epochs", "asked"), [(1, None), (1, 8), (2, 9), (1, 1)])
def test_a_run_that_can_be_as_long_as_asked_says_nothing(epochs, asked):
    assert steps_out_of_reach(settings(8, epochs, asked), 64) == []
