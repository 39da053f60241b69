"""The one weight table: every tensor of a model under its Hugging Face names and its Megatron name, and how it is cut.

Pure: tensors in, tensors out; no groups, no Megatron import. The policy's loading, the weight sync into the rollout
engine and the export all go through it.

Megatron's side of the table (megatron-core 0.16.1 and 0.19.2, `get_gpt_layer_local_spec`; the names of
`get_gpt_layer_with_transformer_engine_spec` are in `TE_NAMES`):
    linear_qkv   query heads of a group, then its key head, then its value head, group after group; cut by rows over
                 tensor-parallel ranks, also when there are more ranks than groups (Megatron then gathers the output)
    linear_fc1   on each rank: its rows of gate_proj, then its rows of up_proj
    vocabulary   padded with zero rows to a multiple of `VOCAB_MULTIPLE` x TP
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from remax_megatron.model_facts import ModelFacts

VOCAB_MULTIPLE = 128
EMBEDDING = "embedding.word_embeddings.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
HEAD = "output_layer.weight"
# A critic's: under Hugging Face's names for a model that classifies tokens, with one class.
VALUE_HEAD = {"output_layer.weight": "score.weight", "output_layer.bias": "score.bias"}
# What Transformer Engine's layers, which fuse a norm into the linear behind it, call two parameters of the table. In
# Megatron's checkpoints these are the names under either kind of layers (`sharded_state_dict_keys_map`).
TE_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


@dataclass(frozen=True)
class WeightEntry:
    """One Megatron tensor and the Hugging Face tensors it is made of.

    `megatron_name` holds "{layer}" where the layer's number within its model chunk goes (see `owner`); `layer` is the
    global number, None outside the layers. `kind` says how the tensor is merged and cut over tensor-parallel ranks:
    replicated | row (along dim 1) | vocab (padded, along dim 0) | qkv | gate_up.
    """

    megatron_name: str
    kind: str
    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    layer: int | None = None


def weight_table(facts: ModelFacts) -> list[WeightEntry]:
    """Every distinct tensor, in the order of the forward pass. With tied embeddings there is no output_layer.

    A critic's output layer gives one value; no rank has a part of it."""
    hidden, ffn = facts.hidden_size, facts.ffn_hidden_size
    q_rows, kv_rows = facts.num_attention_heads * facts.head_dim, facts.num_key_value_heads * facts.head_dim
    vocab = ((facts.vocab_size, hidden),)
    norm = ((hidden,),)
    q, k, v = (f"self_attn.{x}_proj" for x in "qkv")
    family: list[tuple[str, str, tuple[str, ...], tuple[tuple[int, ...], ...]]] = []
    if facts.family.qkv_bias:
        biases = (f"{q}.bias", f"{k}.bias", f"{v}.bias")
        family.append(("self_attention.linear_qkv.bias", "qkv", biases, ((q_rows,), (kv_rows,), (kv_rows,))))
    if facts.family.qk_norm:
        for x in "qk":
            hf_name, width = f"self_attn.{x}_norm.weight", (facts.head_dim,)
            family.append((f"self_attention.{x}_layernorm.weight", "replicated", (hf_name,), (width,)))
    per_layer = (
        ("input_layernorm.weight", "replicated", ("input_layernorm.weight",), norm),
        (
            "self_attention.linear_qkv.weight",
            "qkv",
            (f"{q}.weight", f"{k}.weight", f"{v}.weight"),
            ((q_rows, hidden), (kv_rows, hidden), (kv_rows, hidden)),
        ),
        *family,
        ("self_attention.linear_proj.weight", "row", ("self_attn.o_proj.weight",), ((hidden, q_rows),)),
        ("pre_mlp_layernorm.weight", "replicated", ("post_attention_layernorm.weight",), norm),
        (
            "mlp.linear_fc1.weight",
            "gate_up",
            ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
            ((ffn, hidden), (ffn, hidden)),
        ),
        ("mlp.linear_fc2.weight", "row", ("mlp.down_proj.weight",), ((hidden, ffn),)),
    )
    entries = [WeightEntry(EMBEDDING, "vocab", ("model.embed_tokens.weight",), vocab)]
    for layer in range(facts.num_layers):
        for name, kind, hf_names, hf_shapes in per_layer:
            in_layer = tuple(f"model.layers.{layer}.{hf_name}" for hf_name in hf_names)
            entries.append(WeightEntry(f"decoder.layers.{{layer}}.{name}", kind, in_layer, hf_shapes, layer))
    entries.append(WeightEntry(FINAL_NORM, "replicated", ("model.norm.weight",), norm))
    if facts.value_head:
        for (name, hf_name), shape in zip(VALUE_HEAD.items(), ((1, hidden), (1,)), strict=True):
            entries.append(WeightEntry(name, "replicated", (hf_name,), (shape,)))
    elif not facts.tied_embeddings:
        entries.append(WeightEntry(HEAD, "vocab", ("lm_head.weight",), vocab))
    return entries


def table_name(parameter_name: str) -> str:
    """The name in the table of a parameter of a model chunk, whichever kind of layers it is made of."""
    for name, te_name in TE_NAMES.items():
        if parameter_name.endswith(te_name):
            return parameter_name.removesuffix(te_name) + name
    return parameter_name


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Rows of Megatron's embedding: `vocab_size` rounded up to a multiple of 128 x TP."""
    multiple = VOCAB_MULTIPLE * tp
    return -(-vocab_size // multiple) * multiple


def to_megatron(entry: WeightEntry, hf: Mapping[str, Tensor], facts: ModelFacts, tp: int, tp_rank: int) -> Tensor:
    """The shard of `entry` that tensor-parallel rank `tp_rank` of `tp` holds, from whole Hugging Face tensors."""
    parts = [hf[name] for name in entry.hf_names]
    if entry.kind == "replicated":
        return parts[0]
    if entry.kind == "row":
        return parts[0].chunk(tp, dim=1)[tp_rank]
    if entry.kind == "vocab":
        rows = padded_vocab_size(facts.vocab_size, tp) // tp
        mine = parts[0][tp_rank * rows : (tp_rank + 1) * rows]
        if mine.shape[0] == rows:
            return mine
        return torch.cat([mine, mine.new_zeros(rows - mine.shape[0], mine.shape[1])])
    if entry.kind == "gate_up":
        return torch.cat([part.chunk(tp, dim=0)[tp_rank] for part in parts])
    groups = facts.num_key_value_heads
    by_group = [part.reshape(groups, -1, facts.head_dim, *part.shape[1:]) for part in parts]
    merged = torch.cat(by_group, dim=1).flatten(0, 2)
    return merged.chunk(tp, dim=0)[tp_rank]


def to_hf(entry: WeightEntry, shards: Sequence[Tensor], facts: ModelFacts) -> dict[str, Tensor]:
    """The whole Hugging Face tensors of `entry`, from the shards of all tensor-parallel ranks in rank order."""
    if entry.kind == "replicated":
        return {entry.hf_names[0]: shards[0]}
    if entry.kind == "row":
        return {entry.hf_names[0]: _joined(shards, dim=1)}
    if entry.kind == "vocab":
        return {entry.hf_names[0]: _joined(shards)[: facts.vocab_size]}
    if entry.kind == "gate_up":
        halves = [shard.chunk(2, dim=0) for shard in shards]
        return {name: _joined([half[i] for half in halves]) for i, name in enumerate(entry.hf_names)}
    merged = _joined(shards)
    groups = facts.num_key_value_heads
    heads = facts.num_attention_heads // groups
    by_group = merged.reshape(groups, heads + 2, facts.head_dim, *merged.shape[1:])
    query, key, value = by_group.split([heads, 1, 1], dim=1)
    return {name: part.flatten(0, 2) for name, part in zip(entry.hf_names, (query, key, value), strict=True)}


def _joined(shards: Sequence[Tensor], dim: int = 0) -> Tensor:
    return shards[0] if len(shards) == 1 else torch.cat(list(shards), dim=dim)


@dataclass(frozen=True)
class RowRun:
    """Megatron's rows from `megatron_row` on are `num_rows` rows of the Hugging Face tensor `hf_name` from `hf_row`."""

    hf_name: str
    hf_row: int
    megatron_row: int
    num_rows: int


def row_runs(entry: WeightEntry, facts: ModelFacts) -> list[RowRun]:
    """How the rows of the whole Megatron tensor (TP 1) are put together, in its order; padding rows are in no run.

    Between whole tensors the table only moves rows, so a converter can copy bytes. Found by sending row numbers
    through `to_megatron`.
    """
    numbers, names = _numbered_rows(entry)
    order = to_megatron(entry, numbers, facts, 1, 0).flatten()
    runs = []
    for start, end in _consecutive(order):
        number = int(order[start])
        if number:
            base, name = max(pair for pair in names if pair[0] <= number)
            runs.append(RowRun(name, number - base, start, end - start))
    return runs


def shard_runs(entry: WeightEntry, facts: ModelFacts, tp: int, tp_rank: int) -> list[tuple[int, int, int]]:
    """(row of the shard, row of the whole tensor at TP 1, number of rows) of what rank `tp_rank` of `tp` holds.

    Padding rows are in no run. The shard of a "row" entry has all rows, and the columns from tp_rank x its width on.
    """
    if entry.kind in ("replicated", "row"):
        return [(0, 0, entry.hf_shapes[0][0])]
    numbers, _ = _numbered_rows(entry)
    whole = to_megatron(entry, numbers, facts, 1, 0).flatten()
    mine = to_megatron(entry, numbers, facts, tp, tp_rank).flatten()
    row_of = torch.zeros(int(whole.max()) + 1, dtype=torch.int64)
    row_of[whole] = torch.arange(len(whole))
    rows = row_of[mine].where(mine != 0, -1)
    return [(start, int(rows[start]), end - start) for start, end in _consecutive(rows) if rows[start] >= 0]


def _numbered_rows(entry: WeightEntry) -> tuple[dict[str, Tensor], list[tuple[int, str]]]:
    """Hugging Face tensors of `entry` that hold the numbers of their rows, and the first number of each tensor.

    0 is left to padding, and a gap keeps the runs of two tensors apart.
    """
    numbers, names, first = {}, [], 1
    for name, (rows, *rest) in zip(entry.hf_names, entry.hf_shapes, strict=True):
        numbers[name] = torch.arange(first, first + rows).reshape(rows, *(1 for _ in rest))
        names.append((first, name))
        first += rows + 1
    return numbers, names


def _consecutive(order: Tensor) -> list[tuple[int, int]]:
    """(start, end) of the stretches in which the numbers of `order` rise by 1."""
    ends = [*((order.diff() != 1).nonzero().flatten() + 1).tolist(), len(order)]
    return list(zip([0, *ends], ends, strict=False))


def shard_shape(entry: WeightEntry, facts: ModelFacts, tp: int) -> tuple[int, ...]:
    """Shape of one tensor-parallel shard of `entry` (the same on every rank)."""
    first, *_ = entry.hf_shapes
    if entry.kind == "replicated":
        return first
    if entry.kind == "row":
        return (first[0], first[1] // tp)
    rows = padded_vocab_size(first[0], tp) if entry.kind == "vocab" else sum(s[0] for s in entry.hf_shapes)
    return (rows // tp, *first[1:])


def owner(entry: WeightEntry, num_layers: int, pp: int, vpp: int) -> tuple[int, int, str]:
    """(pipeline rank, model chunk on it, parameter name there) of `entry`.

    Layers are dealt as Megatron deals them: pp * vpp equal blocks, block b to rank b % pp as its chunk b // pp.
    """
    if entry.layer is None:
        rank, chunk = (0, 0) if entry.megatron_name == EMBEDDING else (pp - 1, vpp - 1)
        return rank, chunk, entry.megatron_name
    per_block = num_layers // (pp * vpp)
    block, local_layer = divmod(entry.layer, per_block)
    return block % pp, block // pp, entry.megatron_name.format(layer=local_layer)
