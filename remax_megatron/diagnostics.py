"""What a step was like, from its rollouts and updates: the numbers of metrics.jsonl. Pure. Shares are 0 to 1."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from remax_megatron.algorithm.estimators import estimator_variances
from remax_megatron.types import Completion, Rollout, Row

if TYPE_CHECKING:
    from remax_megatron.flops import UpdateFlops
    from remax_megatron.policy.trained_model import UpdateResult
    from remax_megatron.rollout.bridge import SyncReport
    from remax_megatron.update import LearnResult


def rollout_metrics(rollouts: Sequence[Rollout], rows: Sequence[Row]) -> dict[str, float]:
    """Rewards, baselines, advantages and lengths, and the variances that other estimators' advantages would have had.

    `advantage/*` are over answers, of an answer's mean over its tokens (they differ with a KL in the reward).
    """
    samples = [sample for rollout in rollouts for sample in rollout.samples]
    rewards, lengths = [s.reward for s in samples], [len(s.token_ids) for s in samples]
    advantages = [sum(row.advantages) / len(row.advantages) if row.advantages else 0.0 for row in rows]
    count = len(samples)
    metrics = {
        "reward/mean": sum(rewards) / count,
        "reward/std": _std(rewards),
        "reward/min": min(rewards),
        "reward/max": max(rewards),
        "advantage/mean": sum(advantages) / count,
        "advantage/std": _std(advantages),
        "advantage/zero_share": sum(not any(row.advantages) for row in rows) / count,
        "response/mean_tokens": sum(lengths) / count,
        "response/std_tokens": _std(lengths),
        "response/min_tokens": min(lengths),
        "response/max_tokens": max(lengths),
        "response/truncated_share": sum(not s.finished for s in samples) / count,
        "batch/num_tokens": sum(row.num_tokens for row in rows),
    }
    greedy = [rollout.greedy.reward for rollout in rollouts if rollout.greedy is not None]
    variances = estimator_variances(
        [[sample.reward for sample in rollout.samples] for rollout in rollouts], greedy or None
    )
    metrics |= {f"variance/{name}": variance for name, variance in variances.items()}
    metrics |= scoring_metrics([answer for rollout in rollouts for answer in rollout.completions])
    return metrics | (_against_greedy(rollouts) if greedy else {})


def scoring_metrics(answers: Sequence[Completion]) -> dict[str, float]:
    """Rewards that could not be had, the scorers' other numbers, and where GSM8K's strict and tolerant rule differ."""
    metrics = {
        f"reward/{outcome}_share": sum(answer.reward_outcome == outcome for answer in answers) / len(answers)
        for outcome in ("error", "timeout", "crash")
    }
    for name in dict.fromkeys(name for answer in answers for name in answer.scores):
        values = [answer.scores[name] for answer in answers if name in answer.scores]
        metrics[f"reward/extra/{name}"] = sum(values) / len(values)
    tolerant = [(answer.reward, answer.scores["flexible"]) for answer in answers if "flexible" in answer.scores]
    if tolerant:
        metrics["reward/strict_flexible_disagreement"] = sum(a != b for a, b in tolerant) / len(tolerant)
    return metrics


def _against_greedy(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """How samples compare with the greedy answer of their prompt; `win_share`: they beat it."""
    gains = [s.reward - r.greedy.reward for r in rollouts if r.greedy is not None for s in r.samples]
    return {
        "baseline/mean": sum(r.greedy.reward for r in rollouts if r.greedy is not None) / len(rollouts),
        "baseline/win_share": sum(gain > 0.0 for gain in gains) / len(gains),
        "baseline/tie_share": sum(gain == 0.0 for gain in gains) / len(gains),
        "baseline/lose_share": sum(gain < 0.0 for gain in gains) / len(gains),
    }


def _std(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5


def update_metrics(results: Sequence[UpdateResult]) -> dict[str, float]:
    """Means over the optimizer steps of one rollout batch (over the skipped ones when none was made); micro-batches
    are counted over all of them.

    What compares the policy with the engine (`Objective.metrics`) is of the first step, the only one before any weight
    moved.
    """
    if not results:  # every advantage was 0, and so is the gradient
        return {"actor/loss": 0.0, "actor/grad_norm": 0.0, "actor/num_updates": 0}

    made = [result for result in results if not result.skipped]

    counted = made or results

    def mean(values: Iterable[float]) -> float:
        return sum(values) / len(counted)

    of_actor = [name for name in results[0].metrics if name.startswith("actor/")]
    return {
        "actor/loss": mean(result.loss for result in counted),
        "actor/grad_norm": mean(result.grad_norm for result in counted),
        "actor/lr": results[-1].learning_rate,
        **{name: mean(result.metrics[name] for result in counted) for name in of_actor},
        "actor/num_updates": len(made),
        "batch/num_microbatches": sum(result.num_microbatches for result in results),
        "batch/fill": mean(result.fill for result in counted),
        **{name: value for name, value in results[0].metrics.items() if name not in of_actor},
    }


def sync_metrics(report: SyncReport) -> dict[str, float]:
    """`sync/seconds` is the transfer alone, `sync/canary_seconds` the proof that it arrived.

    `memory/engine_asleep_gib` is this rank's, of the sleep before; on GPUs only. `sync/engine_pause_s` is how long an
    engine on ranks of its own took weights and wrote nothing.
    """
    asleep, pause_s = report.engine_asleep_bytes, report.engine_pause_s
    where_known = {} if asleep is None else {"memory/engine_asleep_gib": asleep / 2**30}
    where_known |= {} if pause_s is None else {"sync/engine_pause_s": pause_s}
    return where_known | {
        "weight_version": report.weight_version,
        "sync/seconds": report.seconds,
        "sync/bytes": report.num_bytes,
        "sync/gb_per_s": report.gb_per_s,
        "sync/canary_seconds": report.canary_seconds,
        "sync/canary_mean_abs_diff": report.canary_mean,
        "sync/canary_max_abs_diff": report.canary_max,
    }


def throughput_metrics(
    rollouts: Sequence[Rollout], learned: LearnResult, times: dict[str, float], flops: UpdateFlops
) -> dict[str, float]:
    """Tokens per second of the whole run: trained ones (prompts included, once per pass over them) per second of
    update, generated ones (greedy answers included) per second of rollout; and the updates' FLOPs per second.

    The seconds of `perf/*` are those of the update without its phases `score` and `critic`, whose passes are not
    counted either."""
    generated = sum(len(c.token_ids) for r in rollouts for c in r.completions)
    trained = sum(result.num_tokens for result in learned.updates)
    update_s = times.get("time/update_s", 0.0)
    return {
        "throughput/trained_tokens_per_s": trained / max(update_s, 1e-9),
        "throughput/generated_tokens_per_s": generated / max(times.get("time/rollout_s", 0.0), 1e-9),
        **flops.metrics(
            learned.packed, update_s - sum(times.get(f"time/{part}_s", 0.0) for part in ("score", "critic"))
        ),
    }
