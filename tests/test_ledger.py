"""The ledger of a rank's memory: parameters by hand, each term's number by hand, and peaks that were counted."""

from __future__ import annotations

import pytest

from remax_megatron.config.load import load_config
from remax_megatron.config.model_facts import ModelFacts
from remax_megatron.doctor.ledger import Ledger, MicroBatch, Stack, full_micro_batch, ledger, parameters

MEGATRON = "actor_rollout_ref.actor.megatron"
RECOMPUTE = f"{MEGATRON}.override_transformer_config.recompute"
LOCAL, TE = Stack("local", "varlen", fused_adam=False), Stack("transformer_engine", "transformer_engine", True)
GIB = 2**30


def facts(name: str) -> ModelFacts:
    return {  # layers, hidden, ffn, heads, kv heads, head_dim, vocabulary, tied, positions: config.json on the hub
        "0.5B": ModelFacts(24, 896, 4864, 14, 2, 64, 151936, True, 32768),
        "1.5B": ModelFacts(28, 1536, 8960, 12, 2, 128, 151936, True, 32768),
        "3B": ModelFacts(36, 2048, 11008, 16, 2, 128, 151936, True, 32768),
        "7B": ModelFacts(28, 3584, 18944, 28, 4, 128, 152064, False, 32768),
        "14B": ModelFacts(48, 5120, 13824, 40, 8, 128, 152064, False, 32768),
        "32B": ModelFacts(64, 5120, 27648, 40, 8, 128, 152064, False, 32768),
    }[name]


def made(*overrides: str, model: str = "7B", world_size: int = 8, preset: str = "qwen2_5_7b", **kwargs) -> Ledger:
    kwargs = {"stack": LOCAL, "batch": MicroBatch(tokens=10_000, scored=5_000, count=8)} | kwargs
    return ledger(load_config(preset, overrides).config, facts(model), world_size, **kwargs)


@pytest.mark.parametrize("name, published", [("0.5B", 494_032_768), ("7B", 7_615_616_512), ("32B", 32_763_876_352)])
def test_parameters_are_those_of_the_model_cards(name, published):
    assert parameters(facts(name)) == (published,)


def test_parameters_of_each_stage():
    replicated = (2 * 28 + 1) * 3584  # norms are on every rank
    assert parameters(facts("7B"), tp=2) == ((7_615_616_512 - replicated) // 2 + replicated,)
    embedding = 151936 * 896
    layer = (494_032_768 - embedding - 896) // 24
    # The last of two stages: half of the layers, the final norm, and its own copy of the tied embedding.
    assert parameters(facts("0.5B"), pp=2) == (12 * layer + embedding, 12 * layer + 896 + embedding)


def test_what_is_held():
    """3.81e9 parameters at TP 2: 2 bytes, 4 of gradients, and 12 of Adam over DP 4."""
    (count,) = parameters(facts("7B"), tp=2)
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
    their sums 4 x 14, cosines and sines 4 x 2 x 128, the MLP 3 x 2 x 18944 / 2; and the embedding 2 x 3584 / 2.
    """
    stream, attention, mlp = 3584, 14336 + 56 + 1024, 56832

    def saved(granularity: str, *more: str, **kwargs) -> int:
        return made(f"{RECOMPUTE}_granularity={granularity}", *more, **kwargs).phases["update"]["saved for backward"]

    assert saved("none") == 10_000 * (28 * (4 * stream + attention + mlp) + stream)
    assert saved("selective") == 10_000 * (28 * (4 * stream + attention) + stream)
    assert saved("full") == 10_000 * 29 * stream
    assert saved("full", f"{RECOMPUTE}_num_layers=4") == 10_000 * 8 * stream
    block = saved("full", f"{RECOMPUTE}_method=block", f"{RECOMPUTE}_num_layers=20")
    assert block == 10_000 * (20 * stream + 8 * (4 * stream + attention + mlp) + stream)
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
        return saved / (10_000 * 3584 * (28 // 4 / vpp + 1))

    assert [in_flight(stage) for stage in range(4)] == [4, 3, 2, 1]
    assert in_flight(0, count=2) == 2


def test_the_micro_batch_is_full_of_the_longest_rows():
    """GSM8K's 512 + 1024 tokens in 24,000: two thirds are scored; 1024 x 4 rows on DP 4 are 66 micro-batches."""
    assert full_micro_batch(load_config("qwen2_5_7b").config, 8) == MicroBatch(24_000, 16_000, 66)
    shared = load_config("qwen2_5_7b", ["actor_rollout_ref.actor.share_prompts=True"]).config
    assert full_micro_batch(shared, 8).scored == 24_000 * 1024 // (128 + 1024)


def test_sync_and_canary():
    """Twice 1 GiB or the whole embedding, and the engine's half of that; 256 prompt tokens' logits."""
    phases = made().phases
    embedding = 2 * 152064 * 3584
    assert phases["sync"]["buckets"] == 2 * 2**30
    assert made("actor_rollout_ref.rollout.sync_bucket_mb=100").phases["sync"]["buckets"] == embedding
    assert phases["sync"]["module of the engine"] == embedding // 2
    assert phases["canary"]["logits of the canary"] == int(2.5 * 4 * 256 * 152064)
    assert phases["sync"]["engine"] == 0.4 * 80e9
