"""The bridge: the policy's weights into the rollout engine, and the canary that checks that they arrived.

After every sync the canary has fixed prompts scored by both sides, and the engine's greedy continuations of them
(which read the prefix cache) scored by the policy. A difference over the threshold stops the run before a rollout is
spent. In float32 no token may differ by more; in bfloat16 the mean over the continuations may not, because tokens that
the model would never write (log-probabilities around -15) carry several times the rounding of those it does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from remax_megatron.policy.policy import Policy
from remax_megatron.rollout.engine import CanaryPrompt, Engine
from remax_megatron.rollout.memory import CANARY_TOKENS, NUM_CANARIES, NUM_GENERATED
from remax_megatron.types import Prompt, Row

if TYPE_CHECKING:
    from remax_megatron.rollout.remote import RemoteEngine

# Largest accepted difference of log-probabilities in nats: of any token in float32, on average in bfloat16.
THRESHOLD = {"float32": 1e-4, "bfloat16": 2e-2}


class CanaryError(RuntimeError):
    """The engine does not compute with the policy's weights; the message names the worst token."""


@dataclass(frozen=True)
class SyncReport:
    """One sync: `num_bytes` of Hugging Face tensors in `seconds` (canary excluded), and the canary's differences.

    `engine_pause_s` are the seconds in which an engine on ranks of its own took the weights and wrote nothing; None
    where it shares its ranks with the policy. `engine_asleep_bytes` is what the device held beside torch's memory in
    the sleep before; None on a CPU, and before the first sleep.
    """

    weight_version: int
    seconds: float
    num_bytes: int
    canary_seconds: float
    canary_mean: float
    canary_max: float
    engine_asleep_bytes: int | None
    engine_pause_s: float | None = None

    @property
    def gb_per_s(self) -> float:
        """Compute the rate of the transfer, in 10^9 bytes per second."""
        return self.num_bytes / 1e9 / max(self.seconds, 1e-9)


class Bridge:
    """Holds the plan of the weight stream and the canary's prompts; `sync` is collective over the policy's ranks."""

    def __init__(
        self,
        policy: Policy,
        engine: Engine | RemoteEngine,
        canary_prompts: Sequence[Prompt],
        *,
        dtype: str,
        bucket_bytes: int,
        threshold: float | None,
    ):
        """No collectives.

        policy, engine  both ends of the bridge
        canary_prompts  the first tokens of some of them are the canary
        dtype           the engine's, "float32" or "bfloat16"
        bucket_bytes    of the `WeightStream`
        threshold       of the canary in nats, None: that of THRESHOLD
        """
        self.policy, self.engine = policy, engine
        # Either side's bfloat16 decides: rounding is what the limit has to leave room for.
        rounding = "float32" if dtype == "float32" and policy.dtype == torch.float32 else "bfloat16"
        self._by_mean = rounding == "bfloat16"
        self._threshold = THRESHOLD[rounding] if threshold is None else threshold
        self._stream = policy.weight_stream(getattr(torch, dtype), bucket_bytes)
        heads = [prompt.token_ids[:CANARY_TOKENS] for prompt in canary_prompts[:NUM_CANARIES]]
        self._canaries = [CanaryPrompt(token_ids, NUM_GENERATED) for token_ids in heads]

    def sync(self) -> SyncReport:
        """Send the weights, reset the prefix cache, run the canary; CanaryError on every rank when it fails."""
        start = time.perf_counter()
        self.policy.release_training_memory()
        self.engine.reload(self._stream)
        if self.policy.layout.device.type == "cuda":
            torch.cuda.synchronize()
        sent = time.perf_counter()
        mean, maximum = self._canary()
        return SyncReport(
            weight_version=self.engine.weight_version,
            seconds=sent - start,
            num_bytes=self._stream.num_bytes,
            canary_seconds=time.perf_counter() - sent,
            canary_mean=mean,
            canary_max=maximum,
            engine_asleep_bytes=self.engine.asleep_bytes,
            engine_pause_s=self.engine.pause_s,
        )

    def _canary(self) -> tuple[float, float]:
        """(mean over the continuations, maximum over all canary tokens) of the absolute difference in nats."""
        rows = []
        for answers in self.engine.score(self._canaries):
            for canary, (given, tokens, logprobs) in zip(self._canaries, answers, strict=True):
                rows.append(_row(canary.token_ids[:1], [*canary.token_ids[1:], *tokens], given + logprobs))
        ours = self.policy.logprobs(rows, temperature=1.0)
        differences = []
        for i, (row, logprobs) in enumerate(zip(rows, ours, strict=True)):
            start = len(self._canaries[i % len(self._canaries)].token_ids) - 1
            for position, (policy, engine) in enumerate(zip(logprobs, row.rollout_logprobs, strict=True)):
                token = row.response_ids[position]
                differences.append((abs(policy - engine), position >= start, position, token, policy, engine))
        generated = [difference[0] for difference in differences if difference[1]]
        mean = sum(generated) / len(generated)
        # NaN compares false with everything: count it as the worst.
        worst = max(differences, key=lambda d: d[0] if d[0] == d[0] else float("inf"))
        measured = mean if self._by_mean else worst[0]
        if not measured <= self._threshold:
            _, _, position, token, policy_value, engine_value = worst
            raise CanaryError(
                f"weight sync {self.engine.weight_version}: the rollout engine does not compute with the policy's "
                f"weights. {'Mean' if self._by_mean else 'Largest'} log-probability difference {measured:.3g} over the "
                f"canary, limit {self._threshold:g} (actor_rollout_ref.rollout.canary_threshold); "
                f"worst at scored position {position}, token {token} {self.engine.tokenizer.decode([token])!r}: "
                f"policy {policy_value:.6f}, engine {engine_value:.6f}"
            )
        return mean, worst[0]


def _row(prompt_ids: tuple[int, ...], response_ids: list[int], logprobs: list[float]) -> Row:
    return Row(prompt_ids, response_ids, [0.0] * len(response_ids), logprobs)
