"""The norm of a list of tensors on a GPU without Transformer Engine and apex, without a host read per tensor."""

from __future__ import annotations

import torch
from megatron.core.optimizer import clip_grads
from torch import Tensor


def l2_norm(chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], *_per_tensor) -> tuple[Tensor, None]:
    """(norm of all tensors of `tensor_lists` [1] float32, None), as apex's `multi_tensor_l2norm` returns it."""
    norms = [norm for tensors in tensor_lists for norm in torch._foreach_norm(tensors)]
    return torch.stack(norms).norm().view(1), None


def use_on_gpu() -> None:
    """Let Megatron take `l2_norm` where it would take its own (0.16.1, 0.19.2: utils.py,
    `local_multi_tensor_l2_norm`), which reads the norm of every parameter back from the device."""
    if clip_grads.l2_norm_impl.__name__ == "local_multi_tensor_l2_norm":
        clip_grads.l2_norm_impl = l2_norm
