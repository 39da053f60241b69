"""The modelled time of a step: numbers that a reader can check, and what binds a phase."""

from __future__ import annotations

import pytest

from remax_megatron.config.load import load_config
from remax_megatron.config.schema import Config, recompute_of
from remax_megatron.flops import RowGroup, UpdateFlops
from remax_megatron.plan.engine_time import cache_bytes_per_token, decode, engine_step_parts
from remax_megatron.plan.gpus import GPUS
from remax_megatron.plan.lengths import NAMED, Lengths, LogNormal
from remax_megatron.plan.models import PUBLISHED
from remax_megatron.plan.parts import Efficiencies, Part, Phase
from remax_megatron.plan.step_time import Model, StepTime, batch_of, step_time

SEVEN = PUBLISHED["Qwen/Qwen2.5-7B-Instruct"]
H100, IDEAL = GPUS["h100-80gb"], Efficiencies(update_flops=1.0, decode_bandwidth=1.0, exchange_bandwidth=1.0)
MEGATRON, ROLLOUT = "actor_rollout_ref.actor.megatron", "actor_rollout_ref.rollout"
TP1 = (f"{MEGATRON}.tensor_model_parallel_size=1", f"{ROLLOUT}.tensor_model_parallel_size=1")
EQUAL = Lengths("equal", "a test", LogNormal(100, 0, 0), LogNormal(300, 0, 0))  # 100 and 300 tokens, always


def settings(*overrides: str) -> Config:
    return load_config("qwen2_5_7b", overrides).config


def model(*overrides: str, world_size: int = 8, lengths: Lengths = EQUAL) -> Model:
    config = settings(*overrides)
    return Model(config, SEVEN, world_size, H100, batch_of(config, lengths))


def parts(phase: Phase) -> dict[str, Part]:
    return {part.name: part for part in phase.parts}


def test_a_token_of_a_7b_reads_its_weights_once():
    """7.616e9 parameters less the looked-up embedding, 2 bytes each, at 3.35e12 bytes/s: 4.22 ms a token at TP 1."""
    found = parts(Phase(tuple(engine_step_parts(settings(*TP1), SEVEN, H100, decode(((100, 1000),), 256, 10**6)))))
    per_step = 2 * (7_615_616_512 - 152064 * 3584) / 3.35e12
    assert found["reading the weights"].seconds(IDEAL) == pytest.approx(1000 * per_step)
    assert 1000 * per_step == pytest.approx(4.22, abs=0.005)
    # 28 layers x 4 key heads of 128, keys and values of 2 bytes: 57,344 bytes; on average 600 tokens.
    assert cache_bytes_per_token(settings(*TP1), SEVEN) == 57_344
    assert found["reading the cache"].seconds(IDEAL) == pytest.approx(1000 * 600 * 57_344 / 3.35e12)


def test_a_batch_of_answers_shrinks():
    """Three answers, two at a time: the third starts when the shortest ends, at step 10, and ends at 10 + 30."""
    made = decode(((5, 10), (5, 20), (5, 30)), 2, 10**6)
    assert made.steps.tolist() == [10, 10, 20] and made.running.tolist() == [2, 2, 1]
    # Tokens in the cache at the middle: 10 + 2 x 5; 5 + 10 of the second, 5 of the third, + 2 x 5; 15 + 10.
    assert made.context.tolist() == [20, 30, 25]
    assert decode(((5, 10), (5, 20), (5, 30)), 4, 60).running.tolist() == [2, 2, 1]  # the cache holds two
    assert decode(((5, 10),) * 8, 8, 10**6).tail_steps == 0
    assert decode(((5, 10),) * 9 + ((5, 100),), 10, 10**6).tail_steps == 90


def test_an_update_takes_its_flops():
    """1024 x 4 rows of 400 tokens on 8 GPUs, 989 TFLOP/s: what flops.py counts, nobody waits, and no bubble."""
    made, passes = model(*TP1).update()
    config = settings()
    recomputed = UpdateFlops(SEVEN, recompute_of(config)).hardware([RowGroup(100, [300])])
    assert parts(made)["arithmetic"].seconds(IDEAL) == pytest.approx(4096 * recomputed / 8 / 989e12, rel=0.01)
    assert passes.bubble == 0 and passes.imbalance < 0.02
    assert made.bound(Efficiencies()) == "arithmetic"


def test_a_pipeline_waits_for_its_ends():
    """PP 4 with m equal micro-batches: 3 of m + 3 are the bubble; two virtual stages halve it."""
    pipeline = f"{MEGATRON}.pipeline_model_parallel_size=4"
    budget = "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=24000"
    made = model(*TP1, pipeline, budget).step()
    assert made.bubble == pytest.approx(3 / (made.microbatches + 3), rel=0.02)
    halved = model(*TP1, pipeline, budget, f"{MEGATRON}.virtual_pipeline_model_parallel_size=7").step()
    assert halved.bubble == pytest.approx(3 / 7 / (halved.microbatches + 3 / 7), rel=0.05)


def test_the_exchange_of_gradients():
    """DP 8 in a node: 4 bytes of 7/8 of the parameters at 450 GB/s, of which the last micro-batch hides a part."""
    made = parts(model(*TP1, f"{MEGATRON}.overlap_grad_reduce=False").update()[0])
    scattered = 4 * 7_615_616_512 * 7 / 8 / 450e9
    assert made["exchange of gradients"].seconds(IDEAL) == pytest.approx(scattered)
    assert made["gathering of weights"].seconds(IDEAL) == pytest.approx(scattered / 2)
    assert "exchange of gradients" not in parts(model(*TP1).update()[0])  # 12,288 tokens take longer


def test_rings_over_nodes():
    """TP 8 on nodes of 8: each rank's ring has one adapter; at TP 1 the ring of all has eight, 400 GB/s."""
    two = "trainer.nnodes=2"
    assert model(*TP1, two, world_size=16).ring_rate(16, 1) == 400e9
    assert model(two, world_size=16).ring_rate(2, 8) == 50e9
    assert model().ring_rate(4, 2) == 450e9


def test_offloads_cross_the_bus_twice():
    """12 bytes of 7.6e9 / 2 parameters over DP 4, there and back at 64 GB/s."""
    (part,) = model(f"{MEGATRON}.optimizer_offload=True").offloads().parts
    (count,) = [7_615_616_512 // 2 + (2 * 28 + 1) * 3584 // 2]
    assert part.seconds(Efficiencies(host_bandwidth=1.0)) == pytest.approx(2 * 12 * count / 4 / 64e9, rel=1e-4)
    assert not model().offloads().parts


def test_scoring_passes_are_those_of_the_trainer():
    assert not model().scoring().parts  # one update of a batch: every ratio is 1
    half = "actor_rollout_ref.actor.ppo_mini_batch_size=512"
    old, with_reference = model(half).scoring(), model(half, "actor_rollout_ref.actor.use_kl_loss=True").scoring()
    assert with_reference.seconds(IDEAL) == pytest.approx(2 * old.seconds(IDEAL))
    assert "critic" in model("algorithm.adv_estimator=gae").step().phases


def test_lengths_are_drawn_as_they_say():
    drawn = NAMED["gsm8k"].draw(20_000, 1, (512, 1024))
    assert sum(prompt for prompt, _ in drawn) / 20_000 == pytest.approx(106, rel=0.02)
    assert sum(answer for _, (answer,) in drawn) / 20_000 == pytest.approx(249, rel=0.02)
    assert drawn == NAMED["gsm8k"].draw(20_000, 1, (512, 1024))
    assert LogNormal.of(249, 120).median < 249


def whole(*overrides: str) -> StepTime:
    config = settings(*overrides)
    return step_time(config, SEVEN, 8, H100, NAMED["gsm8k"])


def test_a_step_is_the_sum_of_its_phases():
    made, assumed = whole(), Efficiencies()
    assert made.seconds(assumed) == pytest.approx(sum(phase.seconds(assumed) for phase in made.phases.values()))
    assert list(made.phases) == ["rollout", "reward", "update", "sync"]
    assert made.phases["rollout"].bound(assumed) == "reading the weights"
    none = made.phases["update"].seconds(assumed)
    full = whole(f"{MEGATRON}.override_transformer_config.recompute_granularity=full").phases["update"].seconds(assumed)
    assert 0.7 < none / full < 0.8  # three passes in place of four
