"""The doctor's ledger against the bytes that the trainer's own code holds, counted on fake CUDA tensors."""

from __future__ import annotations

import pytest

from benchmarks.gpu_counts import count
from tests.ledger_cases import CASES, FACTS, Case


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_peak_of_an_update(case: Case):
    """Within 5 % on every stage, and the counts that other tests and docs/memory.md name are these."""
    found = count(
        case.config, FACTS[case.model], row=case.row, num_microbatches=case.num_microbatches, phases=("update",)
    )
    peaks = [counts.peak_bytes for counts in found]
    for made, peak in zip(case.ledgers(), peaks, strict=True):
        assert max(made.peak("update"), made.peak("optimizer")) == pytest.approx(peak, rel=0.05), made.phases["update"]
    assert peaks == pytest.approx(list(case.counted), rel=0.005)
