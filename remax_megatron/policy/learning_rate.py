"""The learning rate as a function of the optimizer steps that were made: a linear warmup, then constant or decaying.

The decay is Megatron-Core's (`OptimizerParamScheduler.get_lr`, 0.16): from the end of the warmup to `decay_steps` the
rate falls from `peak` to `floor`, along a line or half a cosine, and stays there. The warmup begins at peak / steps and
not at 0, so that the first step is not lost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from remax_megatron.config.schema import Optim


@dataclass(frozen=True)
class LearningRate:
    """A schedule. `style` is constant, linear or cosine; `decay_steps` counts the warmup too; constant needs none."""

    peak: float
    floor: float = 0.0
    style: str = "constant"
    warmup_steps: int = 0
    decay_steps: int | None = None

    def __call__(self, num_updates: int) -> float:
        """The rate of the optimizer step that follows `num_updates` others."""
        if num_updates < self.warmup_steps:
            return self.peak * ((num_updates + 1) / self.warmup_steps)
        if self.style == "constant":
            return self.peak
        assert self.decay_steps is not None, "a decay needs its end"
        if num_updates >= self.decay_steps:
            return self.floor
        done = (num_updates - self.warmup_steps) / (self.decay_steps - self.warmup_steps)
        share = 1.0 - done if self.style == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return self.floor + share * (self.peak - self.floor)


def learning_rate(optim: Optim, total_updates: int | None) -> LearningRate:
    """The schedule that the settings `optim` describe, in a run of `total_updates` optimizer steps."""
    decay_steps = total_updates if optim.lr_decay_steps is None else optim.lr_decay_steps
    warmup_steps = max(optim.lr_warmup_steps, 0)
    if not warmup_steps and optim.lr_warmup_steps_ratio:
        assert decay_steps is not None, "a share needs a whole"
        warmup_steps = int(optim.lr_warmup_steps_ratio * decay_steps)
    return LearningRate(optim.lr, optim.min_lr, optim.lr_decay_style, warmup_steps, decay_steps)
