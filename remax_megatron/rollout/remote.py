"""The engine on ranks of its own (`trainer.placement=split`): how the policy's ranks use it, and how those ranks serve.

On the policy's ranks `RemoteEngine`, `RemoteCollector` and `RemoteBatches` stand where `Engine`, `Collector` and
`WrittenHere` stand otherwise; on the engine's ranks are the real ones, in `EngineService`. With `ahead` the answers of
the next step are written while this one trains: one version of the weights older than the policy, always.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from remax_megatron.parallel.link import Link, TensorNames
from remax_megatron.phases import PhaseTimer
from remax_megatron.rollout.batches import AnsweredBatch, WrittenHere
from remax_megatron.rollout.collect import Collector, check_rewards
from remax_megatron.rollout.engine import CanaryPrompt, Engine, Scored
from remax_megatron.types import Completion, Prompt


@dataclass(frozen=True)
class WeightFormat:
    """How the weights travel: names and shapes of the tensors of each bucket, and their type."""

    buckets: tuple[TensorNames, ...]
    dtype: torch.dtype


class RemoteEngine:
    """The engine, as the policy's ranks call it; see `Engine` for what the methods do. Collective over these ranks."""

    asleep_bytes = None

    def __init__(self, link: Link, tokenizer: Any, weights: WeightFormat):
        """Weights go through the `link` in the format `weights`; the `tokenizer` decodes answers."""
        self._link, self.tokenizer, self._weights = link, tokenizer, weights
        self.weight_version = -1
        self.pause_s = 0.0  # seconds in which the engine took weights and wrote nothing, at the last reload

    def resume_at(self, weight_version: int) -> None:
        """See `Engine`."""
        self._link.call("resume_at", weight_version)

    def reload(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See `Engine`; the weights are sent to the engine's ranks."""
        self._link.begin("reload")
        self._link.send_weights(weights, self._weights.buckets)
        self.weight_version, self.pause_s = self._link.result()

    def score(self, requests: Sequence[CanaryPrompt]) -> list[list[Scored]]:
        """See `Engine`."""
        return self._link.call("score", list(requests))


class RemoteCollector:
    """The collector, as the policy's ranks call it; see `Collector` for what the methods do. Collective over these
    ranks."""

    pool = None

    def __init__(self, link: Link, engine: RemoteEngine, timer: PhaseTimer, max_failure_share: float):
        """`link` leads to the ranks of the `engine`; `timer` times the phases of this rank."""
        self._link, self.engine, self.timer, self.max_failure_share = link, engine, timer, max_failure_share

    def validation(self, prompts: Sequence[Prompt]) -> list[list[Completion]]:
        """See `Collector`."""
        return self._link.call("validation", list(prompts))

    def check_rewards(self, answers: Sequence[Completion]) -> None:
        """See `Collector`."""
        check_rewards(answers, self.max_failure_share)

    def close(self) -> None:
        """End the service of the engine's ranks."""
        self._link.close()


class RemoteBatches:
    """Answers that the engine's ranks write: when the step wants them, or, `ahead`, while the step before trains.
    Collective over the policy's ranks."""

    def __init__(self, link: Link, engine: RemoteEngine, timer: PhaseTimer, *, ahead: bool):
        """`link` leads to the ranks of the `engine`; `timer` times the phase `wait` of this rank."""
        self._link, self._engine, self._timer, self._ahead = link, engine, timer, ahead
        self._began = self._taken = 0.0
        self.pending: AnsweredBatch | None = None

    def take(self, step: int, batch: Sequence[int], following: Sequence[int] | None) -> AnsweredBatch:
        """See `Batches`. The answers are of the engine's weights, or, written ahead, of those before."""
        self._began = time.time()
        answered, self.pending = self.pending, None
        age = 0 if answered is None else 1
        if answered is None:
            self._link.begin("batch", step, list(batch))
            answered = self._wait()
        found = self._engine.weight_version - answered.weight_version
        assert found == age, f"the answers of step {step} are of weights {found} versions old, and not {age}"
        if self._ahead and following is not None:
            self._link.begin("batch", step + 1, list(following))
        self._taken = time.time()
        return replace(answered, metrics={**answered.metrics, "rollout/staleness": age})

    def finish(self) -> dict[str, float]:
        """See `Batches`. The metrics, in seconds since `take`: when this step trained, and when the answers of the next
        one were written."""
        trained = time.time()
        if not self._link.is_waiting:
            return {}
        self.pending = self._wait()
        times = {
            "update_begin": self._taken,
            "update_end": trained,
            "ahead_begin": self.pending.began,
            "ahead_end": self.pending.ended,
        }
        return {f"timeline/{name}_s": at - self._began for name, at in times.items()}

    def _wait(self) -> AnsweredBatch:
        with self._timer.phase("wait"):
            return self._link.result()


class EngineService:
    """The engine's ranks of a split run: they do what the policy's ranks call for until these close the service."""

    def __init__(self, link: Link, engine: Engine, collector: Collector, batches: WrittenHere, weights: WeightFormat):
        """All of it is this rank's; `weights` is the format in which the policy sends them."""
        self._link, self._engine, self.collector = link, engine, collector
        self._batches, self._weights = batches, weights

    def run(self) -> None:
        """Serve. Every rank of the engine calls."""
        self._link.serve(
            {
                "resume_at": self._engine.resume_at,
                "reload": self._reload,
                "score": self._engine.score,
                "batch": self._batch,
                "validation": self.collector.validation,
            }
        )

    def _reload(self) -> tuple[int, float]:
        """(version of the weights, seconds that it took); the policy sends the weights meanwhile."""
        began = time.perf_counter()
        with self.collector.timer.phase("sync"):
            self._engine.reload(self._link.received_weights(self._weights.buckets, self._weights.dtype))
            if self._engine.device.type == "cuda":
                torch.cuda.synchronize()
        return self._engine.weight_version, time.perf_counter() - began

    def _batch(self, step: int, batch: Sequence[int]) -> AnsweredBatch:
        self.collector.timer.pop()
        answered = self._batches.take(step, batch)
        return replace(answered, metrics={**answered.metrics, **self.collector.timer.pop()})
