"""The doctor's ledger against the bytes that the trainer's own code holds, counted on fake CUDA tensors."""

from __future__ import annotations

import functools

import pytest

from benchmarks.gpu_counts import Counts, stage_jobs
from remax_megatron.config.schema import Config
from remax_megatron.plan.fitting import with_setting
from remax_megatron.plan.ledger import ledger
from tests.plan.ledger_cases import CASES, FACTS, TE, Case
from tests.stand_ins.fake_cuda.processes import Job, play_each


def jobs(case: Case) -> list[Job]:
    return stage_jobs(
        case.config, FACTS[case.model], row=case.row, num_microbatches=case.num_microbatches, phases=("update",)
    )


EVERYDAY = [CASES[i] for i in (1, 7, 9, 12)]


@functools.cache
def counted(layers: str, everyday: bool) -> dict[Case, list[int]]:
    """The peaks on a rank of each stage, of all such cases: played together, they keep all cores busy."""
    cases = [case for case in CASES if case.layers == layers and (case in EVERYDAY) == everyday]
    by_case = [jobs(case) for case in cases]
    flat = [job for part in by_case for job in part]
    reports = iter(play_each(flat, transformer_engine=layers == TE, timeout_s=900))
    return {
        case: [Counts.of(job, next(reports)).peak_bytes for job in part]
        for case, part in zip(cases, by_case, strict=True)
    }


def with_critic(case: Case) -> Config:
    """Its gradients and weights leave the device between its updates."""
    given = {"algorithm.adv_estimator": "gae"} | {f"critic.megatron.{name}_offload": True for name in ("param", "grad")}
    config = case.config
    for key, value in given.items():
        config = with_setting(config, key, value)
    return config


@pytest.mark.parametrize("case", [CASES[1], pytest.param(CASES[9], marks=pytest.mark.slow)], ids=str)
def test_the_peaks_of_a_critic(case: Case):
    """Of its own update and of the policy's beside it, on one stage, within 5 %."""
    config, facts = with_critic(case), FACTS[case.model]
    played = stage_jobs(config, facts, row=case.row, num_microbatches=1, phases=("critic", "update"))
    (report,) = play_each(played, transformer_engine=case.layers == TE, timeout_s=900)
    made = ledger(config, facts, case.world_size, batch=case.batch, stack=case.stack)
    of_critic = max(made.peak("critic"), made.peak("critic's optimizer"))
    assert of_critic == pytest.approx(report.phases["critic"].peak_bytes, rel=0.05), made.phases["critic"]
    of_policy = max(made.peak("update"), made.peak("optimizer"))
    counted = Counts.of(played[0], report).peak_bytes
    assert of_policy == pytest.approx(counted, rel=0.05), made.phases["update"]


@pytest.mark.parametrize(
    "case", [one if one in EVERYDAY else pytest.param(one, marks=pytest.mark.slow) for one in CASES], ids=str
)
def test_the_peak_of_an_update(case: Case):
    """Within 5 % on every stage, and the counts that other tests and docs/memory.md name are these."""
    peaks = counted(case.layers, case in EVERYDAY)[case]
    for made, peak in zip(case.ledgers(), peaks, strict=True):
        assert max(made.peak("update"), made.peak("optimizer")) == pytest.approx(peak, rel=0.05), made.phases["update"]
    assert peaks == pytest.approx(list(case.counted), rel=0.005)
