"""Host syncs, kernels and memory of the presets' shapes with few layers, counted on fake CUDA tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.gpu_counts import Counts, count
from remax_megatron.config.load import load_config
from tests.fake_cuda.scenario import MEGATRON
from tests.stand_ins.fake_cuda.models import FACTS
from tests.stand_ins.fake_cuda.processes import Report

LAYERS = ("local", "transformer_engine")
MIB = 2**20


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("pp", [1, 2])
def test_syncs_and_kernels(layers: str, pp: int) -> None:
    """Of the 7B preset at TP 4, two layers per stage."""
    config = load_config(
        "qwen2_5_7b",
        [
            f"{MEGATRON}.layers={layers}",
            f"{MEGATRON}.tensor_model_parallel_size=4",
            f"{MEGATRON}.pipeline_model_parallel_size={pp}",
        ],
    ).config
    for counts in count(config, replace(FACTS["7b"], num_layers=2 * pp)):
        per_batch, per_step = counts.syncs()
        assert sum(per_batch.values()) <= (0 if pp == 1 else 2), per_batch
        assert sum(per_step.values()) <= 8, per_step
        assert counts.kernels()["layer"] <= (16 if layers == "transformer_engine" else 26)


def held_by_the_stream(report: Report) -> int:
    """Bytes that a weight sync has beside what was there before it."""
    return report.phases["sync"].peak_bytes - report.phases["optimizer state"].end_bytes


@pytest.mark.parametrize("preset", ["qwen2_5_3b", "qwen2_5_7b", "qwen2_5_14b", "qwen2_5_32b"])
def test_what_the_weight_stream_holds(preset: str) -> None:
    """Two buckets at most."""
    config = load_config(preset, []).config
    pp = config.actor_rollout_ref.actor.megatron.pipeline_model_parallel_size
    facts = replace(FACTS[preset.rpartition("_")[2]], num_layers=2 * pp)
    found: list[Counts] = count(config, facts, phases=("sync",))
    bucket = config.actor_rollout_ref.rollout.sync_bucket_mb * MIB
    assert max(held_by_the_stream(counts.report) for counts in found) <= 2 * bucket
