"""Stands for `transformer_engine_torch`, the compiled half of Transformer Engine 2.19, in plain torch.

Names, order of arguments and results are those of the calls in Transformer Engine's Python files; tests/te/
test_stand_in.py compares them with `CALLS`. Kernels compute in float32 and round once, on writing. Every other name
exists too, so that Transformer Engine can be imported; a call of it raises NotImplementedError.

Shapes: T tokens of a pack, N query heads, K key and value heads, D values per head, B rows, S tokens of the longest.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def _enumeration(name: str, members: str, start: int = 0) -> type[enum.IntEnum]:
    return enum.IntEnum(name, members.split(), start=start)


class DType(enum.IntEnum):
    """Transformer Engine reads these numbers, and that there are no others, when it is imported."""

    kByte, kInt32, kFloat32, kFloat16, kBFloat16, kFloat8E4M3, kFloat8E5M2, kFloat4E2M1 = 0, 2, 4, 5, 6, 7, 8, 10


TORCH_TYPE = {DType.kFloat32: torch.float32, DType.kFloat16: torch.float16, DType.kBFloat16: torch.bfloat16}

FP8FwdTensors = _enumeration(
    "FP8FwdTensors",
    "GEMM1_INPUT GEMM1_WEIGHT GEMM1_OUTPUT GEMM2_INPUT GEMM2_WEIGHT GEMM2_OUTPUT GEMM3_INPUT GEMM3_WEIGHT GEMM3_OUTPUT",
)
FP8BwdTensors = _enumeration(
    "FP8BwdTensors", "GRAD_OUTPUT1 GRAD_INPUT1 GRAD_OUTPUT2 GRAD_INPUT2 GRAD_OUTPUT3 GRAD_INPUT3"
)
NVTE_QKV_Format = _enumeration(
    "NVTE_QKV_Format",
    "NVTE_SBHD NVTE_BSHD NVTE_THD NVTE_BSHD_2SBHD NVTE_SBHD_2BSHD NVTE_THD_2BSHD NVTE_THD_2SBHD NVTE_BHSD "
    "NVTE_QKV_Format_NOT_SET",
)
NVTERoutingMapFormat = _enumeration("NVTERoutingMapFormat", "BYTEMAP BITMAP_U8")


class NVTE_Fused_Attn_Backend(enum.IntEnum):
    """Which of cuDNN's attentions runs."""

    NVTE_No_Backend, NVTE_F16_arbitrary_seqlen, NVTE_FP8 = -1, 1, 2


class _Absent(type):
    """Class of the names without a stand-in; their attributes (members of enumerations) are those names again."""

    def __getattr__(cls, member: str) -> str:
        if member.startswith("__"):
            raise AttributeError(member)
        return f"{cls.__name__}.{member}"

    def __call__(cls, *args, **kwargs):
        raise NotImplementedError(f"transformer_engine_torch.{cls.__name__} has no stand-in: tests/stand_ins/te_cpu")


def __getattr__(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return globals().setdefault(name, _Absent(name, (), {}))


# `from transformer_engine_torch import *` takes what stands here, and these two are looked up behind it.
layernorm_fwd = _Absent("layernorm_fwd", (), {})
layernorm_bwd = _Absent("layernorm_bwd", (), {})


def get_cudnn_version() -> int:
    """cuDNN 9.19, of the GPU lock."""
    return 91900


def _only(where: str, **conditions: bool) -> None:
    """NotImplementedError with what was asked for beyond the stand-in."""
    broken = [name for name, met in conditions.items() if not met]
    if broken:
        raise NotImplementedError(f"{where} on the CPU knows only: {', '.join(broken).replace('_', ' ')}")


# -- matrix products ---------------------------------------------------------------------------------------------------


def generic_gemm(
    A: Tensor, transa: bool, B: Tensor, transb: bool, out: Tensor | None, quantization_params, out_dtype,
    bias: Tensor | None, bias_dtype, gelu: bool, gelu_in, grad: bool, workspace, workspace_size, accumulate: bool,
    use_split_accumulator: bool, comm_overlap=None, comm_type=None, extra_output=None, bulk_overlap: bool = False,
    alpha: float = 1.0, beta: float | None = None,
) -> list:  # fmt: skip
    """[product, gradient of the bias, None, None]; leading dimensions count as rows.

    TN (a forward pass)       input [T, in] x weight [out, in]^T + bias
    NN (gradient of inputs)   output gradient [T, out] x weight [out, in]
    NT (gradient of weights)  output gradient [T, out]^T x input [T, in], added to `out` under `accumulate`; where a
                              bias is given its gradient comes beside it, in the type of the product
    """
    plain = quantization_params is None and not gelu and comm_overlap is None and extra_output is None
    _only("generic_gemm", no_FP8_no_GELU_no_overlap=plain)
    dtype = A.dtype if out_dtype is None else TORCH_TYPE[out_dtype]
    right, left = A.float().flatten(0, -2), B.float().flatten(0, -2)
    result = (left.T if transb else left) @ (right.T if transa else right) * alpha
    bias_grad = left.sum(0).to(dtype) if bias is not None and grad else None
    if bias is not None and not grad:
        result += bias.float()
    if not transb:
        result = result.view(*B.shape[:-1], -1)
    if out is None:
        return [result.to(dtype), bias_grad, None, None]
    assert out.dtype == dtype and out.shape == result.shape, (out.dtype, dtype, out.shape, result.shape)
    out.copy_(result + out.float() * (1.0 if beta is None else beta) if accumulate else result)
    return [out, bias_grad, None, None]


# -- root-mean-square norm ---------------------------------------------------------------------------------------------


def rmsnorm_fwd(input, weight, eps, ln_out, quantizer, otype, sm_margin, zero_centered_gamma) -> list:
    """[normed input, None (no mean), 1 / root mean square of every row as one vector]."""
    _only("rmsnorm_fwd", no_FP8=quantizer is None, no_shifted_weight=not zero_centered_gamma)
    rows = input.float()
    inverse = torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + eps)
    normed = (rows * inverse * weight.float()).to(TORCH_TYPE[otype])
    return [normed if ln_out is None else ln_out.copy_(normed), None, inverse.view(-1)]


def rmsnorm_bwd(dz, x, rsigma, gamma, sm_margin, zero_centered_gamma) -> list:
    """[gradient of the input, gradient of the weight].

    With u = x / rms and g = dz * weight:  dx = (g - u * mean(g * u)) / rms,  dweight = sum over rows of dz * u.
    """
    _only("rmsnorm_bwd", no_shifted_weight=not zero_centered_gamma)
    inverse = rsigma.view(*x.shape[:-1], 1)
    u, g = x.float() * inverse, dz.float() * gamma.float()
    dx = (g - u * (g * u).mean(-1, keepdim=True)) * inverse
    dgamma = (dz.float() * u).flatten(0, -2).sum(0)
    return [dx.to(x.dtype), dgamma.to(gamma.dtype)]


# -- rotary embedding --------------------------------------------------------------------------------------------------


def fused_rope_forward(
    input, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank
) -> Tensor:  # fmt: skip
    """Input turned by `freqs` [positions, 1, 1, R]: the first R of D values in two halves, one angle for each value."""
    first, second, rest, a, b = _halves(input, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size)
    turned = (first * a.cos() - second * a.sin(), second * b.cos() + first * b.sin(), rest)
    return torch.cat(turned, dim=-1).to(input.dtype)


def fused_rope_backward(
    output_grads, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank
) -> Tensor:  # fmt: skip
    """The gradient of the input: the transposed rotation."""
    first, second, rest, a, b = _halves(
        output_grads, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size
    )
    turned = (first * a.cos() + second * b.sin(), second * b.cos() - first * a.sin(), rest)
    return torch.cat(turned, dim=-1).to(output_grads.dtype)


def _halves(x: Tensor, freqs: Tensor, start_positions, qkv_format, interleaved, cu_seqlens, cp_size) -> tuple:
    """(first half, second half, what does not turn, angles of the first half, angles of the second)."""
    thd, sbhd = qkv_format == NVTE_QKV_Format.NVTE_THD, qkv_format == NVTE_QKV_Format.NVTE_SBHD
    _only("fused_rope", thd_or_sbhd=thd or sbhd, one_rank=cp_size == 1, halves=not interleaved)
    _only("fused_rope", rows_from_position_0=start_positions is None)
    assert freqs.dtype == torch.float32
    if thd:  # [T, N, D]: each row begins at position 0 anew
        assert int(cu_seqlens[-1]) == x.shape[0], (cu_seqlens, x.shape)
        angles = torch.cat([freqs[:length, 0] for length in cu_seqlens.diff().tolist()])
    else:  # [S, B, N, D]
        angles = freqs[: x.shape[0]]
    half = freqs.shape[-1] // 2
    first, second, rest = x.float().split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return first, second, rest, angles[..., :half], angles[..., half:]


# -- attention ---------------------------------------------------------------------------------------------------------


def get_fused_attn_backend(is_training, q_type, kv_type, qkv_layout, bias_type, attn_mask_type, softmax_type, *sizes):
    """cuDNN's attention for half precision; none for float32."""
    half = q_type in (DType.kFloat16, DType.kBFloat16)
    return NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen if half else NVTE_Fused_Attn_Backend.NVTE_No_Backend


def fused_attn_fwd(
    max_seqlen_q, max_seqlen_kv, is_training, attn_scale, dropout, fast_zero_fill, qkv_layout, o_format,
    qkv_scale_inv_format, attn_bias_type, attn_mask_type, softmax_type, window_size, bottom_right_diagonal,
    cu_seqlens_q, cu_seqlens_kv, q, k, v, fake_dtype, cu_seqlens_q_padded, cu_seqlens_kv_padded, page_table_k,
    page_table_v, s_quantizer, o_quantizer, attn_bias, softmax_offset, rng_gen, rng_elts_per_thread, return_max_logit,
    cuda_graph,
) -> list:  # fmt: skip
    """[output [T, N, D], log-sum-exp of the scores [T, N, 1], state of the dropout]; causal within every row of q."""
    _check_attention(qkv_layout, attn_mask_type, attn_bias_type, softmax_type, dropout, window_size)
    _check_rows(cu_seqlens_q, cu_seqlens_kv, cu_seqlens_q_padded, max_seqlen_q, max_seqlen_kv)
    _only("fused_attn_fwd", no_FP8_no_pages=s_quantizer is None and o_quantizer is None and page_table_k is None)
    out, lse = torch.zeros_like(q), torch.zeros(*q.shape[:2], 1)
    for tokens, scores in _scores(q, k, cu_seqlens_q, attn_scale):
        sums = scores.logsumexp(-1, keepdim=True)  # [K, N / K, row, 1]
        row = torch.einsum("kgst,tkd->skgd", (scores - sums).exp(), v[tokens].float())
        out[tokens] = row.flatten(1, 2).to(fake_dtype)
        lse[tokens] = sums.permute(2, 0, 1, 3).flatten(1, 2)
    return [out, lse, torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(
    max_seqlen_q, max_seqlen_kv, attn_scale, dropout, fast_zero_fill, qkv_layout, o_format, do_format, dqkv_layout,
    qkv_scale_inv_format, do_scale_inv_format, attn_bias_type, attn_mask_type, softmax_type, window_size,
    bottom_right_diagonal, deterministic, cu_seqlens_q, cu_seqlens_kv, q, k, v, o, d_o, fake_dtype, aux_ctx_tensors,
    cu_seqlens_q_padded, cu_seqlens_kv_padded, s_quantizer, dp_quantizer, dqkv_quantizer, cuda_graph,
) -> list:  # fmt: skip
    """[dq, dk, dv, None, None], from the output and the log-sum-exp as FlashAttention does (arXiv 2307.08691, 3.1)."""
    _check_attention(qkv_layout, attn_mask_type, attn_bias_type, softmax_type, dropout, window_size)
    _check_rows(cu_seqlens_q, cu_seqlens_kv, cu_seqlens_q_padded, max_seqlen_q, max_seqlen_kv)
    lse = aux_ctx_tensors[0]
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for tokens, scores in _scores(q, k, cu_seqlens_q, attn_scale):
        groups = (-1, k.shape[1], q.shape[1] // k.shape[1])
        q_row, k_row, v_row = (x[tokens].float() for x in (q, k, v))
        q_row, do_row, o_row = (x.view(*groups, x.shape[-1]) for x in (q_row, d_o[tokens].float(), o[tokens].float()))
        probs = (scores - lse[tokens].view(*groups, 1).permute(1, 2, 0, 3)).exp()
        d_probs = torch.einsum("skgd,tkd->kgst", do_row, v_row)
        d_scores = probs * (d_probs - (do_row * o_row).sum(-1).permute(1, 2, 0).unsqueeze(-1)) * attn_scale
        dq[tokens] = torch.einsum("kgst,tkd->skgd", d_scores, k_row).flatten(1, 2).to(fake_dtype)
        dk[tokens] = torch.einsum("kgst,skgd->tkd", d_scores, q_row).to(fake_dtype)
        dv[tokens] = torch.einsum("kgst,skgd->tkd", probs, do_row).to(fake_dtype)
    return [dq, dk, dv, None, None]


def _scores(q: Tensor, k: Tensor, cu_seqlens: Tensor, scale: float) -> Iterator[tuple[slice, Tensor]]:
    """(tokens, scaled scores [K, N / K, row, row], minus infinity where a key comes later) of every row."""
    for start, stop in cu_seqlens.unfold(0, 2, 1).tolist():
        tokens = slice(start, stop)
        query = q[tokens].float().view(stop - start, k.shape[1], -1, q.shape[-1])
        scores = torch.einsum("skgd,tkd->kgst", query, k[tokens].float()) * scale
        later = torch.ones(stop - start, stop - start, dtype=torch.bool).triu(1)
        yield tokens, scores.masked_fill(later, float("-inf"))


def _check_attention(layout, mask, bias, softmax, dropout, window) -> None:
    _only(
        "fused attention",
        thd_query_and_key_and_value=layout == "NVTE_QKV_Layout.NVTE_THD_THD_THD",
        causal_mask_within_rows=mask == "NVTE_Mask_Type.NVTE_PADDING_CAUSAL_MASK",
        no_bias=bias == "NVTE_Bias_Type.NVTE_NO_BIAS",
        plain_softmax=softmax == "NVTE_Softmax_Type.NVTE_VANILLA_SOFTMAX",
        no_dropout=dropout == 0.0,
        the_whole_past=tuple(window) == (-1, 0),
    )


def _check_rows(cu_seqlens_q, cu_seqlens_kv, padded, max_seqlen_q, max_seqlen_kv) -> None:
    """What the kernel trusts in: of a row beyond `max_seqlen` it would compute no more."""
    assert cu_seqlens_q.dtype == torch.int32 and cu_seqlens_q.equal(cu_seqlens_kv) and padded.equal(cu_seqlens_q)
    longest = int(cu_seqlens_q.diff().max())
    assert min(max_seqlen_q, max_seqlen_kv) >= longest, f"max_seqlen {max_seqlen_q}, but a row has {longest} tokens"


def convert_thd_to_bshd(tensor: Tensor, cu_seqlens: Tensor, b: int, max_seq_len: int) -> Tensor:
    """[T, ...] -> [B, S, ...], zeros behind each row. Transformer Engine's unfused attention, for float32, wants it."""
    rows = [tensor[start:stop] for start, stop in cu_seqlens.unfold(0, 2, 1).tolist()]
    assert len(rows) == b
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    assert padded.shape[1] <= max_seq_len, f"max_seqlen {max_seq_len}, but a row has {padded.shape[1]} tokens"
    return F.pad(padded, (0, 0) * (tensor.dim() - 1) + (0, max_seq_len - padded.shape[1]))


def convert_bshd_to_thd(tensor: Tensor, cu_seqlens: Tensor, t: int) -> Tensor:
    """[B, S, ...] -> [T, ...]; zeros behind the last row."""
    packed = torch.cat([row[:length] for row, length in zip(tensor, cu_seqlens.diff().tolist(), strict=True)])
    return F.pad(packed, (0, 0) * (tensor.dim() - 2) + (0, t - packed.shape[0]))


# -- lists of tensors --------------------------------------------------------------------------------------------------


def multi_tensor_scale(chunk_size, is_infinite, tensor_lists, scale: float) -> None:
    """The second list becomes the first times `scale`."""
    for given, result in zip(*tensor_lists, strict=True):
        result.copy_(given.float() * scale)


def multi_tensor_scale_tensor(chunk_size, is_infinite, tensor_lists, scale: Tensor) -> None:
    """`multi_tensor_scale` with the factor in a tensor."""
    multi_tensor_scale(chunk_size, is_infinite, tensor_lists, scale.item())


def multi_tensor_l2norm(chunk_size, noop_flag, tensor_lists, per_tensor: bool = False) -> tuple[Tensor, Tensor]:
    """(norm of all elements [1], norms of the tensors, if asked for)."""
    norms = torch.stack([tensor.float().norm() for tensor in tensor_lists[0]])
    return norms.norm().view(1), norms if per_tensor else torch.empty(0)


def multi_tensor_adam(
    chunk_size, noop_flag, tensor_lists, lr, beta1, beta2, eps, step, mode, bias_correction, weight_decay
) -> None:  # fmt: skip
    """One step of AdamW on gradients, weights, first and second moments and, where a fifth list is given, masters.

    With masters the step is theirs, and the weights become their rounded values.
    """
    _only("multi_tensor_adam", decoupled_weight_decay=bool(mode), corrected_moments=bool(bias_correction))
    grads, weights, first, second = tensor_lists[:4]
    masters = tensor_lists[4] if len(tensor_lists) == 5 else weights
    for grad, weight, m, v, master in zip(grads, weights, first, second, masters, strict=True):
        m.copy_(torch.lerp(m.float(), grad.float(), 1 - beta1))
        v.copy_(torch.lerp(v.float(), grad.float().pow(2), 1 - beta2))
        direction = m.float() / (1 - beta1**step) / ((v.float() / (1 - beta2**step)).sqrt() + eps)
        master.copy_(master.float() - lr * (direction + weight_decay * master.float()))
        weight.copy_(master)
