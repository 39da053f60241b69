"""Rows of a micro-batch as one packed (THD) sequence.

Rows stand one after the other without padding between them. Rows that share their prompt may stand behind one copy of
it: then every answer's positions go on where the prompt ends. Padding tokens, where a layout needs the length to be a
multiple (sequence parallelism), to be the same in all micro-batches (pipelines), or likes few distinct lengths
(bfloat16 kernels on CPU), form rows of their own at the end, which nothing scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, groupby

import torch
from torch import Tensor

from remax_megatron.flops import RowGroup
from remax_megatron.types import Row

LONGEST_PADDING_ROW = 1024  # tokens, in a micro-batch without rows; else the longest row: attention costs their square

_ALIGNED = 16  # elements: a kernel that is compiled for aligned addresses then fits every micro-batch


@dataclass
class PackedBatch:
    """One micro-batch. `position_R[i]` is the packed position whose hidden state predicts `target_R[i]`.

    tokens_T, positions_T  [T] int64         cu_seqlens [segments + 1] int32
    target_R               [R] int64         weight_R, advantage_R, the logprobs [R] float32
    `old_logprob_R` is None when every ratio is exactly 1, `ref_logprob_R` without a KL; `rows` numbers the rows as the
    caller does, `response_lengths` cuts R into them. `segments` holds (prompt tokens, [tokens of each answer]) in
    order, without answers where a row stands alone.
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
    """Pack `rows[i] for i in indices`; pad to a multiple of `pad_to`, but to no more than the token budget `pad_limit`.

    An empty micro-batch becomes padding only. Rows keep the order of `indices`.
    """
    groups = prompt_groups(rows, indices) if share_prompts else [[i] for i in indices]
    tokens: list[int] = []
    positions: list[int] = []
    position_R: list[int] = []
    segments: list[tuple[int, list[int]]] = []
    for group in groups:
        prompt_ids = rows[group[0]].prompt_ids
        tokens.extend(prompt_ids)
        positions.extend(range(len(prompt_ids)))
        last_of_prompt = len(tokens) - 1
        for i in group:
            response_ids = rows[i].response_ids
            position_R.extend(
                [last_of_prompt, *range(len(tokens), len(tokens) + len(response_ids))][: len(response_ids)]
            )
            tokens.extend(response_ids)
            positions.extend(range(len(prompt_ids), len(prompt_ids) + len(response_ids)))
        answers = [len(rows[i].response_ids) for i in group]
        # A single answer is one causal row together with its prompt.
        segments.append((len(prompt_ids), answers) if len(group) > 1 else (len(prompt_ids) + answers[0], []))
    num_tokens = len(tokens)
    padded = max(pad_to, -(-num_tokens // pad_to) * pad_to)
    if pad_limit is not None:
        padded = min(padded, max(pad_limit, pad_to))
    longest = max((prompt + sum(answers) for prompt, answers in segments), default=LONGEST_PADDING_ROW)
    while (padding := padded - len(tokens)) > 0:
        length = min(padding, longest)
        segments.append((length, []))
        tokens.extend([0] * length)
        positions.extend(range(length))
    chosen = [rows[i] for i in indices]
    lengths = [prompt + sum(answers) for prompt, answers in segments]
    whole, real = _Columns(torch.int64), _Columns(torch.float32)
    whole.add("tokens", tokens)
    whole.add("positions", positions)
    whole.add("cu_seqlens", [0, *accumulate(lengths)])
    whole.add("position", position_R)
    whole.add("target", chain.from_iterable(row.response_ids for row in chosen))
    real.add("advantage", chain.from_iterable(row.advantages for row in chosen))
    real.add("rollout_logprob", chain.from_iterable(row.rollout_logprobs for row in chosen))
    real.add("weight", chain.from_iterable([row.weight or 0.0] * len(row.response_ids) for row in chosen))
    for name, values in (("old", [r.old_logprobs for r in chosen]), ("ref", [r.ref_logprobs for r in chosen])):
        given = [one for one in values if one is not None]
        if values and len(given) == len(values):
            real.add(name, chain.from_iterable(given))
    of_tokens, of_answers = whole.to(device), real.to(device)
    return PackedBatch(
        rows=list(indices),
        num_tokens=num_tokens,
        tokens_T=of_tokens["tokens"],
        positions_T=of_tokens["positions"],
        cu_seqlens=of_tokens["cu_seqlens"].int(),
        max_seqlen=max(positions) + 1 if share_prompts else max(lengths),
        position_R=of_tokens["position"],
        target_R=of_tokens["target"],
        advantage_R=of_answers["advantage"],
        rollout_logprob_R=of_answers["rollout_logprob"],
        old_logprob_R=of_answers.get("old"),
        ref_logprob_R=of_answers.get("ref"),
        weight_R=of_answers["weight"],
        response_lengths=[len(row.response_ids) for row in chosen],
        segments=segments,
        number=number,
    )


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
