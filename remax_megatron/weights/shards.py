"""Tensors between their Hugging Face form and Megatron's shards, as the weight table says.

Pure: tensors in, tensors out; no groups, no Megatron import.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from remax_megatron.model_facts import ModelFacts
from remax_megatron.weights.weight_table import WeightEntry, padded_vocab_size


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
