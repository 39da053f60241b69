"""The numbers of a step, by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from remax_megatron.algorithm.objective import MISMATCH
from remax_megatron.diagnostics import rollout_metrics, sync_metrics, throughput_metrics, update_metrics
from remax_megatron.guards import Skip
from remax_megatron.types import Completion, Prompt, Rollout, Row


def completion(reward: float, num_tokens: int, finished: bool = True) -> Completion:
    return Completion([7] * num_tokens, [-1.0] * num_tokens, finished, 0, reward=reward)


ROLLOUTS = [
    Rollout(Prompt(0, (1, 2), "s", "1"), [completion(1.0, 4), completion(0.0, 6)], completion(0.0, 5)),
    Rollout(
        Prompt(1, (1, 2, 3), "s", "1"), [completion(0.0, 8, finished=False), completion(1.0, 2)], completion(1.0, 3)
    ),
]
ROWS = [
    Row(r.prompt.token_ids, s.token_ids, [s.reward - r.greedy.reward] * len(s.token_ids), [])
    for r in ROLLOUTS
    for s in r.samples
]


def test_rollout_metrics_by_hand() -> None:
    # Rewards 1 0 | 0 1 against 0 | 1: advantages 1 0 -1 0. Rows of 6 8 11 5 tokens.
    assert rollout_metrics(ROLLOUTS, ROWS) == {
        "reward/mean": 0.5,
        "reward/std": 0.5,
        "reward/min": 0.0,
        "reward/max": 1.0,
        "baseline/mean": 0.5,
        "advantage/mean": 0.0,
        "advantage/std": pytest.approx(0.5**0.5),
        "advantage/zero_share": 0.5,
        "baseline/win_share": 0.25,
        "baseline/tie_share": 0.5,
        "baseline/lose_share": 0.25,
        "reward/error_share": 0.0,
        "reward/timeout_share": 0.0,
        "reward/crash_share": 0.0,
        # remax 1 0 -1 0; each of the others from 1 0 | 0 1: rloo 1 -1 -1 1, grpo half of it, reinforce the reward.
        "variance/remax": 0.5,
        "variance/rloo": 1.0,
        "variance/grpo": 0.25,
        "variance/reinforce": 0.25,
        "response/mean_tokens": 5.0,
        "response/std_tokens": pytest.approx(5.0**0.5),
        "response/min_tokens": 2,
        "response/max_tokens": 8,
        "response/truncated_share": 0.25,
        "batch/num_tokens": 30,
    }


def test_throughput_by_hand() -> None:
    times = {"time/update_s": 2.0, "time/score_s": 1.5, "time/rollout_s": 4.0}
    learned = SimpleNamespace(updates=[SimpleNamespace(num_tokens=30)], packed=["rows"])
    flops = SimpleNamespace(metrics=lambda packed, seconds: {"perf/tflops": len(packed) / seconds})
    assert throughput_metrics(ROLLOUTS, learned, times, flops) == {
        "throughput/trained_tokens_per_s": 15.0,  # 30 / 2
        "throughput/generated_tokens_per_s": 7.0,  # (20 sampled + 8 greedy) / 4
        "perf/tflops": 2.0,  # 1 / (2 - 1.5): the scoring passes are in neither number
    }


def test_update_metrics_are_means_and_the_mismatch_is_that_of_the_first_update() -> None:
    def result(x: float, num_microbatches: int) -> SimpleNamespace:
        values = {name: x + i for i, name in enumerate(["loss", "grad_norm", "fill", "learning_rate"])}
        metrics = {"actor/loss": x, "actor/entropy": x + 4, MISMATCH: x + 5, "importance/mean": x + 6}
        return SimpleNamespace(**values, metrics=metrics, num_microbatches=num_microbatches, skipped=Skip.NONE)

    expected = {
        "actor/loss": 0.5,
        "actor/grad_norm": 1.5,
        "actor/lr": 4.0,  # the last step's
        "actor/entropy": 4.5,
        "actor/num_updates": 2,
        "batch/num_microbatches": 7,
        "batch/fill": 2.5,
        "rollout/logprob_diff_mean": 5.0,  # the first step's
        "importance/mean": 6.0,
    }
    assert update_metrics([result(0.0, 3), result(1.0, 4)]) == expected
    skipped = result(math.nan, 2)  # is in no mean, but its micro-batches were computed
    skipped.skipped = Skip.NONFINITE
    with_skipped = update_metrics([result(0.0, 3), skipped, result(1.0, 4)])
    assert with_skipped == expected | {"batch/num_microbatches": 9}
    assert math.isnan(update_metrics([skipped])["actor/loss"]) and update_metrics([skipped])["actor/num_updates"] == 0
    assert update_metrics([]) == {"actor/loss": 0.0, "actor/grad_norm": 0.0, "actor/num_updates": 0}


def test_sync_metrics() -> None:
    report = SimpleNamespace(
        weight_version=3,
        seconds=0.5,
        num_bytes=10**9,
        canary_seconds=0.1,
        canary_mean=1e-6,
        canary_max=2e-5,
        gb_per_s=2.0,
        engine_asleep_bytes=3 * 2**29,
        engine_pause_s=0.25,
    )
    assert sync_metrics(report) == {
        "sync/engine_pause_s": 0.25,
        "memory/engine_asleep_gib": 1.5,
        "weight_version": 3,
        "sync/seconds": 0.5,
        "sync/bytes": 10**9,
        "sync/gb_per_s": 2.0,
        "sync/canary_seconds": 0.1,
        "sync/canary_mean_abs_diff": 1e-6,
        "sync/canary_max_abs_diff": 2e-5,
    }
    report.engine_asleep_bytes = None  # on CPUs
    assert "memory/engine_asleep_gib" not in sync_metrics(report)
