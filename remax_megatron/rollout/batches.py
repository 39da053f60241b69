"""The scored answers of each step's batch, written when the step wants them; for one step ahead see remote.py."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from remax_megatron.config.schema import Config, estimator_of, refill_limit_of
from remax_megatron.data.dataset import PromptDataset, further
from remax_megatron.rollout.collect import Collector
from remax_megatron.rollout.refill import refill
from remax_megatron.types import Rollout


@dataclass(frozen=True)
class AnsweredBatch:
    """The rollouts of a step, what was measured while they were written, and when that began and ended, in seconds
    since the epoch."""

    rollouts: list[Rollout]
    metrics: Mapping[str, float] = field(default_factory=dict)
    began: float = 0.0
    ended: float = 0.0

    @property
    def weight_version(self) -> int:
        """Return the version of the weights that wrote the answers; all of a batch are of one."""
        (version,) = {answer.weight_version for rollout in self.rollouts for answer in rollout.completions}
        return version


class Batches(Protocol):
    """Where the training loop gets its answers from. Every rank that trains calls, with the same arguments."""

    pending: AnsweredBatch | None  # the answers of the next step, where they were written ahead

    def take(self, step: int, batch: Sequence[int], following: Sequence[int] | None) -> AnsweredBatch:
        """The answers of `step`, to the prompts at the positions `batch`; those to `following`, the batch of the next
        step (None: there is none), may be begun."""

    def finish(self) -> dict[str, float]:
        """Wait for answers that are being written; the weights may change then. Returns metrics."""


class WrittenHere:
    """Answers that this process's ranks write when the step wants them."""

    pending: AnsweredBatch | None = None

    def __init__(self, collector: Collector, prompts: PromptDataset, config: Config):
        """`collector` answers, the `prompts` are those of training."""
        self._collector, self._prompts, self._config = collector, prompts, config

    def take(self, step: int, batch: Sequence[int], following: Sequence[int] | None = None) -> AnsweredBatch:
        """See `Batches`; nothing is begun. Collective over the ranks that hold an engine."""
        began = time.time()
        rollouts, metrics = self._answer(step, batch)
        return AnsweredBatch(rollouts, metrics, began, time.time())

    def finish(self) -> dict[str, float]:
        """See `Batches`; there is nothing to wait for."""
        return {}

    def _answer(self, step: int, batch: Sequence[int]) -> tuple[list[Rollout], dict[str, float]]:
        """The answers to the prompts at these positions, or, refilled, to those that count; and metrics."""
        num_prompts, config = len(self._prompts), self._config
        if not config.algorithm.refill:
            return self._collector.rollouts([self._prompts[i] for i in batch], step=step), {}
        order = [*batch, *further(num_prompts, batch, config.trainer.seed, step)]
        refilled = refill(
            (self._prompts[i] for i in order),
            lambda prompts: self._collector.rollouts(prompts, step=step, sleeps=False),
            estimator_of(config),
            wanted=config.data.train_batch_size,
            limit=refill_limit_of(config, num_prompts),
        )
        self._collector.sleep()
        return refilled.rollouts, {"refill/answered_prompts": refilled.num_answered}
