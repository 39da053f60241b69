"""Rows of a micro-batch as one packed (THD) sequence.

Rows stand one after the other without padding between them. Padding tokens, where a layout needs the length to be a
multiple (sequence parallelism) or likes few distinct lengths (bfloat16 kernels on CPU), form one more row of their
own at the end, which nothing scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from remax_megatron.types import Row


@dataclass
class PackedBatch:
    """One micro-batch. `position_R[i]` is the packed position whose hidden state predicts `target_R[i]`.

    tokens_T, positions_T  [T] int64         cu_seqlens [num_rows + padding row + 1] int32
    target_R               [R] int64         advantage_R, rollout_logprob_R, old_logprob_R [R] float32
    `old_logprob_R` is None when every ratio is exactly 1; `rows` numbers the rows as the caller does.
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


def pack(
    rows: Sequence[Row],
    indices: Sequence[int],
    *,
    pad_to: int,
    pad_limit: int | None = None,
    device: torch.device | str = "cpu",
) -> PackedBatch:
    """Pack `rows[i] for i in indices`; pad to a multiple of `pad_to`, but to no more than the token budget `pad_limit`.

    An empty micro-batch becomes padding only. Rows keep the order of `indices`.
    """
    chosen = [rows[i] for i in indices]
    lengths = [row.num_tokens for row in chosen]
    num_tokens = sum(lengths)
    padded = max(pad_to, -(-num_tokens // pad_to) * pad_to)
    if pad_limit is not None:
        padded = min(padded, max(pad_limit, pad_to))
    padding = max(padded - num_tokens, 0)
    segments = lengths + ([padding] if padding else [])
    tokens: list[int] = []
    position_R: list[int] = []
    for row in chosen:
        first_target = len(tokens) + len(row.prompt_ids)
        tokens.extend(row.prompt_ids)
        tokens.extend(row.response_ids)
        position_R.extend(range(first_target - 1, len(tokens) - 1))
    tokens.extend([0] * padding)
    cu_seqlens = torch.tensor([0, *segments], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    old = [row.old_logprobs for row in chosen]
    has_old = bool(chosen) and all(one is not None for one in old)

    def floats(values: list[list[float]]) -> Tensor:
        return torch.tensor([x for one in values for x in one], dtype=torch.float32, device=device)

    return PackedBatch(
        rows=list(indices),
        num_tokens=num_tokens,
        tokens_T=torch.tensor(tokens, dtype=torch.int64, device=device),
        positions_T=torch.cat([torch.arange(n) for n in segments]).to(device),
        cu_seqlens=cu_seqlens.to(device),
        max_seqlen=max(segments),
        position_R=torch.tensor(position_R, dtype=torch.int64, device=device),
        target_R=torch.tensor([t for row in chosen for t in row.response_ids], dtype=torch.int64, device=device),
        advantage_R=floats([row.advantages for row in chosen]),
        rollout_logprob_R=floats([row.rollout_logprobs for row in chosen]),
        old_logprob_R=floats(old) if has_old else None,  # type: ignore[arg-type]
    )
