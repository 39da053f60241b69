"""FLOPs of an update: counts made by hand, torch's own counter on another implementation, and the table of devices."""

from __future__ import annotations

import pytest
import torch

from remax_megatron.flops import ForwardFlops, RowGroup, UpdateFlops, peak_bf16_tflops
from remax_megatron.model_facts import ModelFacts
from remax_megatron.types import Recompute

FACTS = ModelFacts(
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=16,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    vocab_size=32,
    tied_embeddings=True,
    max_position_embeddings=64,
)
ROW = RowGroup(3, [5])  # 8 tokens, of which 5 are scored


def test_a_forward_pass_by_hand() -> None:
    forward = ForwardFlops.of(FACTS)
    # Query and output 8 x 8, key and value 8 x 4: 192 weights. Gated MLP: 3 x 8 x 16 = 384 weights. Head 8 x 32 = 256.
    assert (forward.projections, forward.mlp, forward.head) == (2 * 192, 2 * 384, 2 * 256)
    # 8^2 / 2 = 32 pairs; scores and values, 2 operations for each of 2 heads x 4: 32 x 32 = 16 x 8^2.
    assert forward.attention == 16
    # 2 layers x (1152 x 8 tokens + 16 x 64); the head at 5 positions.
    assert forward.layers([ROW]) == 2 * (9216 + 1024) == 20480
    assert forward.logits([ROW]) == 2560


@pytest.mark.parametrize(
    ("recompute", "num_chunks", "again"),
    [
        (Recompute("none"), 1, 0),
        (Recompute("full"), 1, 20480),  # all layers
        (Recompute("full", method="block", num_layers=1), 1, 10240),  # one of two
        (Recompute("full", method="block", num_layers=1), 2, 20480),  # one in each of two stages
        (Recompute("full", method="block", num_layers=9), 1, 20480),
        (Recompute("selective", modules=("mlp",)), 1, 12288),  # 2 layers x 768 x 8 tokens
        (Recompute("selective", modules=("core_attn",)), 1, 2048),  # 2 layers x 16 x 64
        (Recompute("selective", modules=("layernorm",)), 1, 0),
    ],
)
def test_recomputation_is_hardware_flops_and_no_model_flops(recompute: Recompute, num_chunks: int, again: int) -> None:
    flops = UpdateFlops(FACTS, recompute, num_chunks=num_chunks)
    assert flops.model([ROW]) == 3 * (20480 + 2560) == 69120
    assert flops.hardware([ROW]) == 69120 + again + 2560  # the logits once more in the backward pass, always


def test_a_shared_prompt_is_counted_once() -> None:
    shared, alone = [RowGroup(3, [5, 2])], [RowGroup(3, [5]), RowGroup(3, [2])]
    assert sum(group.tokens for group in alone) == 13 and shared[0].tokens == 10
    # Rows of 8 and 5 tokens attend to 64 and 25; the prompt's 9 are in both.
    assert shared[0].squares == 64 + 25 - 9
    forward = ForwardFlops.of(FACTS)
    assert forward.layers(alone) - forward.layers(shared) == 2 * (1152 * 3 + 16 * 9)
    assert forward.logits(alone) == forward.logits(shared) == 512 * 7


def test_long_rows_of_a_large_model_by_hand() -> None:
    """Qwen2.5-7B, 16 rows of 1,000 and 1,000 tokens: 6 x weights x tokens, and attention."""
    facts = ModelFacts(
        num_layers=28,
        hidden_size=3584,
        ffn_hidden_size=18944,
        num_attention_heads=28,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=152064,
        tied_embeddings=False,
        max_position_embeddings=32768,
    )
    layers = 28 * 3584 * (2 * 3584 + 2 * 512 + 3 * 18944)  # 6,525,288,448 weights
    head = 3584 * 152064  # 544,997,376 weights
    by_hand = 6 * layers * 32_000 + 6 * head * 16_000 + 16 * 6 * 28 * 3584 * 2000**2
    rows = [RowGroup(1000, [1000])] * 16
    assert layers == 6_525_288_448
    assert UpdateFlops(facts).model(rows) == by_hand
    assert by_hand == pytest.approx(1.344e15, rel=1e-3)
    # 8 devices in 2 seconds: 84 TFLOP/s each, 8.5 % of an H100's 989.
    metrics = UpdateFlops(facts, Recompute("full"), num_devices=8, peak_tflops=989.0).metrics(rows, 2.0)
    assert metrics["perf/tflops"] == pytest.approx(1344 / 16, rel=1e-3)
    assert metrics["perf/mfu"] == pytest.approx(84.0 / 989, rel=1e-3)
    # A fourth forward pass of everything: 4 / 3.
    assert metrics["perf/hardware_tflops"] == pytest.approx(metrics["perf/tflops"] * 4 / 3)


def test_torchs_own_counter_agrees_on_transformers_model() -> None:
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import Qwen2Config, Qwen2ForCausalLM

    facts = ModelFacts(3, 128, 320, 4, 2, 32, 512, True, 512)
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    model, num_tokens = Qwen2ForCausalLM(config), 100
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(512, (1, num_tokens))).logits.sum().backward()
    # It makes logits at every position, as if each token were an answer's, and multiplies masked pairs too.
    row = RowGroup(0, [num_tokens])
    masked = 3 * 3 * ForwardFlops.of(facts).attention * row.squares
    assert UpdateFlops(facts).model([row]) + masked == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_nothing_computed_has_no_speed_and_an_unknown_device_no_mfu() -> None:
    assert UpdateFlops(FACTS).metrics([], 0.1) == {}
    assert UpdateFlops(FACTS).metrics([ROW], 0.0)["perf/tflops"] > 0  # no division by zero
    assert "perf/mfu" not in UpdateFlops(FACTS).metrics([ROW], 1.0)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("NVIDIA H200", 989.0),
        ("NVIDIA H200 NVL", 835.0),
        ("NVIDIA H20", 148.0),
        ("NVIDIA GH200 480GB", 990.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA A100-PCIE-40GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", None),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce RTX 4090", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_peaks_are_known_by_the_name_that_torch_gives(name: str, peak: float | None) -> None:
    assert peak_bf16_tflops(name) == peak
