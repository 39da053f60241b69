"""Optimizer state, and a critic's weights, that wait in host memory while the engine has the GPU.

The copies go through page-locked memory, which the device reaches at the full speed of its link and without the host
waiting for each of them. Tensors keep their identity: only their storage is given up and taken again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class HostOffload:
    """Moves tensors that own their storage to the host and back. A host copy is made once and used again.

    `is_away` is True between a release and its restore, also where a rank had nothing to release.
    """

    def __init__(self) -> None:
        self.is_away = False
        self._host: dict[Tensor, Tensor] = {}
        self._away: list[Tensor] = []

    @torch.no_grad()
    def release(self, tensors: Iterable[Tensor]) -> None:
        """Copy `tensors` to the host and give up their device memory; waits once, for all copies."""
        assert not self.is_away, "the tensors are already on the host"
        self.is_away, self._away = True, list(tensors)
        for tensor in self._away:
            if tensor not in self._host:
                self._host[tensor] = _page_locked_like(tensor)
            self._host[tensor].copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in self._away):
            torch.cuda.synchronize()
        for tensor in self._away:
            assert tensor.storage_offset() == 0 and tensor.untyped_storage().nbytes() == tensor.nbytes
            tensor.untyped_storage().resize_(0)
        if any(tensor.is_cuda for tensor in self._away):
            torch.cuda.empty_cache()

    @torch.no_grad()
    def restore(self) -> None:
        """Bring everything back. The copies are queued like kernels: what is computed next waits for them."""
        for tensor in self._away:
            tensor.untyped_storage().resize_(tensor.nbytes)
            tensor.copy_(self._host[tensor], non_blocking=True)
        self.is_away, self._away = False, []

    def current(self, tensor: Tensor) -> Tensor:
        """`tensor` where its values are now: itself, or its copy on the host."""
        return self._host[tensor] if any(tensor is one for one in self._away) else tensor


def optimizer_tensors(optimizer: torch.optim.Optimizer, *, masters: bool) -> list[Tensor]:
    """Moments of `optimizer` and, with `masters`, its parameters. Without float16 weights these are the model's own.

    Adam's step counts, which torch keeps on the CPU, stay out of it.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    tensors: list[Tensor] = list(parameters) if masters else []
    for parameter in parameters:
        state = optimizer.state.get(parameter, {})
        tensors += [value for name, value in state.items() if name != "step" and isinstance(value, Tensor)]
    return tensors


def blocks_of(chunks: Sequence[torch.nn.Module]) -> tuple[list[Tensor], dict[torch.nn.Parameter, tuple[int, int]]]:
    """The tensors in which the parameters of `chunks`, wrapped in Megatron's DDP, lie: its buffers, or, where it has
    none for them, their own. And for each parameter the number of its tensor and where in it the parameter begins."""
    buffers = [buffer.param_data for chunk in chunks for buffer in chunk.buffers if buffer.param_data is not None]
    blocks = {block.untyped_storage().data_ptr(): number for number, block in enumerate(buffers)}
    place = {}
    for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
        storage = parameter.untyped_storage().data_ptr()
        if storage not in blocks:
            blocks[storage] = len(buffers)
            buffers.append(parameter.detach())
        place[parameter] = blocks[storage], parameter.storage_offset()
    return buffers, place


def _page_locked_like(tensor: Tensor) -> Tensor:
    """Host memory of the shape of `tensor`. torch's own page-locked memory is rounded up to a power of two: up to
    twice the size of an optimizer's state."""
    host = torch.empty_like(tensor, device="cpu")
    if tensor.is_cuda and host.numel():
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.nbytes, 0)))
    return host
