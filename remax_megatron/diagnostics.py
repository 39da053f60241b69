"""What a step was like, from its rollouts and updates: the numbers of metrics.jsonl. Pure. Shares are 0 to 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from remax_megatron.types import Rollout, Row

if TYPE_CHECKING:
    from remax_megatron.policy.policy import UpdateResult
    from remax_megatron.rollout.bridge import SyncReport


def rollout_metrics(rollouts: Sequence[Rollout], rows: Sequence[Row]) -> dict[str, float]:
    """Rewards, baselines, advantages and lengths. `baseline/win_share`: samples that beat the greedy answer."""
    samples = [sample for rollout in rollouts for sample in rollout.samples]
    advantages = [s.reward - rollout.greedy.reward for rollout in rollouts for s in rollout.samples]
    count = len(samples)
    mean_advantage = sum(advantages) / count
    lengths = [len(sample.token_ids) for sample in samples]
    return {
        "reward/mean": sum(s.reward for s in samples) / count,
        "baseline/mean": sum(r.greedy.reward for r in rollouts) / len(rollouts),
        "advantage/mean": mean_advantage,
        "advantage/std": (sum((a - mean_advantage) ** 2 for a in advantages) / count) ** 0.5,
        "advantage/zero_share": sum(a == 0.0 for a in advantages) / count,
        "baseline/win_share": sum(a > 0.0 for a in advantages) / count,
        "baseline/tie_share": sum(a == 0.0 for a in advantages) / count,
        "baseline/lose_share": sum(a < 0.0 for a in advantages) / count,
        "response/mean_tokens": sum(lengths) / count,
        "response/max_tokens": max(lengths),
        "response/truncated_share": sum(not s.finished for s in samples) / count,
        "batch/num_tokens": sum(row.num_tokens for row in rows),
    }


def update_metrics(results: Sequence[UpdateResult]) -> dict[str, float]:
    """Means over the optimizer steps of one rollout batch; micro-batches are counted over all of them.

    The mismatch between engine and policy is that of the first step, the only one before any weight moved.
    """

    def mean(name: str) -> float:
        return sum(getattr(result, name) for result in results) / len(results)

    return {
        "actor/loss": mean("loss"),
        "actor/grad_norm": mean("grad_norm"),
        "actor/lr": results[-1].learning_rate,
        "actor/entropy": mean("entropy"),
        "actor/clip_share": mean("clip_share"),
        "actor/dual_clip_share": mean("dual_clip_share"),
        "actor/approx_kl": mean("approx_kl"),
        "actor/num_updates": len(results),
        "batch/num_microbatches": sum(result.num_microbatches for result in results),
        "batch/fill": mean("fill"),
        "rollout/logprob_diff_mean": results[0].mismatch_mean,
        "rollout/logprob_diff_signed_mean": results[0].mismatch_signed_mean,
        "rollout/logprob_diff_max": results[0].mismatch_max,
    }


def sync_metrics(report: SyncReport) -> dict[str, float]:
    """`sync/seconds` is the transfer alone, `sync/canary_seconds` the proof that it arrived."""
    return {
        "weight_version": report.weight_version,
        "sync/seconds": report.seconds,
        "sync/bytes": report.num_bytes,
        "sync/gb_per_s": report.gb_per_s,
        "sync/canary_seconds": report.canary_seconds,
        "sync/canary_mean_abs_diff": report.canary_mean,
        "sync/canary_max_abs_diff": report.canary_max,
    }


def throughput_metrics(
    rollouts: Sequence[Rollout], results: Sequence[UpdateResult], times: dict[str, float]
) -> dict[str, float]:
    """Tokens per second of the whole run: trained ones (prompts included, once per pass over them) per second of
    update, generated ones (greedy answers included) per second of rollout."""
    generated = sum(len(c.token_ids) for r in rollouts for c in (r.greedy, *r.samples))
    trained = sum(result.num_tokens for result in results)
    return {
        "throughput/trained_tokens_per_s": trained / max(times.get("time/update_s", 0.0), 1e-9),
        "throughput/generated_tokens_per_s": generated / max(times.get("time/rollout_s", 0.0), 1e-9),
    }
