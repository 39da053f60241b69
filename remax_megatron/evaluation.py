"""Validation: the greedy answer of every validation prompt, scored."""

from __future__ import annotations

from collections.abc import Sequence

from remax_megatron.rollout.collect import Collector
from remax_megatron.types import Prompt


def validate(collector: Collector, prompts: Sequence[Prompt], *, batch_size: int | None) -> dict[str, float]:
    """{"val/accuracy": mean reward, 0 to 1 for binary rewards, ...}. Collective: every rank, same prompts."""
    batch_size = batch_size or len(prompts)
    completions = []
    with collector.timer.phase("validation"):
        for start in range(0, len(prompts), batch_size):
            completions += collector.greedy(prompts[start : start + batch_size])
    count = len(completions)
    return {
        "val/accuracy": sum(c.reward for c in completions) / count,
        "val/mean_tokens": sum(len(c.token_ids) for c in completions) / count,
        "val/truncated_share": sum(not c.finished for c in completions) / count,
        "val/num_prompts": count,
    }
