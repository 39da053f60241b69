"""A CUDA device without a GPU: `become_cuda()` turns this process into a rank on torch.device("cuda", 0).

Tensors are torch's fake ones: shapes, types, devices, storages and autograd are real, values are not, and nothing is
computed. The process group has any size, its other ranks do not exist. What is changed in torch stays changed: a
process plays one rank and ends (see processes.py).

torch 2.11 (CUDA build) on Linux x86-64.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # registers functions of torch.cuda one by one, so it has to come before they are replaced
import torch.distributed as dist
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from tests.stand_ins.fake_cuda.recorder import Recorder

CAPABILITY = (9, 0)  # H100
CAPACITY_BYTES = 80 * 10**9
_keep_alive: list[Any] = []  # what C++ points to


def become_cuda(rank: int, world_size: int) -> Recorder:
    """Enter the fake device for good; returns the record of what happens on it."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    recorder = Recorder()
    _let_autograd_start()
    _replace_cuda(recorder)
    _replace_process_groups(recorder)
    _replace_host_reads(recorder)
    _treat_fakes_as_plain(recorder)
    FakeTensorMode(allow_non_fake_inputs=True).__enter__()
    recorder.__enter__()
    return recorder


def _let_autograd_start() -> None:
    """Autograd asks whether the device has a CUDA context, which raises without a driver: let the answer be no.

    The question is the fifth virtual function of at::CUDAHooksInterface (two destructors, isBuilt, isAvailable,
    hasPrimaryContext): torch 2.11, ATen/detail/AcceleratorHooksInterface.h.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    get_hooks = library._ZN2at6detail12getCUDAHooksEv
    get_hooks.restype = ctypes.c_void_p
    table = ctypes.c_void_p.from_address(get_hooks()).value
    assert table is not None
    slot, page = table + 4 * ctypes.sizeof(ctypes.c_void_p), os.sysconf("SC_PAGE_SIZE")
    answer_no = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int8)(lambda hooks, index: False)
    _keep_alive.append(answer_no)
    read_write = 1 | 2  # PROT_READ | PROT_WRITE
    failed = ctypes.CDLL(None).mprotect(ctypes.c_void_p(slot // page * page), ctypes.c_size_t(2 * page), read_write)
    assert not failed, "mprotect"
    ctypes.c_void_p.from_address(slot).value = ctypes.cast(answer_no, ctypes.c_void_p).value


# -- torch.cuda --------------------------------------------------------------------------------------------------------


class _Event:
    """An event that has always happened already; waiting for it on the host is still a wait."""

    recorder: Recorder

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.recorder.sync("Event.synchronize")

    def elapsed_time(self, end: Any) -> float:
        return 1.0


class _Stream:
    """A stream in name: all work is done in the order in which it is asked for."""

    recorder: Recorder
    cuda_stream = 0
    device = torch.device("cuda", 0)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *error: object) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def synchronize(self) -> None:
        self.recorder.sync("Stream.synchronize")


class _Generator:
    """The device's random numbers, as far as their state is read and set."""

    def __init__(self) -> None:
        self._state = torch.zeros(16, dtype=torch.uint8)

    def get_state(self) -> torch.Tensor:
        return self._state.clone()

    def set_state(self, state: torch.Tensor) -> None:
        self._state = state

    def clone_state(self) -> _Generator:
        return self

    def manual_seed(self, seed: int) -> _Generator:
        return self

    def initial_seed(self) -> int:
        return 0

    graphsafe_get_state = clone_state

    def graphsafe_set_state(self, state: Any) -> None: ...


def _replace_cuda(recorder: Recorder) -> None:
    cuda = torch.cuda
    _Event.recorder = _Stream.recorder = recorder
    generator, stream = _Generator(), _Stream()
    nothing: Callable[..., None] = lambda *args, **kwargs: None  # noqa: E731
    functions = {
        "_lazy_init": nothing,
        "_lazy_call": lambda call, **kwargs: call(),
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": nothing,
        "get_device_name": lambda device=None: "fake H100",
        "get_device_capability": lambda device=None: CAPABILITY,
        "mem_get_info": lambda device=None: (CAPACITY_BYTES - recorder.live_bytes, CAPACITY_BYTES),
        "memory_allocated": lambda device=None: recorder.live_bytes,
        "memory_reserved": lambda device=None: recorder.live_bytes,
        "max_memory_allocated": lambda device=None: recorder.now.peak_bytes,
        "max_memory_reserved": lambda device=None: recorder.now.peak_bytes,
        "reset_peak_memory_stats": nothing,
        "empty_cache": nothing,
        "synchronize": lambda device=None: recorder.sync("torch.cuda.synchronize"),
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "stream": lambda chosen: chosen or stream,
        "set_stream": nothing,
        "is_current_stream_capturing": lambda: False,
        "manual_seed": nothing,
        "manual_seed_all": nothing,
        "Stream": _Stream,
        "Event": _Event,
        "default_generators": (generator,),
    }
    for name, value in functions.items():
        setattr(cuda, name, value)
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda device="cuda": generator.get_state()
        module.set_rng_state = lambda state, device="cuda": generator.set_state(state)
    torch.Tensor.record_stream = nothing


# -- process groups ----------------------------------------------------------------------------------------------------


def _replace_process_groups(recorder: Recorder) -> None:
    """NCCL's groups by torch's fake backend. Objects travel as if all ranks had sent what this one sends."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    real_init = dist.init_process_group

    def init_process_group(backend: str, *, rank: int, world_size: int, timeout: Any = None) -> None:
        assert backend == "nccl", f"on a GPU the backend is nccl, not {backend}"
        real_init("fake", rank=rank, world_size=world_size, store=FakeStore())

    def note(name: str, group: Any, source: int | None = None) -> None:
        recorder.sync(name)
        recorder.collective(name, tuple(dist.get_process_group_ranks(group or dist.group.WORLD)), source, [])

    def all_gather_object(parts: list, mine: Any, group: Any = None) -> None:
        note("all_gather_object", group)
        parts[:] = [mine] * len(parts)

    def gather_object(
        obj: Any, object_gather_list: list | None = None, dst: int | None = None, group: Any = None
    ) -> None:
        note("gather_object", group, dst)
        if object_gather_list is not None:
            object_gather_list[:] = [obj] * len(object_gather_list)

    def broadcast_object_list(objects: list, src: int | None = None, group: Any = None, **kwargs: Any) -> None:
        note("broadcast_object_list", group, src)

    def barrier(group: Any = None, **kwargs: Any) -> None:
        note("barrier", group)

    def batch_isend_irecv(operations: Sequence[Any]) -> list:
        with recorder.batch():
            return [one.op(one.tensor, one.peer, one.group) for one in operations]

    replaced = (init_process_group, all_gather_object, gather_object, broadcast_object_list, barrier, batch_isend_irecv)
    for function in replaced:
        setattr(dist, function.__name__, function)


# -- host reads, and code that looks at the type of a tensor -----------------------------------------------------------


def _replace_host_reads(recorder: Recorder) -> None:
    """`tolist`, and lists of device tensors given to torch.tensor, never come to a dispatch mode."""

    def tolist(tensor: torch.Tensor) -> Any:
        if tensor.device.type == "cpu" and getattr(tensor, "constant", None) is not None:
            with _disable_current_modes():
                return tensor.constant.tolist()
        if tensor.device.type == "cuda":
            recorder.sync("tolist")
        return recorder.read(tensor.shape, tensor.dtype)

    def read(data: Any) -> Any:
        if isinstance(data, FakeTensor):
            return data.tolist()
        return [read(one) for one in data] if isinstance(data, (list, tuple)) else data

    real_tensor = torch.tensor

    def tensor(data: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return real_tensor(read(data) if isinstance(data, (list, tuple)) else data, *args, **kwargs)

    FakeTensor.tolist = tolist
    torch.tensor = tensor


def _treat_fakes_as_plain(recorder: Recorder) -> None:
    """Where torch asks for the exact type of a tensor, or for the device of its (unreal) storage."""
    from torch.optim import optimizer
    from torch.utils import _foreach_utils

    for module in (optimizer, _foreach_utils):
        if FakeTensor not in (plain := getattr(module, "_foreach_supported_types", [FakeTensor])):
            plain.append(FakeTensor)

    data = torch._C.TensorBase.data

    def set_data(tensor: torch.Tensor, value: torch.Tensor) -> None:
        """On a GPU `x.data = y` takes y's device; a fake tensor keeps its own unless told."""
        data.__set__(tensor, value)
        if isinstance(tensor, FakeTensor) and isinstance(value, FakeTensor):
            tensor.fake_device = value.fake_device

    def apply(module: torch.nn.Module, function: Callable, recurse: bool = True) -> torch.nn.Module:
        """Module.to and its kin: torch swaps fake parameters for new objects, a GPU's parameters stay the objects
        that optimizers and buffers know."""
        for part in module.modules():
            for parameter in part._parameters.values():
                if parameter is not None:
                    with torch.no_grad():
                        parameter.data = function(parameter)
                        if parameter.grad is not None:
                            parameter.grad.data = function(parameter.grad)
            for name, buffer in part._buffers.items():
                part._buffers[name] = None if buffer is None else function(buffer)
        return module

    real_resize = torch.UntypedStorage.resize_

    def resize(storage: torch.UntypedStorage, num_bytes: int) -> None:
        real_resize(storage, num_bytes)
        recorder.resized(storage)

    fake_tensor.init_gpu_context = lambda device: None  # it would make a real tensor where CUDA says it is there
    FakeTensor.data = property(data.__get__, set_data)
    torch.nn.Module._apply = apply
    torch.UntypedStorage.resize_ = resize
