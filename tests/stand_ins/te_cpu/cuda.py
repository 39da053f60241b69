"""What Transformer Engine's modules see of CUDA: one H100 whose memory is the CPU's."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from unittest import mock

import torch

_H100 = types.SimpleNamespace(name="H100, a CPU in its place", major=9, minor=0, multi_processor_count=132)
_FACTORIES = ("arange", "empty", "full", "ones", "rand", "tensor", "zeros")


class _Cuda(types.ModuleType):
    """`torch.cuda` on that machine."""

    def __getattr__(self, name: str):
        return getattr(torch.cuda, name)

    def is_available(self) -> bool:
        return True

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device=None) -> types.SimpleNamespace:
        return _H100

    def get_device_capability(self, device=None) -> tuple[int, int]:
        return _H100.major, _H100.minor

    def is_current_stream_capturing(self) -> bool:
        return False


class TorchOnCpu(types.ModuleType):
    """`torch` on that machine: tensors asked for on "cuda" are made on the CPU."""

    cuda = _Cuda("torch.cuda")

    def __getattr__(self, name: str):
        found = getattr(torch, name)
        return _on_cpu(found) if name in _FACTORIES else found


def _on_cpu(factory: Callable) -> Callable:
    @functools.wraps(factory)
    def make(*args, **kwargs):
        return factory(*args, **kwargs | ({"device": "cpu"} if kwargs.get("device") == "cuda" else {}))

    return make


def claiming_cuda(method: Callable) -> Callable:
    """`method`, during which every tensor says that it lies on CUDA: Transformer Engine refuses others at its door."""

    @functools.wraps(method)
    def call(*args, **kwargs):
        with mock.patch.object(torch.Tensor, "is_cuda", True):
            return method(*args, **kwargs)

    return call
