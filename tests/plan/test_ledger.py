"""The ledger of a rank's memory: parameters by hand, each term's number by hand, and peaks that were counted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from remax_megatron.config.load import load_config
from remax_megatron.plan.ledger import Ledger, MicroBatch, Stack, full_micro_batch, ledger, parameters
from tests import ROOT
from tests.plan.ledger_cases import CASES, FACTS, MEGATRON, RECOMPUTE, Case

LOCAL, TE = Stack("local", "varlen", fused_adam=False), Stack("transformer_engine", "transformer_engine", True)
GB = 1e9


def made(*overrides: str, model: str = "7b", world_size: int = 8, preset: str = "qwen2_5_7b", **kwargs) -> Ledger:
    kwargs = {"stack": LOCAL, "batch": MicroBatch(tokens=10_000, scored=5_000, count=8)} | kwargs
    return ledger(load_config(preset, overrides).config, FACTS[model], world_size, **kwargs)


PUBLISHED = {"0.5b": 494_032_768, "7b": 7_615_616_512, "32b": 32_763_876_352}
PUBLISHED |= {"qwen3-4b": 4_022_468_096, "qwen3-8b": 8_190_735_360, "qwen3-32b": 32_762_123_264}


@pytest.mark.parametrize("name, published", PUBLISHED.items())
def test_parameters_are_those_of_the_model_cards(name, published):
    assert parameters(FACTS[name]) == (published,)


def test_parameters_of_each_stage():
    replicated = (2 * 28 + 1) * 3584  # norms are on every rank
    assert parameters(FACTS["7b"], tp=2) == ((7_615_616_512 - replicated) // 2 + replicated,)
    embedding = 151936 * 896
    layer = (494_032_768 - embedding - 896) // 24
    # The last of two stages: half of the layers, the final norm, and its own copy of the tied embedding.
    assert parameters(FACTS["0.5b"], pp=2) == (12 * layer + embedding, 12 * layer + 896 + embedding)


def test_what_is_held():
    """3.81e9 parameters at TP 2: 2 bytes, 4 of gradients, and 12 of Adam over DP 4."""
    (count,) = parameters(FACTS["7b"], tp=2)
    found = made().phases["rollout"]
    assert (found["weights"], found["gradients"], found["optimizer"]) == (2 * count, 4 * count, 3 * count)
    in_fp32 = made(f"{MEGATRON}.dtype=float32").phases["rollout"]
    assert (in_fp32["weights"], in_fp32["gradients"], in_fp32["optimizer"]) == (4 * count, 4 * count, 2 * count)
    alone = made(f"{MEGATRON}.use_distributed_optimizer=False").phases["rollout"]
    assert alone["optimizer"] == 12 * count
    with_reference = made("algorithm.use_kl_in_reward=True").phases["rollout"]
    assert with_reference["reference"] == 2 * count and "reference" not in found
    away = "actor_rollout_ref.ref.megatron.param_offload=True"
    assert "reference" not in made("algorithm.use_kl_in_reward=True", away).phases["rollout"]


def test_offloaded_state_comes_back_late():
    """Gradients for the passes, the optimizer for its step; with a second update of a rollout it stays."""
    offloads = [f"{MEGATRON}.grad_offload=True", f"{MEGATRON}.optimizer_offload=True"]
    phases = made(*offloads).phases
    assert {"gradients", "optimizer"}.isdisjoint(phases["rollout"] | phases["sync"] | phases["canary"])
    assert "gradients" in phases["update"] and "optimizer" not in phases["update"]
    assert {"gradients", "optimizer"} <= set(phases["optimizer"])
    assert "optimizer" in made(*offloads, "actor_rollout_ref.actor.ppo_epochs=2").phases["update"]


def test_saved_for_backward_by_hand():
    """7B at TP 2 under sequence parallelism, 10,000 tokens, 28 layers in bfloat16; bytes per token:

    residual stream and norms 4 x 2 x 3584 / 2, queries, keys, values and result of 14 heads 4 x 2 x 1792, the log of
    their sums 4 x 14, the MLP 3 x 2 x 18944 / 2; once, the embedding 2 x 3584 / 2 and cosines and sines 2 x 2 x 128.
    """
    stream, attention, mlp, rotation = 3584, 14336 + 56, 56832, 512

    def saved(granularity: str, *more: str, **kwargs) -> int:
        return made(f"{RECOMPUTE}_granularity={granularity}", *more, **kwargs).phases["update"]["saved for backward"]

    assert saved("none") == 10_000 * (28 * (4 * stream + attention + mlp) + stream + rotation)
    assert saved("selective") == 10_000 * (28 * (4 * stream + attention) + stream + rotation)
    assert saved("full") == 10_000 * (29 * stream + rotation)
    assert saved("full", f"{RECOMPUTE}_num_layers=4") == 10_000 * (8 * stream + rotation)
    block = saved("full", f"{RECOMPUTE}_method=block", f"{RECOMPUTE}_num_layers=20")
    assert block == 10_000 * (20 * stream + 8 * (4 * stream + attention + mlp) + stream + rotation)
    # Transformer Engine: two key heads are not repeated, one kernel rotates, and the norm is recomputed with the MLP.
    attention = 2 * 2 * (1792 + 256) + 56
    assert saved("none", stack=TE) == 10_000 * (28 * (4 * stream + attention + mlp) + stream)
    assert saved("selective", stack=TE) == 10_000 * (28 * (3 * stream + attention) + stream)


def test_micro_batches_in_flight():
    """1F1B: the stages behind and itself; interleaved 2 x the stages behind + a round of the other chunks + 1."""

    def in_flight(stage: int, *more: str, count: int = 8) -> float:
        pipeline = [f"{MEGATRON}.pipeline_model_parallel_size=4", f"{RECOMPUTE}_granularity=full", *more]
        batch = MicroBatch(10_000, 5_000, count)
        saved = made(*pipeline, stage=stage, batch=batch).phases["update"]["saved for backward"]
        vpp = 1 + any("virtual" in text for text in more)
        return saved / (10_000 * (3584 * (28 // 4 / vpp + 1) + 512))

    assert [in_flight(stage) for stage in range(4)] == [4, 3, 2, 1]
    assert in_flight(0, count=2) == 2


def test_the_micro_batch_is_full_of_the_longest_rows():
    """GSM8K's 512 + 1024 tokens in 12,288: two thirds are scored; 1024 x 4 rows on DP 4 are 128 micro-batches."""
    assert full_micro_batch(load_config("qwen2_5_7b").config, 8) == MicroBatch(12_288, 8_192, 128)
    shared = load_config("qwen2_5_7b", ["actor_rollout_ref.actor.share_prompts=True"]).config
    assert full_micro_batch(shared, 8).scored == 12_288 * 1024 // (128 + 1024)


def test_sync_and_canary():
    """At TP 2: the whole embedding, of which the engine still has the last tensor, beside the share and both gathered
    parts of the next bucket, or of one norm where buckets are small; the engine's half; 255 prompt tokens' logits."""
    phases = made().phases
    embedding = 2 * 152064 * 3584
    norm, qkv, bias, proj = 3584, (28 + 2 * 4) * 128 * 3584 // 2, (28 + 2 * 4) * 128 // 2, 3584 * 3584 // 2
    first = norm + qkv + bias + proj + norm + 18944 * 3584  # a layer without its last matrix
    assert phases["sync"]["buckets"] == embedding + 2 * 3 * first
    small = made("actor_rollout_ref.rollout.sync_bucket_mb=100").phases["sync"]["buckets"]
    assert small == embedding + 2 * 2 * norm
    assert phases["sync"]["module of the engine"] == embedding // 2
    assert phases["canary"]["logits of the canary"] == int(2.5 * 4 * 255 * 152064)
    assert phases["sync"]["engine"] == 0.4 * 80e9


# What was counted ----------------------------------------------------------------------------------------------------


def peaks(case: Case) -> list[int]:
    """Bytes of an update, its optimizer step included, on each stage."""
    return [max(one.peak("update"), one.peak("optimizer")) for one in case.ledgers()]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_within_five_percent_of_what_was_counted(case: Case):
    assert peaks(case) == pytest.approx(list(case.counted), rel=0.05)


def table_of(heading: str) -> Iterator[list[str]]:
    """The cells of the rows of the table under `heading` of docs/memory.md."""
    _, _, text = (ROOT / "docs" / "memory.md").read_text().partition(f"## {heading}\n")
    rows = [line for line in text.partition("\n## ")[0].splitlines() if line.startswith("|")]
    yield from ([cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:])


def test_the_documented_table_of_presets():
    """docs/memory.md says what the ledger says."""
    rows = list(table_of("The presets"))
    rows += table_of("Where the engine has ranks of its own")
    assert {row[0] for row in rows} == {path.stem for path in (ROOT / "conf").glob("qwen*.yaml")}
    for preset, layers, *cells in rows:
        config = load_config(preset).config
        ranks = config.trainer.nnodes * config.trainer.n_gpus_per_node
        stack = TE if layers == "Transformer Engine" else LOCAL
        found = ledger(
            config, FACTS[preset.removeprefix("qwen2_5_").removesuffix("_split").replace("_", "-")], ranks, stack=stack
        )
        assert cells == [f"{found.peak(phase) / GB:.1f}" for phase in found.phases]


def test_the_documented_table_of_counts():
    """docs/memory.md has every case, on the stage that needs most."""
    expected = []
    for case in CASES:
        made, counted = max(zip(peaks(case), case.counted, strict=True), key=lambda pair: pair[1])
        layers = "local" if case.layers == "local" else "Transformer Engine"
        expected.append([str(case), layers, f"{counted / GB:.2f}", f"{made / GB:.2f}", f"{made / counted - 1:+.1%}"])
    assert list(table_of("How well it is counted")) == expected
