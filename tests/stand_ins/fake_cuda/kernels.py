"""Kernels that fake tensors cannot pass through, by what they return and keep for their backward pass.

torch.compile, Triton kernels, torch's scaled-dot-product attention (which without a driver takes the plain path, with
its matrix of scores), flex attention and its block mask.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # it would trace fake tensors of fake tensors

_recorder: Any = None


def record_into(recorder: Any) -> None:
    """Kernels count there from now on."""
    global _recorder
    _recorder = recorder


def one_kernel(name: str) -> AbstractContextManager[None]:
    """What runs inside is one kernel."""
    return nullcontext() if _recorder is None else _recorder.one_kernel(name)


def replace_compilers() -> None:
    """To be called before Megatron is imported, which decorates functions with torch.compile: what is compiled is one
    kernel, and so is a launch of a Triton kernel."""
    torch.compile = _compile
    from triton.runtime.jit import JITFunction

    JITFunction.run = lambda function, *args, **kwargs: _recorder.kernel(f"triton {function.__name__}")


def replace_attention() -> None:
    """To be called once the project's attention is imported."""
    from remax_megatron.model import attention

    attention._block_mask = _block_mask
    attention._flex_attention = lambda compiled: _flex_attention
    torch.nn.functional.scaled_dot_product_attention = _sdpa


def _compile(function: Callable | None = None, **options: Any) -> Callable:
    if function is None:
        return functools.partial(_compile, **options)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with one_kernel(f"compiled {function.__name__}"):
            return function(*args, **kwargs)

    return call


class _Attention(torch.autograd.Function):
    """A flash kernel: it keeps q, k, v, its result and a float32 per head and row; backward is one kernel, too."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with one_kernel("attention"):
            out, log_sum = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, log_sum)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, _ = ctx.saved_tensors
        assert grad.shape == out.shape and grad.dtype == out.dtype, (grad.shape, out.shape, grad.dtype, out.dtype)
        with one_kernel("attention backward"):
            return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    assert q.dtype == k.dtype == v.dtype and (enable_gqa or q.shape[1] == k.shape[1]), (q.dtype, q.shape, k.shape)
    assert attn_mask is None or attn_mask.device == q.device, "the mask lies on another device"
    return _Attention.apply(q, k, v)


def _flex_attention(q: Tensor, k: Tensor, v: Tensor, *, block_mask: Any, scale: Any, enable_gqa: bool) -> Tensor:
    assert q.shape[2] == k.shape[2] == v.shape[2] and q.device == k.device == block_mask[0].device
    return _sdpa(q, k, v, enable_gqa=enable_gqa)


def _block_mask(segments: list[tuple[int, list[int]]], total: int, device: torch.device) -> list[Tensor]:
    """The eight int32 tensors of torch's BlockMask with its blocks of 128 x 128."""
    assert sum(prompt + sum(answers) for prompt, answers in segments) == total, (segments, total)
    blocks = -(-total // 128)
    shapes = [(1, 1, blocks), (1, 1, blocks, blocks)] * 4
    return [torch.empty(shape, dtype=torch.int32, device=device) for shape in shapes]
