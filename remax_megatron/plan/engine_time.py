"""How long the engine writes: a simulation of its batch, which shrinks as answers end, over the rates of the device.

Every token reads the weights once for the whole batch and the cache of every answer. What the engine's scheduler does
is simplified: answers start in order, as many as `max_num_seqs` and the cache allow, and each keeps room for its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from heapq import heappop, heappush

import numpy as np

from remax_megatron.config.schema import Config
from remax_megatron.flops import ForwardFlops, RowGroup
from remax_megatron.model_facts import ModelFacts
from remax_megatron.plan.gpus import Gpu
from remax_megatron.plan.ledger import BYTES, engine_weights
from remax_megatron.plan.parts import Part

# Bytes of the engine's share for its activations and CUDA graphs. Assumed: vLLM measures the former at its start, with
# max_num_batched_tokens, and reports 0.5 to 1 GiB for the graphs of models of this size.
WORKSPACE = 2 * 10**9
TAIL = 0.25  # the tail begins where fewer than this share of the largest batch still write


@dataclass(frozen=True)
class Decoded:
    """Stretches of a rollout in which the batch stays the same: steps, answers that write, and their tokens so far."""

    steps: np.ndarray
    running: np.ndarray
    context: np.ndarray

    @property
    def num_steps(self) -> int:
        """Count the steps of the engine."""
        return int(self.steps.sum())

    @property
    def tail_steps(self) -> int:
        """Count the steps at the end in which few answers still write."""
        full = np.flatnonzero(self.running >= TAIL * self.running.max(initial=0))
        return int(self.steps[full[-1] + 1 :].sum()) if len(full) else 0


@cache
def decode(requests: tuple[tuple[int, int], ...], most: int, cache_tokens: int) -> Decoded:
    """Simulate the writing of `requests` (prompt, answer tokens), at most `most` at once within `cache_tokens`."""
    running: list[tuple[int, int]] = []  # (step at which it ends, tokens it keeps)
    now = used = index = 0
    context = 0  # tokens of all that run, at `now`
    stretches = []
    while index < len(requests) or running:
        while index < len(requests) and len(running) < most:
            prompt, answer = requests[index]
            if running and used + prompt + answer > cache_tokens:
                break
            heappush(running, (now + answer, prompt + answer))
            used, context, index = used + prompt + answer, context + prompt, index + 1
        steps = running[0][0] - now
        stretches.append((steps, len(running), context + len(running) * steps / 2))
        context, now = context + len(running) * steps, now + steps
        while running and running[0][0] == now:
            _, kept = heappop(running)
            used, context = used - kept, context - kept
    made = np.array(stretches, dtype=float).reshape(-1, 3)
    return Decoded(made[:, 0], made[:, 1], made[:, 2])


def cache_bytes_per_token(config: Config, facts: ModelFacts) -> int:
    """Bytes of keys and values of a token, on each rank of the engine."""
    rollout = config.actor_rollout_ref.rollout
    size = BYTES[rollout.dtype or config.actor_rollout_ref.actor.megatron.dtype][0]
    heads = max(1, facts.num_key_value_heads // rollout.tensor_model_parallel_size)
    return 2 * size * facts.num_layers * heads * facts.head_dim


def cache_tokens(config: Config, facts: ModelFacts, gpu: Gpu, on_cpu: bool) -> int:
    """Tokens that the engine's cache holds; negative where its weights and workspace leave no room."""
    rollout = config.actor_rollout_ref.rollout
    if on_cpu:
        return int(rollout.kv_cache_gib * 2**30) // cache_bytes_per_token(config, facts)
    room = int(rollout.gpu_memory_utilization * gpu.memory) - engine_weights(config, facts) - WORKSPACE
    return room // cache_bytes_per_token(config, facts)


def replicas(requests: Sequence[tuple[int, Sequence[int]]], num_replicas: int) -> list[tuple[tuple[int, int], ...]]:
    """Deal prompts to the engine's replicas as rollout.collect does, in consecutive parts; of each, its requests.

    Only those two that can be the last are returned: with the longest answer, and with the most tokens.
    """
    bounds = [len(requests) * i // num_replicas for i in range(num_replicas + 1)]
    parts = [requests[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]
    flat = [tuple((prompt, answer) for prompt, answers in part for answer in answers) for part in parts]
    by_longest = max(flat, key=lambda part: max((answer for _, answer in part), default=0))
    by_tokens = max(flat, key=lambda part: sum(answer for _, answer in part))
    return [by_longest] if by_longest is by_tokens else [by_longest, by_tokens]


def engine_step_parts(config: Config, facts: ModelFacts, gpu: Gpu, made: Decoded) -> list[Part]:
    """Make the parts of the steps of `made`: memory or arithmetic, whichever takes longer, and what comes with each."""
    tp = config.actor_rollout_ref.rollout.tensor_model_parallel_size
    forward, one = ForwardFlops.of(facts), [RowGroup(0, [1])]
    per_token = forward.layers(one) + forward.logits(one)
    weights = engine_weights(config, facts) - _embedding_bytes(config, facts)
    keys = cache_bytes_per_token(config, facts)
    by_weights = made.steps * weights / gpu.memory_rate
    by_cache = made.steps * made.context * keys / gpu.memory_rate
    by_flops = made.steps * made.running * per_token / tp / gpu.peak_flops
    computes = by_flops > by_weights + by_cache
    steps = made.num_steps
    reduced = 2 * facts.num_layers * steps * (tp > 1)
    return [
        Part("reading the weights", float(by_weights[~computes].sum()), "decode_bandwidth"),
        Part("reading the cache", float(by_cache[~computes].sum()), "decode_bandwidth"),
        Part("decode arithmetic", float(by_flops[computes].sum()), "prefill_flops"),
        Part("all-reduces of the engine", reduced, "small_collective_s"),
        Part("steps of the engine", steps, "decode_step_s"),
    ]


def prefill_part(facts: ModelFacts, gpu: Gpu, tp: int, prompts: Sequence[int]) -> Part:
    """The reading of prompts, once each: the prefix cache has them for the other answers."""
    flops = ForwardFlops.of(facts).layers([RowGroup(prompt, []) for prompt in prompts])
    return Part("reading the prompts", flops / tp / gpu.peak_flops, "prefill_flops")


def _embedding_bytes(config: Config, facts: ModelFacts) -> int:
    """Of the engine's weights on a rank, those that a token looks up and does not multiply with."""
    if facts.tied_embeddings:
        return 0
    rollout = config.actor_rollout_ref.rollout
    size = BYTES[rollout.dtype or config.actor_rollout_ref.actor.megatron.dtype][0]
    return size * facts.vocab_size * facts.hidden_size // rollout.tensor_model_parallel_size
