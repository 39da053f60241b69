"""The arithmetic of the head on a GPU, one kernel per call: Triton's for a tile of logits, cuBLAS's for a product.

`logprob.py` cuts the tiles, multiplies them out and brings the ranks together; nothing here knows of either. PyTorch's
own operators need about thirty kernels per tile, and each reads or writes all of it. Here a tile is read once in the
forward pass, and in the backward pass read once and written once in the dtype of the head: of 64 MiB in float32 these
are 64 and 96 MiB, so not less than 20 and 30 microseconds at the 3.35 TB/s of an H100's memory. That is a bound by
arithmetic; it has not been measured.

Every function is an operator of the torch library `remax_megatron`, so that fake tensors and profilers see one call of
one name. logits_RV is a tile before its division by the temperature, float32 and contiguous; `first` is the token of
its first column. Sums and factors have one row per quantity and one column per position, float32; a slice of their
columns will do. What is written is written in place.

Importing this file needs Triton (tried with 3.6), which PyTorch's CUDA builds bring along. With TRITON_INTERPRET=1 in
the environment before the import, the kernels run on CPU tensors, slowly: see tests/algorithm/test_logprob_triton.py.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (Triton takes an annotation of a kernel's parameter for code of the kernel.)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns that a program holds in registers at a time: 16 for each thread of 8 warps, in four loads of 16 bytes.
_BLOCK, _NUM_WARPS = 4096, 8
# What stands beyond the last column: below any logit, so that its exp is 0; finite, so that 0 times it is 0.
_FAR = tl.constexpr(-1e30)

_LIBRARY = torch.library.Library("remax_megatron", "DEF")


def _operator(schema: str) -> Callable[[Callable[..., None]], Any]:
    """Make a function that returns nothing an operator; on fake tensors it does nothing."""

    # Defined this way, a call costs the CPU 5 microseconds; with torch.library.custom_op it is 24 (PyTorch 2.11).
    def register(function: Callable[..., None]) -> Any:
        name = _LIBRARY.define(f"{function.__name__}({schema}) -> ()")
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"remax_megatron::{name}", lambda *_: None, lib=_LIBRARY)
        return getattr(torch.ops.remax_megatron, name).default

    return register


@_operator("Tensor logits_RV, Tensor target_R, Tensor(a!) sums_4R, int first, float temperature")
def add_tile(logits_RV: Tensor, target_R: Tensor, sums_4R: Tensor, first: int, temperature: float) -> None:
    """Take a tile into (peak, sum of exp(l - peak), sum of exp(l - peak) (l - peak), the target's logit)."""
    num, width = logits_RV.shape
    _add_tile_kernel[(num,)](
        logits_RV,
        target_R,
        sums_4R,
        width,
        sums_4R.stride(0),
        first,
        1 / temperature,
        _block(width),
        num_warps=_NUM_WARPS,
    )


@_operator("Tensor logits_RV, Tensor target_R, Tensor factors_4R, int first, float temperature, Tensor(a!) gradient_RV")
def tile_gradient(
    logits_RV: Tensor, target_R: Tensor, factors_4R: Tensor, first: int, temperature: float, gradient_RV: Tensor
) -> None:
    """Write p (slope log p + offset) + hit [column is the target] into gradient_RV.

    The columns of logits_RV, which `temperature` divides, are those of the vocabulary from `first` on, and target_R
    counts in all of it; factors_4R holds (log z, slope, offset, hit).
    """
    num, width = logits_RV.shape
    block = _block(width)
    _tile_gradient_kernel[(num, triton.cdiv(width, block))](
        logits_RV,
        target_R,
        factors_4R,
        gradient_RV,
        width,
        factors_4R.stride(0),
        first,
        1 / temperature,
        block,
        num_warps=_NUM_WARPS,
    )


@_operator("Tensor logits_RV, Tensor ref_logits_RV, Tensor(a!) sums_5R, float temperature")
def add_kl_tile(logits_RV: Tensor, ref_logits_RV: Tensor, sums_5R: Tensor, temperature: float) -> None:
    """Take two tiles into (peak, ref_peak, sums of exp(l - peak) of either, sum of exp(l - peak) (l - ref_l))."""
    num, width = logits_RV.shape
    _add_kl_tile_kernel[(num,)](
        logits_RV,
        ref_logits_RV,
        sums_5R,
        width,
        sums_5R.stride(0),
        1 / temperature,
        _block(width),
        num_warps=_NUM_WARPS,
    )


@_operator("Tensor logits_RV, Tensor ref_logits_RV, Tensor factors_3R, float temperature, Tensor(a!) gradient_RV")
def kl_tile_gradient(
    logits_RV: Tensor, ref_logits_RV: Tensor, factors_3R: Tensor, temperature: float, gradient_RV: Tensor
) -> None:
    """Write p (l - ref_l + shift) scale; the factors are (log z, shift, scale)."""
    num, width = logits_RV.shape
    block = _block(width)
    _kl_tile_gradient_kernel[(num, triton.cdiv(width, block))](
        logits_RV,
        ref_logits_RV,
        factors_3R,
        gradient_RV,
        width,
        factors_3R.stride(0),
        1 / temperature,
        block,
        num_warps=_NUM_WARPS,
    )


@_operator("Tensor(a!) sum_MN, Tensor a_MK, Tensor b_KN")
def add_product(sum_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
    """sum_MN += a_MK @ b_KN, with a float32 sum of bfloat16 operands on a GPU.

    An operator, because PyTorch 2.11 has no fake `addmm` with out_dtype: its decomposition takes it for `beta`.
    """
    if a_MK.is_cuda and a_MK.dtype != sum_MN.dtype:
        torch.addmm(sum_MN, a_MK, b_KN, out_dtype=sum_MN.dtype, out=sum_MN)
    else:
        sum_MN.addmm_(a_MK.to(sum_MN.dtype), b_KN.to(sum_MN.dtype))


def _block(width: int) -> int:
    return min(_BLOCK, triton.next_power_of_2(width))


@triton.jit(do_not_specialize=["first"])
def _add_tile_kernel(logits, target, sums, width, stride, first, inverse, BLOCK: tl.constexpr):
    """A program takes a position, block after block; the sums follow a peak that grows (arXiv 1805.02867).

    `logits` has rows of `width` columns, the vocabulary's from `first` on; `target` is a token id of each; `sums` has
    rows that are `stride` apart; `inverse` is 1 / temperature; BLOCK columns are computed at once.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * width
    sums += row
    peak, z, weighted = tl.load(sums), tl.load(sums + stride), tl.load(sums + 2 * stride)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        real = column < width
        logit = tl.load(logits + column, mask=real, other=_FAR) * inverse
        higher = tl.maximum(peak, tl.max(logit, axis=0))
        decay = peak - higher
        peak = higher
        z *= tl.exp(decay)
        weighted = weighted * tl.exp(decay) + decay * z
        exp = tl.exp(logit - peak)
        z += tl.sum(exp, axis=0)
        weighted += tl.sum(exp * (logit - peak), axis=0)
    tl.store(sums, peak)
    tl.store(sums + stride, z)
    tl.store(sums + 2 * stride, weighted)
    index = tl.load(target + row) - first
    if (index >= 0) & (index < width):
        tl.store(sums + 3 * stride, tl.load(logits + index) * inverse)


@triton.jit(do_not_specialize=["first"])
def _tile_gradient_kernel(
    logits,
    target,
    factors,
    gradient,
    width,
    stride,
    first,
    inverse,
    BLOCK: tl.constexpr,
):
    """A program takes BLOCK columns of a position and writes their `gradient`.

    `logits` and the other arguments are those of `_add_tile_kernel`, with `factors` for `sums`: `target`, `width`,
    `stride`, `first`, `inverse`.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < width
    factors += row
    log_z, slope = tl.load(factors), tl.load(factors + stride)
    offset, hit = tl.load(factors + 2 * stride), tl.load(factors + 3 * stride)
    log_p = tl.load(logits + row * width + column, mask=real, other=0.0) * inverse - log_z
    result = tl.exp(log_p) * (log_p * slope + offset)
    result += tl.where(column == tl.load(target + row) - first, hit, 0.0)
    tl.store(gradient + row * width + column, result.to(gradient.dtype.element_ty), mask=real)


@triton.jit
def _add_kl_tile_kernel(logits, ref_logits, sums, width, stride, inverse, BLOCK: tl.constexpr):
    """A program takes a position, block after block.

    `logits` and `ref_logits` have rows of `width` columns, `sums` rows that are `stride` apart; `inverse` is 1 /
    temperature; BLOCK columns are computed at once.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * width
    ref_logits += row * width
    sums += row
    peak, ref_peak = tl.load(sums), tl.load(sums + stride)
    z, ref_z = tl.load(sums + 2 * stride), tl.load(sums + 3 * stride)
    weighted = tl.load(sums + 4 * stride)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        real = column < width
        logit = tl.load(logits + column, mask=real, other=_FAR) * inverse
        ref_logit = tl.load(ref_logits + column, mask=real, other=_FAR) * inverse
        higher = tl.maximum(peak, tl.max(logit, axis=0))
        ref_higher = tl.maximum(ref_peak, tl.max(ref_logit, axis=0))
        exp = tl.exp(logit - higher)
        z = z * tl.exp(peak - higher) + tl.sum(exp, axis=0)
        ref_z = ref_z * tl.exp(ref_peak - ref_higher) + tl.sum(tl.exp(ref_logit - ref_higher), axis=0)
        weighted *= tl.exp(peak - higher)
        weighted += tl.sum(exp * (logit - ref_logit), axis=0)
        peak, ref_peak = higher, ref_higher
    tl.store(sums, peak)
    tl.store(sums + stride, ref_peak)
    tl.store(sums + 2 * stride, z)
    tl.store(sums + 3 * stride, ref_z)
    tl.store(sums + 4 * stride, weighted)


@triton.jit
def _kl_tile_gradient_kernel(
    logits,
    ref_logits,
    factors,
    gradient,
    width,
    stride,
    inverse,
    BLOCK: tl.constexpr,
):
    """A program takes BLOCK columns of a position and writes their `gradient`.

    `logits`, `ref_logits` and the other arguments are those of `_add_kl_tile_kernel`, with `factors` for `sums`:
    `width`, `stride`, `inverse`.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < width
    factors += row
    log_z, shift, scale = tl.load(factors), tl.load(factors + stride), tl.load(factors + 2 * stride)
    logit = tl.load(logits + row * width + column, mask=real, other=0.0) * inverse
    ref_logit = tl.load(ref_logits + row * width + column, mask=real, other=0.0) * inverse
    result = tl.exp(logit - log_z) * (logit - ref_logit + shift) * scale
    tl.store(gradient + row * width + column, result.to(gradient.dtype.element_ty), mask=real)
