"""The weight table: byte-exact round trips over random shapes, golden sizes, and layouts written out by hand."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from remax_megatron.model_facts import ModelFacts
from remax_megatron.weights.shards import RowRun, row_runs, shard_runs, to_hf, to_megatron
from remax_megatron.weights.weight_table import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    WeightEntry,
    owner,
    padded_vocab_size,
    shard_shape,
    weight_table,
)
from tests.small_models import make_qwen2


def facts(*, layers=1, hidden=4, ffn=4, heads=2, kv=1, head_dim=2, vocab=5, tied=False) -> ModelFacts:
    return ModelFacts(layers, hidden, ffn, heads, kv, head_dim, vocab, tied, max_position_embeddings=64)


def entry_named(shape: ModelFacts, name: str) -> WeightEntry:
    (entry,) = [e for e in weight_table(shape) if e.megatron_name == name]
    return entry


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Every bit at random, NaN and infinities included: equality of bytes is stricter than equality of numbers."""
    bits = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    return bits.view(dtype).squeeze(-1)


def as_bytes(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype, bytes]:
    return tuple(tensor.shape), tensor.dtype, tensor.contiguous().view(torch.uint8).numpy().tobytes()


@st.composite
def shapes_and_tp(draw: st.DrawFn) -> tuple[ModelFacts, int]:
    """All that the settings' rules let through, and one thing more that Megatron asks: whole QKV rows per rank."""
    tp = draw(st.sampled_from([1, 2, 3, 4, 8]))
    kv = draw(st.sampled_from([n for n in range(1, 9) if n % tp == 0 or tp % n == 0]))
    heads = max(tp, kv) * draw(st.integers(1, 3))
    head_dim = draw(st.sampled_from([d for d in (1, 2, 3, 4, 8, 24) if (heads + 2 * kv) * d % tp == 0]))
    shape = facts(
        layers=draw(st.integers(1, 2)),
        hidden=draw(st.integers(1, 9)),
        ffn=tp * draw(st.integers(1, 3)),
        heads=heads,
        kv=kv,
        head_dim=head_dim,
        vocab=draw(st.integers(1, 2600)),
        tied=draw(st.booleans()),
    )
    return shape, tp


@settings(max_examples=150, deadline=None)
@given(shapes_and_tp(), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 2**31))
def test_round_trip_is_the_identity_byte_for_byte(case: tuple[ModelFacts, int], dtype: torch.dtype, seed: int) -> None:
    shape, tp = case
    generator = torch.Generator().manual_seed(seed)
    names = []
    for entry in weight_table(shape):
        hf = {
            name: random_bits(dims, dtype, generator)
            for name, dims in zip(entry.hf_names, entry.hf_shapes, strict=True)
        }
        shards = [to_megatron(entry, hf, shape, tp, rank) for rank in range(tp)]
        assert {tuple(shard.shape) for shard in shards} == {shard_shape(entry, shape, tp)}
        back = to_hf(entry, shards, shape)
        assert list(back) == list(entry.hf_names)
        for name in entry.hf_names:
            assert as_bytes(back[name]) == as_bytes(hf[name]), (name, tp)
        if entry.kind == "vocab":
            assert not torch.cat(shards)[shape.vocab_size :].view(torch.uint8).any()  # padding rows are zero
        names += entry.hf_names
    assert len(names) == len(set(names))


def test_padded_vocabulary_of_qwen25() -> None:
    # 128, 256, 512, 1024 x 1187, 594, 297, 149
    assert [padded_vocab_size(151936, tp) for tp in (1, 2, 4, 8)] == [151936, 152064, 152064, 152576]
    assert [padded_vocab_size(152064, tp) for tp in (1, 2, 4, 8)] == [152064, 152064, 152064, 152576]


def test_a_rank_may_hold_padding_only() -> None:
    # 211 rows on 4 ranks: padded to 512, 128 a rank; rank 1 holds 83 real rows, ranks 2 and 3 none.
    shape = facts(vocab=211, hidden=1)
    embedding = torch.arange(1.0, 212.0).unsqueeze(1)
    shards = [
        to_megatron(entry_named(shape, EMBEDDING), {"model.embed_tokens.weight": embedding}, shape, 4, r)
        for r in range(4)
    ]
    assert [int((shard != 0).sum()) for shard in shards] == [128, 83, 0, 0]
    assert shards[1][82] == 211 and shards[1][83] == 0 and {shard.shape for shard in shards} == {(128, 1)}


def rows(*labels: int) -> Tensor:
    """A [len, 1] tensor whose row i holds labels[i]."""
    return torch.tensor(labels, dtype=torch.float32).unsqueeze(1)


def test_qkv_interleave_by_hand() -> None:
    # 4 query heads in 2 groups, 2 rows a head: q0 = rows 0 1, q1 = 10 11, ...; k0 = 100 101, k1 = 110 111; v: 200 ...
    shape = facts(hidden=1, heads=4, kv=2, head_dim=2)
    entry = entry_named(shape, "decoder.layers.{layer}.self_attention.linear_qkv.weight")
    hf = dict(
        zip(
            entry.hf_names,
            (rows(0, 1, 10, 11, 20, 21, 30, 31), rows(100, 101, 110, 111), rows(200, 201, 210, 211)),
            strict=True,
        )
    )
    assert entry.hf_names == tuple(f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv")
    group_0 = [0, 1, 10, 11, 100, 101, 200, 201]  # q0 q1 k0 v0
    group_1 = [20, 21, 30, 31, 110, 111, 210, 211]  # q2 q3 k1 v1
    assert to_megatron(entry, hf, shape, 1, 0).flatten().tolist() == group_0 + group_1
    assert [to_megatron(entry, hf, shape, 2, r).flatten().tolist() for r in range(2)] == [group_0, group_1]
    # More ranks than groups: each rank holds half a group (Megatron gathers the output before it splits the heads).
    assert [to_megatron(entry, hf, shape, 4, r).flatten().tolist() for r in range(4)] == [
        [0, 1, 10, 11],
        [100, 101, 200, 201],
        [20, 21, 30, 31],
        [110, 111, 210, 211],
    ]
    # The bias has no second dimension and the same order.
    bias = entry_named(shape, "decoder.layers.{layer}.self_attention.linear_qkv.bias")
    hf_bias = {name.replace("weight", "bias"): tensor.squeeze(1) for name, tensor in hf.items()}
    assert to_megatron(bias, hf_bias, shape, 2, 1).tolist() == group_1


def test_gate_up_and_row_cuts_by_hand() -> None:
    shape = facts(hidden=1, ffn=4)
    fc1 = entry_named(shape, "decoder.layers.{layer}.mlp.linear_fc1.weight")
    hf = dict(zip(fc1.hf_names, (rows(1, 2, 3, 4), rows(11, 12, 13, 14)), strict=True))
    assert to_megatron(fc1, hf, shape, 1, 0).flatten().tolist() == [1, 2, 3, 4, 11, 12, 13, 14]
    assert [to_megatron(fc1, hf, shape, 2, r).flatten().tolist() for r in range(2)] == [[1, 2, 11, 12], [3, 4, 13, 14]]
    fc2 = entry_named(shape, "decoder.layers.{layer}.mlp.linear_fc2.weight")
    down = {"model.layers.0.mlp.down_proj.weight": torch.tensor([[1.0, 2.0, 3.0, 4.0]])}
    assert [to_megatron(fc2, down, shape, 2, r).tolist() for r in range(2)] == [[[1, 2]], [[3, 4]]]


def test_row_runs_by_hand() -> None:
    # 4 query heads in 2 groups, 2 rows a head; 5 rows of vocabulary padded to 128.
    shape = facts(hidden=1, ffn=4, heads=4, kv=2, head_dim=2)
    for what in ("weight", "bias"):
        q, k, v = (f"model.layers.0.self_attn.{x}_proj.{what}" for x in "qkv")
        assert row_runs(entry_named(shape, f"decoder.layers.{{layer}}.self_attention.linear_qkv.{what}"), shape) == [
            RowRun(q, hf_row=0, megatron_row=0, num_rows=4),  # q0 q1
            RowRun(k, 0, 4, 2),
            RowRun(v, 0, 6, 2),
            RowRun(q, 4, 8, 4),  # q2 q3
            RowRun(k, 2, 12, 2),
            RowRun(v, 2, 14, 2),
        ]
    gate, up = (f"model.layers.0.mlp.{x}_proj.weight" for x in ("gate", "up"))
    fc1 = entry_named(shape, "decoder.layers.{layer}.mlp.linear_fc1.weight")
    assert row_runs(fc1, shape) == [RowRun(gate, 0, 0, 4), RowRun(up, 0, 4, 4)]
    embedding = entry_named(shape, EMBEDDING)
    assert row_runs(embedding, shape) == [RowRun("model.embed_tokens.weight", 0, 0, 5)]


@settings(max_examples=100, deadline=None)
@given(shapes_and_tp(), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 2**31))
def test_row_runs_rebuild_the_whole_tensor(case: tuple[ModelFacts, int], dtype: torch.dtype, seed: int) -> None:
    shape, _ = case
    generator = torch.Generator().manual_seed(seed)
    for entry in weight_table(shape):
        dims_of = dict(zip(entry.hf_names, entry.hf_shapes, strict=True))
        hf = {name: random_bits(dims, dtype, generator) for name, dims in dims_of.items()}
        whole = to_megatron(entry, hf, shape, 1, 0)
        rebuilt = torch.zeros_like(whole)
        used = {name: [0] * dims[0] for name, dims in dims_of.items()}
        runs = row_runs(entry, shape)
        end = 0
        for run in runs:
            assert run.num_rows > 0 and run.megatron_row == end  # in order, no gap: padding comes last
            end += run.num_rows
            rebuilt[run.megatron_row : end] = hf[run.hf_name][run.hf_row : run.hf_row + run.num_rows]
            for row in range(run.hf_row, run.hf_row + run.num_rows):
                used[run.hf_name][row] += 1
        assert as_bytes(rebuilt) == as_bytes(whole)
        assert all(count == 1 for counts in used.values() for count in counts)
        for run, after in zip(runs, runs[1:], strict=False):  # the longest possible
            assert (run.hf_name, run.hf_row + run.num_rows) != (after.hf_name, after.hf_row)


@settings(max_examples=100, deadline=None)
@given(shapes_and_tp(), st.integers(0, 2**31))
def test_shard_runs_rebuild_every_shard_from_the_whole_tensor(case: tuple[ModelFacts, int], seed: int) -> None:
    """What a checkpoint at TP 1 is cut into for any TP: rows of the whole tensor, and for row cuts its columns."""
    shape, tp = case
    generator = torch.Generator().manual_seed(seed)
    for entry in weight_table(shape):
        parts = zip(entry.hf_names, entry.hf_shapes, strict=True)
        hf = {name: torch.randn(size, generator=generator) for name, size in parts}
        whole = to_megatron(entry, hf, shape, 1, 0)
        for rank in range(tp):
            shard = to_megatron(entry, hf, shape, tp, rank)
            rebuilt = torch.zeros_like(shard)
            for row, whole_row, count in shard_runs(entry, shape, tp, rank):
                rows = whole[whole_row : whole_row + count]
                width = shard.shape[-1]
                rebuilt[row : row + count] = rows[:, rank * width : (rank + 1) * width] if entry.kind == "row" else rows
            assert torch.equal(rebuilt, shard), (entry.megatron_name, rank)


def test_shard_runs_by_hand() -> None:
    """ffn 4 at TP 2: rank 1 holds gate rows 2, 3 and up rows 2, 3, which are rows 2, 3 and 6, 7 of the whole."""
    shape = facts(ffn=4, vocab=130)
    fc1 = entry_named(shape, "decoder.layers.{layer}.mlp.linear_fc1.weight")
    assert shard_runs(fc1, shape, 2, 1) == [(0, 2, 2), (2, 6, 2)]
    embedding = entry_named(shape, EMBEDDING)
    assert shard_runs(embedding, shape, 2, 1) == [(0, 128, 2)]  # 130 rows in shards of 128; the rest is padding


def test_shard_shapes_of_qwen25_3b_at_tp_4() -> None:
    # 36 layers, hidden 2048, ffn 11008, 16 heads of 128, 2 KV heads (fewer than TP), tied.
    shape = facts(layers=36, hidden=2048, ffn=11008, heads=16, kv=2, head_dim=128, vocab=151936, tied=True)
    table = weight_table(shape)
    assert len(table) == 1 + 36 * 7 + 1
    shapes = {entry.megatron_name: shard_shape(entry, shape, 4) for entry in table}
    assert shapes == {
        EMBEDDING: (38016, 2048),  # 152064 / 4
        "decoder.layers.{layer}.input_layernorm.weight": (2048,),
        "decoder.layers.{layer}.self_attention.linear_qkv.weight": (640, 2048),  # (16 + 2 + 2) x 128 / 4
        "decoder.layers.{layer}.self_attention.linear_qkv.bias": (640,),
        "decoder.layers.{layer}.self_attention.linear_proj.weight": (2048, 512),
        "decoder.layers.{layer}.pre_mlp_layernorm.weight": (2048,),
        "decoder.layers.{layer}.mlp.linear_fc1.weight": (5504, 2048),  # 2 x 11008 / 4
        "decoder.layers.{layer}.mlp.linear_fc2.weight": (2048, 2752),
        FINAL_NORM: (2048,),
    }
    numel = sum(torch.Size(dims).numel() for entry in table for dims in entry.hf_shapes)
    assert numel == 3_085_938_688  # "3.09B parameters" of the model card


@pytest.mark.parametrize("tied", [False, True])
def test_names_and_shapes_are_those_of_transformers(tied: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_qwen2(tmp_path, tied=tied, layers=2)
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    if tied:
        assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
        del state["lm_head.weight"]
    shape = ModelFacts.from_folder(folder)
    ours = [pair for e in weight_table(shape) for pair in zip(e.hf_names, e.hf_shapes, strict=True)]
    assert len(ours) == len(dict(ours))
    assert dict(ours) == {name: tuple(tensor.shape) for name, tensor in state.items()}


def layers_by_chunk(num_layers: int, pp: int, vpp: int, tied: bool = False) -> dict[tuple[int, int], list[int]]:
    """(rank, chunk) -> global layers in the order of their local numbers; checks that the places are one to one."""
    table = weight_table(facts(layers=num_layers, tied=tied))
    places = [owner(entry, num_layers, pp, vpp) for entry in table]
    assert len(set(places)) == len(table)
    found: dict[tuple[int, int], dict[int, int]] = defaultdict(dict)
    for entry, (rank, chunk, name) in zip(table, places, strict=True):
        if entry.layer is None:
            assert name == entry.megatron_name
            assert (rank, chunk) == ((0, 0) if name == EMBEDDING else (pp - 1, vpp - 1))
        else:
            local = int(name.split(".")[2])
            assert name == entry.megatron_name.replace("{layer}", str(local))
            assert found[rank, chunk].setdefault(local, entry.layer) == entry.layer
    assert all(sorted(by_local) == list(range(num_layers // (pp * vpp))) for by_local in found.values())
    return {place: [by_local[i] for i in sorted(by_local)] for place, by_local in found.items()}


def test_owner_by_hand() -> None:
    # pp = 2, vpp = 2, 8 layers: blocks of 2, dealt to rank 0, 1, 0, 1.
    assert layers_by_chunk(8, pp=2, vpp=2) == {(0, 0): [0, 1], (1, 0): [2, 3], (0, 1): [4, 5], (1, 1): [6, 7]}
    shape = facts(layers=8)
    by_hf_name = {entry.hf_names[0]: owner(entry, 8, 2, 2) for entry in weight_table(shape)}
    assert by_hf_name["model.embed_tokens.weight"] == (0, 0, "embedding.word_embeddings.weight")
    assert by_hf_name["model.layers.5.mlp.down_proj.weight"] == (0, 1, "decoder.layers.1.mlp.linear_fc2.weight")
    assert by_hf_name["model.norm.weight"] == (1, 1, "decoder.final_layernorm.weight")
    assert by_hf_name["lm_head.weight"] == (1, 1, HEAD)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_every_entry_has_one_owner(pp: int, vpp: int, per_chunk: int, tied: bool) -> None:
    by_chunk = layers_by_chunk(pp * vpp * per_chunk, pp, vpp, tied)
    assert set(by_chunk) == {(rank, chunk) for rank in range(pp) for chunk in range(vpp)}
    in_forward_order = [layer for chunk in range(vpp) for rank in range(pp) for layer in by_chunk[rank, chunk]]
    assert in_forward_order == list(range(pp * vpp * per_chunk))


@pytest.mark.filterwarnings("ignore")
def test_layers_are_dealt_as_megatron_deals_them() -> None:
    layer = pytest.importorskip("megatron.core.transformer.transformer_layer")
    for pp, vpp, num_layers in ((1, 1, 3), (2, 1, 8), (2, 2, 8), (4, 3, 24)):
        config = SimpleNamespace(
            num_layers=num_layers,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
            pipeline_model_parallel_layout=None,
            num_layers_in_first_pipeline_stage=None,
            num_layers_in_last_pipeline_stage=None,
            account_for_embedding_in_pipeline_split=False,
            account_for_loss_in_pipeline_split=False,
        )
        for (rank, chunk), layers in layers_by_chunk(num_layers, pp, vpp).items():
            stage = chunk if vpp > 1 else None
            assert layers[0] == layer.get_transformer_layer_offset(config, vp_stage=stage, pp_rank=rank)
            assert layers == list(range(layers[0], layers[0] + num_layers // (pp * vpp)))
