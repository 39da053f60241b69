"""Updates of real shapes: local layers against Transformer Engine's, under each recompute mode.

Random weights; 16k packed tokens a micro-batch, two of them an update, rows as long as those of GSM8K. Tokens, FLOPs
and MFU are those of remax_megatron/flops.py: model FLOPs, no recomputation. Memory is the allocator's largest, beside
what `doctor` counts ahead. What by that count does not fit the card by far is not tried.
"""

from __future__ import annotations

from pathlib import Path

import torch
from step import draw_rows

from gpu_parts.part import Numbers, Part
from remax_megatron.algorithm.aggregation import weigh_rows
from remax_megatron.config.schema import Config, recompute_of
from remax_megatron.flops import RowGroup, UpdateFlops, peak_bf16_tflops
from remax_megatron.model_facts import ModelFacts
from remax_megatron.plan.ledger import MicroBatch, ledger
from remax_megatron.types import Row

SHAPES = ("1.5b", "3b", "0.5b")  # the first two have a target
RECOMPUTE = ("none", "selective", "full")
LAYERS = ("local", "transformer_engine")
REPEATS = 2
BY_FAR = 1.1  # the ledger is trusted to so much
MEGATRON = "actor_rollout_ref.actor.megatron"


def run(part: Part) -> None:
    no_te = part.lacks_transformer_engine()
    for shape in SHAPES[:1] if part.tiny else SHAPES:
        folder = part.model(shape)
        for recompute in RECOMPUTE:
            for layers in LAYERS:
                if layers == "transformer_engine" and no_te:
                    part.not_available(f"{shape} {layers} {recompute}", no_te)
                else:
                    _case(part, shape, folder, layers, recompute)


def _case(part: Part, shape: str, folder: Path, layers: str, recompute: str) -> None:
    tokens = 512 if part.tiny else 16384
    config = part.settings(
        folder,
        f"{MEGATRON}.layers={layers}",
        f"{MEGATRON}.override_transformer_config.recompute_granularity={recompute}",
        f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu={tokens}",
    )
    facts = ModelFacts.from_folder(folder)
    rows = make_rows(facts.vocab_size, int(1.95 * tokens))  # two micro-batches, nearly full
    counted, name = _counted_gib(part, config, facts, rows), f"{shape} {layers} {recompute}"
    if part.device == "cuda" and counted > BY_FAR * _card_gib():
        part.not_available(name, f"the ledger counts {counted:.1f} GiB, the card has {_card_gib():.1f}")
        return
    part.case(name, lambda: _measure(part, config, rows) | {"ledger_gib": counted})


def make_rows(vocab_size: int, num_tokens: int) -> list[Row]:
    """Rows of random tokens, `num_tokens` of them or a few less, every one with a gradient."""
    rows: list[Row] = []
    for row in draw_rows(num_tokens // 256, 4, vocab_size):
        if sum(r.num_tokens for r in [*rows, row]) <= num_tokens:
            rows.append(row)
    weigh_rows(rows, "token-mean")
    return rows


def _measure(part: Part, config: Config, rows: list[Row]) -> Numbers:
    policy = part.policy(config)
    policy.update(rows)  # what is made once: moments, compiled code
    part.reset_peak()
    updates: list = []
    seconds = part.seconds(lambda: updates.extend(policy.update(rows) for _ in range(REPEATS))) / REPEATS
    peak_tflops = peak_bf16_tflops(torch.cuda.get_device_name()) if part.device == "cuda" else None
    flops = UpdateFlops(policy.facts, recompute_of(config), peak_tflops=peak_tflops)
    groups = [RowGroup(len(row.prompt_ids), [len(row.response_ids)]) for row in rows]
    found: Numbers = {"microbatches": updates[-1].num_microbatches, "tokens": updates[-1].num_computed_tokens}
    found |= {"seconds": seconds, "tokens_per_s": found["tokens"] / seconds}
    found["peak_gib" if part.device == "cuda" else "process_peak_gib"] = part.peak_gib()
    return found | {name.removeprefix("perf/"): value for name, value in flops.metrics(groups, seconds).items()}


def _counted_gib(part: Part, config: Config, facts: ModelFacts, rows: list[Row]) -> float:
    """What `doctor` counts for an update: the larger of forward and backward, and the optimizer's step."""
    tokens = config.actor_rollout_ref.actor.ppo_max_token_len_per_gpu
    share = sum(len(row.response_ids) for row in rows) / sum(row.num_tokens for row in rows)
    batch = MicroBatch(tokens, scored=round(tokens * share), count=2)
    counted = ledger(config, facts, 1, batch=batch, on_cpu=part.device == "cpu")
    return max(counted.peak("update"), counted.peak("optimizer")) / 2**30


def _card_gib() -> float:
    return torch.cuda.get_device_properties(0).total_memory / 2**30
