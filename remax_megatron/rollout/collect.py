"""From prompts to scored answers on every rank: each replica answers and scores its share, then all share all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch.distributed as dist

from remax_megatron.metrics import PhaseTimer
from remax_megatron.rewards.scoring import Scorer
from remax_megatron.rollout.engine import Engine
from remax_megatron.types import Completion, Prompt, Rollout

T = TypeVar("T")


class Collector:
    """Runs the engine and the scorer over a batch of prompts; its calls are collective over the world."""

    def __init__(self, engine: Engine, scorer: Scorer, timer: PhaseTimer):
        self.engine, self.scorer, self.timer = engine, scorer, timer

    def rollouts(self, prompts: Sequence[Prompt], *, step: int) -> list[Rollout]:
        """The answers to each prompt, scored, in the order of `prompts`, on every rank.

        The engine gives its GPU memory back afterwards; the next weight sync wakes it.
        """
        mine = _share(prompts, self.engine.replica, self.engine.num_replicas)
        with self.timer.phase("rollout"):
            rollouts = self.engine.rollout(mine, step=step)
            self.engine.sleep()
            dist.barrier()  # the phase is as long as the slowest replica's
        with self.timer.phase("reward"):
            if self.engine.leads_replica:
                for rollout in rollouts:
                    for completion in rollout.completions:
                        completion.reward = self._score(rollout.prompt, completion)
            return self._gather(rollouts)

    def greedy(self, prompts: Sequence[Prompt]) -> list[Completion]:
        """The scored greedy answer of each prompt, in order, on every rank."""
        mine = _share(prompts, self.engine.replica, self.engine.num_replicas)
        completions = self.engine.greedy(mine)
        if self.engine.leads_replica:
            for prompt, completion in zip(mine, completions, strict=True):
                completion.reward = self._score(prompt, completion)
        return self._gather(completions)

    def _score(self, prompt: Prompt, completion: Completion) -> float:
        return self.scorer(prompt.data_source, completion.text, prompt.ground_truth, prompt.extra_info)

    def _gather(self, mine: list[T]) -> list[T]:
        parts: list = [None] * dist.get_world_size()
        dist.all_gather_object(parts, mine if self.engine.leads_replica else [])
        return [item for part in parts for item in part]


def _share(items: Sequence[T], index: int, count: int) -> Sequence[T]:
    """The `index`-th of `count` consecutive parts whose sizes differ by at most one."""
    bounds = [len(items) * i // count for i in range(count + 1)]
    return items[bounds[index] : bounds[index + 1]]
