"""Seeds, the numbers of a step, and the clean-up of vLLM's shared memory on CPU."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest

from remax_megatron.algorithm.objective import MISMATCH
from remax_megatron.diagnostics import rollout_metrics, sync_metrics, throughput_metrics, update_metrics
from remax_megatron.guards import Skip
from remax_megatron.parallel import cpu_platform
from remax_megatron.parallel.seeds import derive_seed
from remax_megatron.types import Completion, Prompt, Rollout, Row

# -- seeds ---------------------------------------------------------------------------------------------------------


def test_seeds_are_the_same_everywhere() -> None:
    # Golden values: numpy promises that SeedSequence does not change (NEP 19), so a run can be repeated anywhere.
    assert derive_seed(1, 2, 3, 4) == 8776932598661868044
    assert derive_seed(0) == 3717377837946358015
    assert derive_seed(1) != derive_seed(1, 0)
    assert type(derive_seed(1)) is int


def test_seeds_differ_in_every_part_and_have_63_bits() -> None:
    seeds = [derive_seed(*parts) for parts in product(range(6), repeat=4)]  # run, step, prompt, sample
    assert len(set(seeds)) == 6**4
    assert all(0 <= seed < 2**63 for seed in seeds) and max(seeds) > 2**62
    with pytest.raises(ValueError):
        derive_seed(-1)


# -- diagnostics ---------------------------------------------------------------------------------------------------


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
    )
    assert sync_metrics(report) == {
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


# -- shared memory -------------------------------------------------------------------------------------------------


def dead_pid() -> int:
    """The number of a process that has ended and been waited for."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert not os.path.exists(f"/proc/{process.pid}")
    return process.pid


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc, as vLLM's CPU worker does")
def test_segments_of_dead_runs_go_and_all_others_stay(tmp_path: Path) -> None:
    dead, alive = dead_pid(), os.getpid()
    gone = {f"remax-{dead}-0a1b2c3d-cpushm-1-{i}" for i in range(2)}
    stay = {
        f"remax-{alive}-0a1b2c3d-cpushm-1-0",  # another run of this very process, say: its owner lives
        "remax-1-0a1b2c3d-cpushm-1-0",  # process 1 always lives
        f"other-{dead}-0a1b2c3d-cpushm-1-0",
        f"remax-{dead}-0a1b2c3d-notes",
        "remax-none-cpushm-1-0",
        "sem.something",
    }
    for name in gone | stay:
        (tmp_path / name).write_bytes(b"x")
    removed = cpu_platform.remove_dead_shared_memory(str(tmp_path))
    assert sorted(removed) == sorted(str(tmp_path / name) for name in gone)
    assert names(tmp_path) == stay
    assert cpu_platform.remove_dead_shared_memory(str(tmp_path)) == []
    assert cpu_platform.remove_dead_shared_memory(str(tmp_path / "none")) == []


def test_own_segments_go_and_those_of_other_runs_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = cpu_platform.new_run_id(), cpu_platform.new_run_id()
    assert mine != other and mine.startswith(f"remax-{os.getpid()}-")
    for name in (f"{mine}-cpushm-0", f"{mine}-cpushm-1", f"{other}-cpushm-0", f"{mine}0-cpushm-0"):
        (tmp_path / name).write_bytes(b"x")
    before = names(tmp_path)
    monkeypatch.setattr(cpu_platform, "_own_run_id", None)  # prepare_vllm has not been called: nothing is ours
    cpu_platform.remove_own_shared_memory(str(tmp_path))
    assert names(tmp_path) == before
    monkeypatch.setattr(cpu_platform, "_own_run_id", mine)
    for _ in range(2):  # any rank may call, after another one has
        cpu_platform.remove_own_shared_memory(str(tmp_path))
        assert names(tmp_path) == {f"{other}-cpushm-0", f"{mine}0-cpushm-0"}


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc, as vLLM's CPU worker does")
def test_a_segment_that_another_rank_removes_first_is_no_error(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / f"remax-{dead_pid()}-0a1b2c3d-cpushm-0").write_bytes(b"x")
    remove = os.remove

    def raced(path: str) -> None:
        remove(path)
        remove(path)

    monkeypatch.setattr(os, "remove", raced)
    assert cpu_platform.remove_dead_shared_memory(str(tmp_path)) == []
