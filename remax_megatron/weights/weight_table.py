"""The one weight table: every tensor of a model under its Hugging Face names and its Megatron name, and how it is cut.

Pure: sizes in, names and shapes out; no torch, no groups, no Megatron import. The policy's loading, the weight sync
into the rollout engine, the export and the planner all go through it; shards.py moves the tensors as it says.

Megatron's side of the table (megatron-core 0.16.1 and 0.19.2, `get_gpt_layer_local_spec`; the names of
`get_gpt_layer_with_transformer_engine_spec` are in `TE_NAMES`):
    linear_qkv   query heads of a group, then its key head, then its value head, group after group; cut by rows over
                 tensor-parallel ranks, also when there are more ranks than groups (Megatron then gathers the output)
    linear_fc1   on each rank: its rows of gate_proj, then its rows of up_proj
    vocabulary   padded with zero rows to a multiple of `VOCAB_MULTIPLE` x TP
"""

from __future__ import annotations

from dataclasses import dataclass

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
