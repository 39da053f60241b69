"""Two parts of benchmarks/gpu.py with tiny sizes, where Transformer Engine's layers are to be had: none of its rows is
missing, and one process builds models with several kinds of attention, which Megatron would not let it by itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests import ROOT
from tests.ranks import run_ranks


def worker(folder: str) -> dict[str, dict]:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from gpu_parts import parity, update
    from gpu_parts.part import Part

    part = Part("cpu", tiny=True, work=Path(folder), record=Path(folder) / "record")
    parity.run(part)
    update.run(part)
    return {case["case"]: case for case in map(json.loads, part.record.read_text().splitlines())}


def test_the_rows_of_transformer_engine(tmp_path):
    cases = run_ranks("tests.te.test_gpu_benchmark:worker", 1, str(tmp_path), 200)[0]
    assert not [case for case in cases.values() if "failed" in case]
    rounding = cases["transformers bfloat16"]["gradient"]
    for recompute in ("none", "selective", "full"):
        policy = cases[f"transformer_engine bfloat16 transformer_engine {recompute}"]
        assert policy["logprob_mean"] <= 2e-2 and policy["gradient"] <= 1.5 * rounding
        update = cases[f"1.5b transformer_engine {recompute}"]
        assert update["tokens_per_s"] > 0 and update["tokens"] == cases[f"1.5b local {recompute}"]["tokens"]
