"""Transformer Engine's own Python layers on fake CUDA tensors: each call of its compiled half is one kernel.

The results of a call exist as memory, what happens inside the kernel does not. Names, arguments and the way Transformer
Engine is loaded are those of tests/stand_ins/te_cpu, which computes real values on a CPU.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tests.stand_ins.fake_cuda import kernels
from tests.stand_ins.te_cpu import compiled, cuda, load

WORKSPACE_BYTES = 32 * 2**20  # what cuBLASLt on Hopper asks of every product
_KERNELS: dict[str, Callable] = {}


def install() -> None:
    """To be called before Megatron is imported."""
    for name, function in _KERNELS.items():
        setattr(compiled, name, function)
    cuda.TorchOnCpu = _TorchOnFakeCuda
    cuda.claiming_cuda = lambda method: method  # here tensors do lie on CUDA
    # Fake storages all begin at 0, and Transformer Engine compares addresses to see whether q, k and v are one tensor.
    torch.UntypedStorage.data_ptr = lambda storage: storage._cdata
    load.install()
    from transformer_engine.pytorch.attention.dot_product_attention import utils

    real_choice = utils.get_attention_backend

    def get_attention_backend(asked: Any) -> tuple:
        """It refuses classes other than torch.Tensor, which a GPU's tensors are."""
        assert asked.qkv_type is FakeTensor, asked.qkv_type
        return real_choice(dataclasses.replace(asked, qkv_type=Tensor))

    utils.get_attention_backend = get_attention_backend


class _FakeCuda(types.ModuleType):
    """`torch.cuda` as device.py made it, which also says that it is there and what it is.

    The rest of torch must not hear that: it would look for the driver.
    """

    is_available = staticmethod(lambda: True)
    get_device_properties = staticmethod(lambda device=None: cuda._H100)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _TorchOnFakeCuda(types.ModuleType):
    """`torch` as Transformer Engine's modules see it."""

    cuda = _FakeCuda("torch.cuda")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _kernel(function: Callable) -> Callable:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with kernels.one_kernel(f"te {function.__name__}"):
            return function(*args, **kwargs)

    _KERNELS[function.__name__] = call
    return call


@_kernel
def generic_gemm(
    A: Tensor, transa: bool, B: Tensor, transb: bool, out: Tensor | None, quantizer: Any, out_dtype: Any,
    bias: Tensor | None, bias_dtype: Any, gelu: bool, gelu_in: Any, grad: bool, workspace: Tensor, workspace_size: int,
    accumulate: bool, use_split_accumulator: bool, comm_overlap: Any = None, comm_type: Any = None,
    extra_output: Any = None, bulk_overlap: bool = False, alpha: float = 1.0, beta: float | None = None,
) -> list:  # fmt: skip
    assert A.is_cuda and B.is_cuda and A.is_contiguous() and B.is_contiguous() and A.dtype == B.dtype
    assert workspace.is_cuda and workspace_size >= WORKSPACE_BYTES, workspace_size
    dtype = A.dtype if out_dtype is None else compiled.TORCH_TYPE[out_dtype]
    (rows_a, columns_a), (rows_b, columns_b) = ((math.prod(t.shape[:-1]), t.shape[-1]) for t in (A, B))
    columns, inner = (rows_a, columns_a) if transa else (columns_a, rows_a)
    rows, inner_b = (columns_b, rows_b) if transb else (rows_b, columns_b)
    assert inner == inner_b, (A.shape, transa, B.shape, transb)
    if out is None:
        out = A.new_empty(*((rows,) if transb else B.shape[:-1]), columns, dtype=dtype)
    assert out.dtype == dtype and out.is_contiguous() and out.numel() == rows * columns, (out.shape, rows, columns)
    return [out, B.new_empty(columns_b, dtype=dtype) if bias is not None and grad else None, None, None]


@_kernel
def rmsnorm_fwd(
    input: Tensor, weight: Tensor, eps: float, ln_out: Tensor | None, quantizer: Any, otype: Any, sm_margin: int,
    zero_centered_gamma: bool,
) -> list:  # fmt: skip
    assert input.is_cuda and weight.is_cuda and quantizer is None
    out = torch.empty_like(input, dtype=compiled.TORCH_TYPE[otype]) if ln_out is None else ln_out
    return [out, None, input.new_empty(input.numel() // input.shape[-1], dtype=torch.float32)]


@_kernel
def rmsnorm_bwd(
    dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> list:
    assert dz.dtype == x.dtype and dz.shape == x.shape
    return [torch.empty_like(x), torch.empty_like(gamma)]


def _turned(x: Tensor, freqs: Tensor, start_positions: Any, qkv_format: Any, interleaved: bool, *rest: Any) -> Tensor:
    assert x.is_cuda and freqs.is_cuda and freqs.dtype == torch.float32 and start_positions is None and not interleaved
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@_kernel
def fused_rope_forward(*args: Any) -> Tensor:
    return _turned(*args)


@_kernel
def fused_rope_backward(*args: Any) -> Tensor:
    return _turned(*args)


@_kernel
def fused_attn_fwd(
    max_q: int, max_kv: int, is_training: bool, scale: float, dropout: float, fill: bool, layout: Any, *rest: Any
) -> list:
    cu_seqlens, _, q, k, v = rest[7:12]
    assert isinstance(max_q, int) and isinstance(max_kv, int), "the longest row would be read back from the device"
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.is_cuda and q.dtype == k.dtype == v.dtype
    assert str(layout).endswith("THD_THD_THD"), layout
    out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)
    if not is_training:
        return [out]
    return [out, q.new_empty(*q.shape[:2], 1, dtype=torch.float32), q.new_empty(2, dtype=torch.int64)]


@_kernel
def fused_attn_bwd(*args: Any) -> list:
    q, k, v, out, grad = args[19:24]
    assert grad.shape == out.shape and grad.dtype == q.dtype, (grad.shape, out.shape, grad.dtype, q.dtype)
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v)] + [None, None]


@_kernel
def convert_thd_to_bshd(tensor: Tensor, cu_seqlens: Tensor, b: int, max_seq_len: int) -> Tensor:
    return tensor.new_empty(b, max_seq_len, *tensor.shape[1:])


@_kernel
def convert_bshd_to_thd(tensor: Tensor, cu_seqlens: Tensor, t: int) -> Tensor:
    return tensor.new_empty(t, *tensor.shape[2:])


def _check_lists(lists: list[list[Tensor]]) -> None:
    assert all(tensor.is_cuda for one in lists for tensor in one), "a list of tensors is not on the device"


@_kernel
def multi_tensor_scale(chunk_size: int, is_infinite: Tensor, tensor_lists: list, scale: float) -> None:
    _check_lists(tensor_lists)


@_kernel
def multi_tensor_scale_tensor(chunk_size: int, is_infinite: Tensor, tensor_lists: list, scale: Tensor) -> None:
    _check_lists(tensor_lists)


@_kernel
def multi_tensor_l2norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list, per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    _check_lists(tensor_lists)
    device = tensor_lists[0][0].device
    return torch.empty(1, device=device), torch.empty(len(tensor_lists[0]) if per_tensor else 0, device=device)


@_kernel
def multi_tensor_adam(chunk_size: int, noop_flag: Tensor, tensor_lists: list, *numbers: Any) -> None:
    assert isinstance(numbers[4], int), f"the step would be read back from the device: {type(numbers[4])}"
    _check_lists(tensor_lists)
