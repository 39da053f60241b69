"""The device: "cuda" tensors whose storage is host memory.

A storage is on the device when a factory was asked for cuda, when a tensor was moved there, or when an operator read
a tensor of the device. `Tensor.device` and `is_cuda` say so; `.to`, `.cpu`, `.cuda` and `copy_` across the border
copy. An operator that mixes tensors of both (other than copies, and numbers without dimensions) is an error here as
on a GPU. There are no streams: all work is done when a call returns.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
# Operators that may read one device and write the other.
CROSSING = {"copy_", "_to_copy", "index_put_", "set_", "_local_scalar_dense"}
_real_device = Tensor.device.__get__


@dataclass
class Block:
    """A storage on the device, and the pool of the sleep allocator that it came from ("" for none)."""

    storage: weakref.ref
    num_bytes: int
    pool: str


@dataclass
class Device:
    """What is on the device. `events` has the calls to the allocator and the device, in order."""

    memory_bytes: int = 2**30
    blocks: dict[int, Block] = field(default_factory=dict)
    pool: str = ""
    asleep: set[int] = field(default_factory=set)
    events: list[str] = field(default_factory=list)
    used_bytes: int = 0
    peak_bytes: int = 0  # since the test set it to 0

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.blocks:
            return
        self.blocks[storage._cdata] = Block(weakref.ref(storage), storage.nbytes(), self.pool)
        self.used_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, key: int) -> None:
        block = self.blocks.pop(key)
        if key not in self.asleep:
            self.used_bytes -= block.num_bytes
        self.asleep.discard(key)

    def holds(self, tensor: Tensor) -> bool:
        return _real_device(tensor).type == "cpu" and tensor.untyped_storage()._cdata in self.blocks


GPU = Device()
_placing: list[str | None] = [None]  # where the call that runs was told to put its result


@contextmanager
def running() -> Iterator[None]:
    """Inside, calls of torch know the device."""
    with _Calls(), _Operators():
        yield


@contextmanager
def _place(device: str | None) -> Iterator[None]:
    before, _placing[0] = _placing[0], device
    try:
        yield
    finally:
        _placing[0] = before


class _Calls(TorchFunctionMode):
    """Calls from Python: those that name a device, and those that torch's C++ would end without an operator."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if args and isinstance(args[0], Tensor):
            special = _METHODS.get(name)
            if special is not None:
                return special(func, *args, **kwargs)
        device = kwargs.get("device")
        if device is None:
            return func(*args, **kwargs)
        device = torch.device(device)
        if device.type == "meta":
            return func(*args, **kwargs)
        with _place(device.type):
            out = func(*args, **(kwargs | {"device": "cpu"}))
        if device.type == "cuda":
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor):
                    GPU.add(tensor)
        return out


def _move(tensor: Tensor, device: str) -> Tensor:
    if tensor.is_meta or tensor.device.type == device:
        return tensor
    with _place(device), torch._C.DisableTorchFunctionSubclass():
        out = tensor.detach().clone()
    if device == "cuda":
        GPU.add(out)
    return out


def _to(func, tensor: Tensor, *args, **kwargs):
    copy = kwargs.pop("copy", False)
    other = args[0] if args else kwargs.get("other")
    if isinstance(other, Tensor):
        device, dtype = other.device, other.dtype
    else:
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
    if tensor.is_meta or (device is not None and device.type == "meta"):
        return func(tensor, *args, copy=copy, **kwargs)
    out = tensor if device is None else _move(tensor, device.type)
    if dtype is not None and dtype != out.dtype:
        return func(out, dtype)
    return out.clone() if copy and out is tensor else out


def _numpy(func, tensor: Tensor, **kwargs):
    if GPU.holds(tensor):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")
    return func(tensor, **kwargs)


def _mm(func, left: Tensor, right: Tensor, **kwargs):
    """CUDA's `out_dtype`: products of bfloat16, summed and returned in float32."""
    out_dtype = kwargs.pop("out_dtype", None)
    if out_dtype is None:
        return func(left, right, **kwargs)
    return func(left.to(out_dtype), right.to(out_dtype), **kwargs)


def _exponential(func, tensor: Tensor, *args, **kwargs):
    generator = kwargs.get("generator")
    if isinstance(generator, Generator):
        generator.before_draws.append(generator.get_state())
    return func(tensor, *args, **kwargs)


_METHODS = {
    "to": _to,
    "cpu": lambda func, tensor, *args, **kwargs: _move(tensor, "cpu"),
    "cuda": lambda func, tensor, *args, **kwargs: _move(tensor, "cuda"),
    "pin_memory": lambda func, tensor, *args, **kwargs: tensor,
    "is_pinned": lambda func, tensor, *args, **kwargs: True,
    "numpy": _numpy,
    "mm": _mm,
    "exponential_": _exponential,
}


class _Operators(TorchDispatchMode):
    """Operators below Python: their results are where their inputs are, unless the call said where."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        place = _placing[0]
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"], place = torch.device("cpu"), "cuda"
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and not leaf.is_meta]
        on_device = [GPU.holds(tensor) for tensor in read]
        name = func._schema.name.split("::")[-1]
        if any(on_device) and name not in CROSSING:
            strays = [t for t, there in zip(read, on_device, strict=True) if not there and t.dim() > 0]
            if strays and place is None:
                raise RuntimeError(
                    f"{func._schema.name}: tensors on cuda:0 and on the cpu, {[t.shape for t in strays]}"
                )
        out = func(*args, **kwargs)
        if place == "cuda" or (place is None and any(on_device)):
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor) and _real_device(tensor).type == "cpu":
                    GPU.add(tensor)
        return out


class Generator(torch.Generator):
    """A generator of the device. Philox has an offset that vLLM rewinds: here it counts the draws, 4 each."""

    def __new__(cls, device="cpu"):
        generator = super().__new__(cls, "cpu")
        generator.before_draws = []
        return generator

    def __init__(self, device="cpu"): ...

    def get_offset(self) -> int:
        return 4 * len(self.before_draws)

    def set_offset(self, offset: int) -> None:
        keep = offset // 4
        if keep < len(self.before_draws):
            self.set_state(self.before_draws[keep])
            del self.before_draws[keep:]
        assert self.get_offset() == offset, "an offset that was never reached"


class Event:
    """Of the device, or of a stream; done when asked."""

    def __init__(self, *args, **kwargs): ...

    def record(self, stream=None) -> None: ...

    def wait(self, stream=None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other) -> float:
        return 1.0


class Stream:
    """A stream on which nothing is ever pending; also the context that makes it current."""

    cuda_stream = 0
    device = CUDA

    def __init__(self, *args, **kwargs): ...

    def wait_stream(self, other) -> None: ...

    def wait_event(self, event) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event=None) -> Event:
        return event or Event()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception) -> None: ...


def install() -> None:
    """Patch torch: the devices of tensors, torch.cuda, torch.accelerator, and where vLLM's operators are registered."""
    Tensor.device = property(lambda tensor: CUDA if GPU.holds(tensor) else _real_device(tensor))
    Tensor.is_cuda = property(lambda tensor: tensor.device.type == "cuda")
    Tensor.is_cpu = property(lambda tensor: tensor.device.type == "cpu")
    torch.Generator, torch.Event, torch.Stream = Generator, Event, Stream
    install_cuda()
    _register_for_cpu()


def install_cuda() -> None:
    """The functions of torch.cuda and torch.accelerator; again after parallel/cpu_platform.py has put its own there."""
    stream = Stream()
    both = {
        "current_stream": lambda device=None: stream,
        "synchronize": lambda device=None: GPU.events.append("synchronize"),
        "empty_cache": lambda: GPU.events.append("empty_cache"),
        "reset_peak_memory_stats": lambda device=None: None,
        "memory_allocated": lambda device=None: GPU.used_bytes,
        "memory_reserved": lambda device=None: GPU.used_bytes,
        "max_memory_allocated": lambda device=None: GPU.peak_bytes,
        "memory_stats": lambda device=None: {"allocated_bytes.all.peak": GPU.peak_bytes},
    }
    cuda = both | {
        "Stream": Stream,
        "Event": Event,
        "default_stream": lambda device=None: stream,
        "stream": lambda other: other or stream,
        "set_stream": lambda other: None,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "_lazy_call": lambda call, **kwargs: call(),
        "is_current_stream_capturing": lambda: False,
        "mem_get_info": _memory_info,
        "memory_snapshot": lambda *args, **kwargs: [
            {"segment_pool_id": (0, 1) if block.pool else (0, 0), "total_size": block.num_bytes}
            for block in GPU.blocks.values()
        ],
        "manual_seed": lambda seed: GPU.events.append(f"manual_seed {seed}"),
        "manual_seed_all": lambda seed: GPU.events.append(f"manual_seed {seed}"),
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: GPU.events.append("set_rng_state"),
        "ipc_collect": lambda: None,
    }
    accelerator = both | {
        "is_available": lambda: True,
        "current_accelerator": lambda *args, **kwargs: torch.device("cuda"),
        "set_device_index": lambda device: None,
        "current_device_index": lambda: 0,
        "get_memory_info": _memory_info,
    }
    for module, functions in ((torch.cuda, cuda), (torch.accelerator, accelerator)):
        for name, function in functions.items():
            setattr(module, name, function)
    torch._C._accelerator_setAllocatorSettings = lambda settings: None
    Tensor.cuda = lambda tensor, *args, **kwargs: _move(tensor, "cuda")


def _memory_info(device=None) -> tuple[int, int]:
    return GPU.memory_bytes - GPU.used_bytes, GPU.memory_bytes


def _register_for_cpu() -> None:
    """Operators that vLLM registers for CUDA in Python take our tensors, which are the CPU's to torch."""
    real = torch.library.Library.impl

    def impl(library, name, function, dispatch_key="", **kwargs):
        if dispatch_key != "CUDA" or not library.ns.startswith("vllm"):
            return real(library, name, function, dispatch_key, **kwargs)

        def on_device(*args, **kwargs):
            with running():  # torch leaves the modes when it enters an operator
                return function(*args, **kwargs)

        return real(library, name, on_device, "CPU", **kwargs)

    torch.library.Library.impl = impl
