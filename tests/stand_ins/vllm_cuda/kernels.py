"""torch's words for what vLLM 0.24 computes in compiled code: five operators and FlashAttention's two entries.

The signatures of the operators are those of the compiled library, which is loaded: a call that does not fit raises.
Sums are made in float32 and rounded where the kernels round. Attention reads keys and values through the block table.
Collectives go over gloo; NCCL's and vLLM's own all-reduce are switched off.
"""

from __future__ import annotations

from collections import Counter

import torch
import triton.language as tl
from torch import Tensor
from torch.nn.functional import silu

from tests.stand_ins.vllm_cuda.tensors import GPU

# Of FlashAttention: how it computes, not what; scales are those of a quantised cache, 1 where there is none.
IGNORED = {"scheduler_metadata", "num_splits", "q_descale", "k_descale", "v_descale"}
CALLS: Counter[str] = Counter()
_LIBRARIES = []  # torch drops the registrations of a library that is collected


def rms_norm(out: Tensor, x: Tensor, weight: Tensor, epsilon: float) -> None:
    CALLS["rms_norm"] += 1
    out.copy_(_normalised(x, weight, epsilon))


def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> None:
    CALLS["fused_add_rms_norm"] += 1
    residual.copy_(x.float() + residual.float())
    x.copy_(_normalised(residual, weight, epsilon))


def _normalised(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    wide = x.float()
    narrow = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype)
    return narrow if weight is None else narrow * weight


def silu_and_mul(out: Tensor, x: Tensor) -> None:
    CALLS["silu_and_mul"] += 1
    gate, up = x.chunk(2, -1)
    out.copy_(silu(gate.float()).to(x.dtype) * up)


def rotary_embedding(
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool,
    rope_dim_offset: int = 0,
    inverse: bool = False,
) -> None:
    CALLS["rotary_embedding"] += 1
    assert is_neox and rope_dim_offset == 0 and not inverse, "not Qwen2's rotation"
    cos, sin = cos_sin_cache[positions.flatten()].float()[:, None].chunk(2, -1)
    for x in (query, key):
        if x is not None:
            heads = x.view(x.shape[0], -1, head_size)
            first, second = heads.float().chunk(2, -1)
            rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
            heads.copy_(rotated.to(x.dtype))


def reshape_and_cache_flash(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    k_scale: Tensor,
    v_scale: Tensor,
) -> None:
    CALLS["reshape_and_cache_flash"] += 1
    used = slot_mapping >= 0  # padding has -1
    slots = slot_mapping[used]
    block_size = key_cache.shape[1]
    for new, cache in ((key, key_cache), (value, value_cache)):
        cache[slots // block_size, slots % block_size] = new[: len(slot_mapping)][used].to(cache.dtype)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    max_seqlen_q: int,
    cu_seqlens_q: Tensor,
    max_seqlen_k: int,
    seqused_k: Tensor,
    softmax_scale: float,
    causal: bool,
    block_table: Tensor,
    out: Tensor,
    fa_version: int,
    **others,
) -> Tensor:
    """Queries of each sequence against its cached keys and values, block_table[i] being its blocks in order."""
    CALLS[f"flash_attention {fa_version}"] += 1
    plain = {"window_size": (None, (-1, -1), [-1, -1]), "softcap": (0, 0.0)}
    for name, value in others.items():
        if name not in IGNORED:
            assert value in plain.get(name, (None, False)), f"FlashAttention with {name}={value}"
    assert causal
    bounds, lengths = cu_seqlens_q.tolist(), seqused_k.tolist()
    group, block_size = q.shape[1] // k.shape[2], k.shape[1]
    for i, length in enumerate(lengths):
        num_queries = bounds[i + 1] - bounds[i]
        if num_queries == 0 or length == 0 or length > block_table.shape[1] * block_size:  # the last: a dummy run's
            continue
        blocks = block_table[i, : -(-length // block_size)].long()
        keys, values = (
            cache[blocks].flatten(0, 1)[:length].float().repeat_interleave(group, 1).transpose(0, 1) for cache in (k, v)
        )
        queries = q[bounds[i] : bounds[i + 1]].float().transpose(0, 1)
        scores = queries @ keys.transpose(1, 2) * softmax_scale
        seen = torch.ones(num_queries, length, dtype=torch.bool, device=q.device).tril(length - num_queries)
        answer = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values
        out[bounds[i] : bounds[i + 1]] = answer.transpose(0, 1).to(out.dtype)
    return out


def get_scheduler_metadata(*, batch_size: int, **others) -> Tensor:
    return torch.zeros(batch_size + 1, dtype=torch.int32, device="cuda")


class _Off:
    """A communicator that leaves everything to torch.distributed."""

    disabled = True

    def __init__(self, group, *args, **kwargs):
        self.world_size = group.size()

    def should_use_symm_mem(self, x: Tensor) -> bool:
        return False

    def destroy(self) -> None: ...


def _seen_by_device(tensor: Tensor) -> Tensor:
    """Host memory under a device address, as unified addressing gives it: the same bytes."""
    with torch._C.DisableTorchFunctionSubclass():
        view = torch.from_numpy(tensor.numpy())
    GPU.add(view)
    return view


class _Libdevice:
    """CUDA's mathematical functions that vLLM's sampling kernel takes; Triton's interpreter has none of them."""

    @staticmethod
    def log(x):
        return tl.log(x)

    @staticmethod
    def log1p(x):
        return tl.log(1.0 + x)


def connect() -> None:
    """Register the references, replace FlashAttention's functions, and make gloo the device's backend."""
    import vllm._C_stable_libtorch  # noqa: F401  signatures
    import vllm.distributed.device_communicators.custom_all_reduce as custom_all_reduce
    import vllm.distributed.device_communicators.pynccl as pynccl
    import vllm.distributed.device_communicators.symm_mem as symm_mem
    import vllm.v1.attention.backends.flash_attn as flash_attn
    import vllm.v1.worker.gpu.buffer_utils as buffer_utils
    import vllm.v1.worker.gpu.sample.gumbel as gumbel
    from vllm.platforms import current_platform

    for namespace, functions in {
        "_C": (rms_norm, fused_add_rms_norm, silu_and_mul, rotary_embedding),
        "_C_cache_ops": (reshape_and_cache_flash,),
    }.items():
        library = torch.library.Library(namespace, "IMPL")
        for function in functions:
            library.impl(function.__name__, function, "CPU")
        _LIBRARIES.append(library)
    flash_attn.flash_attn_varlen_func = flash_attn_varlen_func
    flash_attn.get_scheduler_metadata = get_scheduler_metadata
    buffer_utils.get_accelerator_view_from_cpu_tensor = _seen_by_device
    gumbel.tldevice = _Libdevice
    type(current_platform).dist_backend = "gloo"
    pynccl.PyNcclCommunicator = custom_all_reduce.CustomAllreduce = symm_mem.SymmMemCommunicator = _Off
