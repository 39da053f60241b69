"""Attention over packed rows: what Megatron's `core_attention` slot holds on each device.

Query, key and value arrive as [T, heads, head_dim] with `PackedRows` (THD). Backends, chosen once per run:

    transformer_engine  GPU; Megatron's TEDotProductAttention
    varlen              GPU without Transformer Engine; torch.nn.attention.varlen (torch >= 2.11)
    flex                GPU; torch's flex attention, compiled
    sdpa                anywhere; scaled-dot-product attention per row, the reference the tests compare with

Shared prompts: the answers to one prompt stand behind it, and each sees the prompt and itself. Only flex and sdpa
compute that.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from remax_megatron.errors import UserError

SHARES_PROMPTS = ("flex", "sdpa")  # backends that compute shared prompts
Segments = list[tuple[int, list[int]]]


@dataclass
class PackedRows(PackedSeqParams):
    """What Megatron and the attention have to know of a pack.

    `segments[i]` is (prompt tokens, [tokens of each answer behind it]); a segment without answers is one causal row.
    `row_cu_seqlens` [rows + 1] int32, on the device, is where the rows begin and end; with shared prompts it has no
    meaning. Megatron's own `cu_seqlens_*` say which rows Transformer Engine rotates; see `packed_rows`. Without them
    `rotation`, set by `rotate_by`, is what the attention rotates queries and keys by.
    """

    segments: Segments | None = None
    row_cu_seqlens: Tensor | None = None
    angles_per_token: bool = False
    rotation: tuple[Tensor, Tensor] | None = None

    def rotate_by(self, angles_T1D: Tensor, dtype: torch.dtype) -> None:
        """Let the attention rotate by these angles, in radians: cosines and sines in `dtype`, once for all layers."""
        self.rotation = angles_T1D.cos().to(dtype), angles_T1D.sin().to(dtype)


def packed_rows(
    segments: Segments, cu_seqlens: Tensor, max_seqlen: int, *, shares_prompts: bool, fused_rotation: bool
) -> PackedRows:
    """The `PackedRows` of segments that begin and end at `cu_seqlens` [segments + 1] int32, on the device.

    With `fused_rotation` one kernel of Transformer Engine rotates the rows that `cu_seqlens_q` names: all tokens are
    one row under shared prompts, with angles that come per token. Without it there is no `cu_seqlens_q`, and the
    attention rotates all tokens at once by angles per token.
    """
    named = None
    if fused_rotation:
        named = cu_seqlens[:: len(segments)].contiguous() if shares_prompts else cu_seqlens
    return PackedRows(
        qkv_format="thd",
        cu_seqlens_q=named,
        cu_seqlens_kv=named,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
        segments=segments,
        row_cu_seqlens=cu_seqlens,
        angles_per_token=shares_prompts or not fused_rotation,
    )


def choose_backend(requested: str, device: torch.device, dtype: torch.dtype, share_prompts: bool = False) -> str:
    """The backend to use on `device` for `dtype`; UserError when the requested one cannot run there, or cannot
    compute shared prompts."""
    fast = dtype == torch.bfloat16  # flash kernels take no float32
    runs = {
        "transformer_engine": fast and HAVE_TE,
        "varlen": fast and device.type == "cuda" and importlib.util.find_spec("torch.nn.attention.varlen") is not None,
        "flex": device.type == "cuda",
        "sdpa": True,
    }
    if requested == "auto":
        return next(name for name, ok in runs.items() if ok and (name in SHARES_PROMPTS or not share_prompts))
    if share_prompts and requested not in SHARES_PROMPTS:
        raise UserError(
            f"attention_backend={requested} cannot compute shared prompts; set actor_rollout_ref.actor.share_prompts="
            f"False, or actor_rollout_ref.actor.megatron.attention_backend to {' or '.join(SHARES_PROMPTS)}"
        )
    if not runs[requested]:
        raise UserError(
            f"attention_backend={requested} cannot run here on {device.type} in {dtype}; set "
            "actor_rollout_ref.actor.megatron.attention_backend=auto"
        )
    return requested


class _PackedAttention(torch.nn.Module):
    """Common shell: Megatron's constructor arguments, and the [T, heads * head_dim] result it expects."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, softmax_scale=None, **kwargs):
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query_TND: Tensor,
        key_TKD: Tensor,
        value_TKD: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type=None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedRows | None = None,
    ) -> Tensor:
        """Attend over packed rows: query_TND [T, heads, D], key_TKD and value_TKD [T, groups, D], in the order in which
        Megatron calls. All is said by packed_seq_params: attention_mask, attn_mask_type and attention_bias are not
        read."""
        assert packed_seq_params is not None, "the policy only runs packed micro-batches"
        if packed_seq_params.rotation is not None:
            query_TND, key_TKD = (_rotated(x, *packed_seq_params.rotation) for x in (query_TND, key_TKD))
        out_TND = self.attend(query_TND, key_TKD, value_TKD, packed_seq_params)
        return out_TND.reshape(out_TND.shape[0], -1)


def _rotated(x_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of halves, as Megatron's rope_utils.py adds it up."""
    first, second = x_THD.chunk(2, dim=-1)
    return x_THD * cos_T1D + torch.cat([-second, first], dim=-1) * sin_T1D


class SdpaPerRow(_PackedAttention):
    """Causal attention, one row at a time: work grows with the sum of squared row lengths, not of the whole pack."""

    def attend(self, query_TND, key_TKD, value_TKD, packed: PackedRows) -> Tensor:
        """[T, heads, D] for rotated queries and keys."""
        outs, start = [], 0
        for prompt, answers in packed.segments:
            end = start + prompt
            rows = slice(start, end)
            outs.append(self._row(query_TND[rows], key_TKD[rows], value_TKD[rows]))
            prompt_k, prompt_v = key_TKD[rows], value_TKD[rows]
            for answer in answers:
                rows = slice(end, end + answer)
                k, v = torch.cat([prompt_k, key_TKD[rows]]), torch.cat([prompt_v, value_TKD[rows]])
                outs.append(self._row(query_TND[rows], k, v))
                end += answer
            start = end
        return torch.cat(outs)

    def _row(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The last len(q) of len(k) positions attend to all before them and themselves."""
        seen_before = k.shape[0] - q.shape[0]
        mask = None
        if seen_before:
            mask = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool, device=q.device).tril(seen_before)
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1).unsqueeze(0),
            k.transpose(0, 1).unsqueeze(0),
            v.transpose(0, 1).unsqueeze(0),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out.squeeze(0).transpose(0, 1)


class FlexAttention(_PackedAttention):
    """torch's flex attention under a mask made from the segments; compiled on CUDA. arXiv 2412.05496."""

    def attend(self, query_TND, key_TKD, value_TKD, packed: PackedRows) -> Tensor:
        """[T, heads, D] for rotated queries and keys."""
        mask = getattr(packed, "block_mask", None)  # the same in every layer
        if mask is None:
            mask = packed.block_mask = _block_mask(packed.segments, query_TND.shape[0], query_TND.device)
        out = _flex_attention(query_TND.is_cuda)(
            *(tensor.transpose(0, 1).unsqueeze(0) for tensor in (query_TND, key_TKD, value_TKD)),
            block_mask=mask,
            scale=self.softmax_scale,
            enable_gqa=query_TND.shape[1] != key_TKD.shape[1],
        )
        return out.squeeze(0).transpose(0, 1)


@functools.cache
def _flex_attention(compiled: bool):
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention


def _block_mask(segments: Segments, total: int, device: torch.device):
    from torch.nn.attention.flex_attention import create_block_mask

    segment_T, answer_T = _labels(segments, device)

    def sees(batch, head, q, kv):
        mine = (answer_T[kv] == 0) | (answer_T[kv] == answer_T[q])
        return (segment_T[q] == segment_T[kv]) & (kv <= q) & mine

    compiled = {"_compile": True} if device.type == "cuda" else {}  # else a T x T matrix exists on the way
    return create_block_mask(sees, B=None, H=None, Q_LEN=total, KV_LEN=total, device=device, **compiled)


def _labels(segments: Segments, device: torch.device) -> tuple[Tensor, Tensor]:
    """Per token: the number of its segment, and that of its answer within it (0: the prompt)."""
    lengths = [prompt + sum(answers) for prompt, answers in segments]
    segment_T = torch.arange(len(segments)).repeat_interleave(torch.tensor(lengths))
    parts = [(i, size) for prompt, answers in segments for i, size in enumerate([prompt, *answers])]
    numbers, sizes = torch.tensor(parts).T
    return segment_T.to(device), numbers.repeat_interleave(sizes).to(device)


class VarlenAttention(_PackedAttention):
    """torch's variable-length flash attention; CUDA, bfloat16, torch >= 2.11."""

    def attend(self, query_TND, key_TKD, value_TKD, packed: PackedRows) -> Tensor:
        """[T, heads, D] for rotated queries and keys."""
        from torch.nn.attention.varlen import varlen_attn

        group = query_TND.shape[1] // key_TKD.shape[1]
        return varlen_attn(
            query_TND.contiguous(),
            key_TKD.repeat_interleave(group, dim=1),
            value_TKD.repeat_interleave(group, dim=1),
            packed.row_cu_seqlens,
            packed.row_cu_seqlens,
            packed.max_seqlen_q,
            packed.max_seqlen_kv,
            scale=self.softmax_scale,
            window_size=(-1, 0),  # causal
        )


def core_attention(backend: str) -> type:
    """The module class for Megatron's `core_attention` slot under `backend` (a result of `choose_backend`)."""
    if backend == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        return TEDotProductAttention
    return {"varlen": VarlenAttention, "flex": FlexAttention, "sdpa": SdpaPerRow}[backend]
