"""Rows of a micro-batch as one packed (THD) sequence.

Rows stand one after the other without padding between them. Rows that share their prompt may stand behind one copy of
it: then every answer's positions continue where the prompt ends. Padding tokens, where a layout needs the length to be
a multiple (sequence parallelism), to be the same in all micro-batches (pipelines), or likes few distinct lengths
(bfloat16 kernels on CPU), form rows of their own at the end, which nothing scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, groupby

import torch
from torch import Tensor

from remax_megatron.flops import RowGroup
from remax_megatron.types import Row

LONGEST_PADDING_ROW = 1024  # tokens, in a micro-batch without rows; else the longest row: attention costs their square

_WHERE_ALL_HAVE_THEM = ("old_logprobs", "ref_logprobs", "values", "returns")  # numbers of a row's response tokens
_ALIGNED = 16  # elements: a kernel that is compiled for aligned addresses then fits every micro-batch


@dataclass
class PackedBatch:
    """One micro-batch. `position_R[i]` is the packed position whose hidden state predicts `target_R[i]`.

    tokens_T, positions_T  [T] int64         cu_seqlens [segments + 1] int32
    target_R               [R] int64         weight_R, advantage_R, the logprobs [R] float32
    `old_logprob_R` is None when every ratio is exactly 1, `ref_logprob_R` without a KL, `value_R` and `return_R`
    without a critic; `rows` numbers the rows as the caller does, `response_lengths` cuts R into them. `segments` holds
    (prompt tokens, [tokens of each answer]) in order, without answers where a row stands alone.
    """

    rows: list[int]
    num_tokens: int  # without padding
    tokens_T: Tensor
    positions_T: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    position_R: Tensor
    target_R: Tensor
    advantage_R: Tensor
    rollout_logprob_R: Tensor
    old_logprob_R: Tensor | None
    ref_logprob_R: Tensor | None
    weight_R: Tensor  # 0 for rows that were not weighed, which are only scored
    response_lengths: list[int]
    segments: list[tuple[int, list[int]]]
    value_R: Tensor | None = None
    return_R: Tensor | None = None
    number: int = 0  # among the micro-batches of its rank


def prompt_groups(rows: Sequence[Row], indices: Sequence[int]) -> list[list[int]]:
    """`indices` cut where the prompt changes: the rows that can share one copy of it."""
    return [list(group) for _, group in groupby(indices, key=lambda i: rows[i].prompt_ids)]


def row_groups(rows: Sequence[Row], indices: Sequence[int], share_prompts: bool) -> list[RowGroup]:
    """The sizes of a micro-batch of `indices`."""
    groups = prompt_groups(rows, indices) if share_prompts else [[i] for i in indices]
    return [RowGroup(len(rows[group[0]].prompt_ids), [len(rows[i].response_ids) for i in group]) for group in groups]


def num_shared_tokens(rows: Sequence[Row], group: Sequence[int]) -> int:
    """Tokens of a group of rows behind one copy of their prompt."""
    return len(rows[group[0]].prompt_ids) + sum(len(rows[i].response_ids) for i in group)


def pack(
    rows: Sequence[Row],
    indices: Sequence[int],
    *,
    pad_to: int,
    number: int = 0,
    pad_limit: int | None = None,
    share_prompts: bool = False,
    device: torch.device | str = "cpu",
) -> PackedBatch:
    """Pack `rows[i] for i in indices`, in their order. An empty micro-batch becomes padding only.

    rows, indices  the rows of the update, and those of this micro-batch
    pad_to         the length is padded to a multiple of it,
    pad_limit      but to no more than this token budget, None: without a limit
    share_prompts  rows with the same prompt stand behind one copy of it
    number         of the micro-batch, among those of its rank
    device         where the tensors go
    """
    packed = _Sequence()
    for group in prompt_groups(rows, indices) if share_prompts else ([i] for i in indices):
        packed.add_group([rows[i] for i in group])
    num_tokens = len(packed.tokens)
    padded = max(pad_to, -(-num_tokens // pad_to) * pad_to)
    packed.pad(padded if pad_limit is None else min(padded, max(pad_limit, pad_to)))
    chosen = [rows[i] for i in indices]
    lengths = packed.lengths()
    whole, real = _Columns(torch.int64), _Columns(torch.float32)
    whole.add("tokens", packed.tokens)
    whole.add("positions", packed.positions)
    whole.add("cu_seqlens", [0, *accumulate(lengths)])
    whole.add("position", packed.position_R)
    whole.add("target", chain.from_iterable(row.response_ids for row in chosen))
    real.add("advantage", chain.from_iterable(row.advantages for row in chosen))
    real.add("rollout_logprob", chain.from_iterable(row.rollout_logprobs for row in chosen))
    real.add("weight", chain.from_iterable([row.weight or 0.0] * len(row.response_ids) for row in chosen))
    for name in _WHERE_ALL_HAVE_THEM:
        if chosen and None not in (values := [getattr(row, name) for row in chosen]):
            real.add(name, chain.from_iterable(values))
    of_tokens, of_answers = whole.to(device), real.to(device)
    return PackedBatch(
        rows=list(indices),
        num_tokens=num_tokens,
        tokens_T=of_tokens["tokens"],
        positions_T=of_tokens["positions"],
        cu_seqlens=of_tokens["cu_seqlens"].int(),
        max_seqlen=max(packed.positions) + 1 if share_prompts else max(lengths),
        position_R=of_tokens["position"],
        target_R=of_tokens["target"],
        advantage_R=of_answers["advantage"],
        rollout_logprob_R=of_answers["rollout_logprob"],
        old_logprob_R=of_answers.get("old_logprobs"),
        ref_logprob_R=of_answers.get("ref_logprobs"),
        value_R=of_answers.get("values"),
        return_R=of_answers.get("returns"),
        weight_R=of_answers["weight"],
        response_lengths=[len(row.response_ids) for row in chosen],
        segments=packed.segments,
        number=number,
    )


@dataclass
class _Sequence:
    """A packed sequence while it grows; `position_R` are the positions that are scored."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    position_R: list[int] = field(default_factory=list)
    segments: list[tuple[int, list[int]]] = field(default_factory=list)

    def add_group(self, rows: Sequence[Row]) -> None:
        """Append the answers of `rows` behind one copy of their prompt."""
        prompt_ids = rows[0].prompt_ids
        self.tokens.extend(prompt_ids)
        self.positions.extend(range(len(prompt_ids)))
        last_of_prompt = len(self.tokens) - 1
        for row in rows:
            start, length = len(self.tokens), len(row.response_ids)
            self.position_R.extend([last_of_prompt, *range(start, start + length)][:length])
            self.tokens.extend(row.response_ids)
            self.positions.extend(range(len(prompt_ids), len(prompt_ids) + length))
        answers = [len(row.response_ids) for row in rows]
        # A single answer is one causal row together with its prompt.
        self.segments.append((len(prompt_ids), answers) if len(rows) > 1 else (len(prompt_ids) + answers[0], []))

    def pad(self, length: int) -> None:
        """Append rows of padding up to `length` tokens."""
        longest = max(self.lengths(), default=LONGEST_PADDING_ROW)
        while (padding := length - len(self.tokens)) > 0:
            row = min(padding, longest)
            self.segments.append((row, []))
            self.tokens.extend([0] * row)
            self.positions.extend(range(row))

    def lengths(self) -> list[int]:
        """Tokens of each segment."""
        return [prompt + sum(answers) for prompt, answers in self.segments]


class _Columns:
    """Lists of one type that go to the device together, in one copy that a GPU's host does not wait for."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._values: list[float] = []
        self._parts: dict[str, slice] = {}

    def add(self, name: str, values: Iterable[float]) -> None:
        start = len(self._values)
        self._values.extend(values)
        self._parts[name] = slice(start, len(self._values))
        self._values.extend([0] * (-len(self._values) % _ALIGNED))

    def to(self, device: torch.device | str) -> dict[str, Tensor]:
        """Each list as a tensor on `device`; they share memory, and each starts at a multiple of _ALIGNED elements."""
        block = torch.tensor(self._values, dtype=self._dtype)
        if torch.device(device).type == "cuda":
            block = block.pin_memory()
        block = block.to(device, non_blocking=True)
        return {name: block[part] for name, part in self._parts.items()}
