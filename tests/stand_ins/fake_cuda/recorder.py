"""What a GPU would have had to do: host syncs, kernels, live bytes and collectives, each by the line that caused it.

A kernel is an operator that writes memory (views and `empty` are none), a call of a compiled extension, a Triton
kernel, or a function under torch.compile. Bytes are those of tensors on the device, each rounded up to 512 as torch's
allocator does; what the allocator, cuBLAS, NCCL and the CUDA context hold beside them is not there.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

aten = torch.ops.aten
BLOCK_BYTES = 512  # what the caching allocator rounds to
SNAPSHOT_STEP = 1.002  # a new picture of what is live is taken when the peak has grown by this factor
_PACKAGES = ("remax_megatron/", "megatron/", "transformer_engine/")
_HEAD_FILES = ("remax_megatron/algorithm/logprob", "remax_megatron/algorithm/fused_head")
_LAYER_FILE = "megatron/core/transformer/transformer_layer.py"


@dataclass(frozen=True)
class Collective:
    """One call: the operator, the ranks of its group, the peer or root where it has one, the tensors' sizes."""

    name: str
    group: tuple[int, ...]
    peer: int | None
    tensors: tuple[tuple[int, str], ...]  # elements, dtype
    where: str
    num_bytes: int = 0
    batch: int = 0  # number of the batch_isend_irecv that a message is of; 0: of none

    @property
    def is_message(self) -> bool:
        return self.name in ("send", "recv_")


@dataclass
class Phase:
    """What happened while a phase was the innermost one."""

    syncs: Counter[tuple[str, str]] = field(default_factory=Counter)  # (kind, where)
    kernels: Counter[str] = field(default_factory=Counter)  # by line and operator
    kernels_of: Counter[str] = field(default_factory=Counter)  # head, layer, other
    comm_calls: Counter[str] = field(default_factory=Counter)
    comm_bytes: Counter[str] = field(default_factory=Counter)
    peak_bytes: int = 0
    end_bytes: int = 0
    at_peak: Counter[str] = field(default_factory=Counter)  # bytes by line
    pictured_bytes: int = 0  # when `at_peak` was taken
    at_end: Counter[str] = field(default_factory=Counter)

    @property
    def num_kernels(self) -> int:
        return sum(self.kernels.values())


class Recorder(TorchDispatchMode):
    """A dispatch mode that lies over FakeTensorMode and counts. `answers` are what host reads return."""

    def __init__(self) -> None:
        super().__init__()
        self.phases: dict[str, Phase] = {}
        self.phase_name = "start"
        self.collectives: list[Collective] = []
        self.live_bytes = 0
        self._batch = self._num_batches = 0
        # (file, function) of a reader -> what it reads; for values that a fake device cannot know.
        self.answers: dict[tuple[str, str], Any] = {}
        self._live: dict[int, tuple[int, str]] = {}  # storage -> bytes, line
        self._by_line: Counter[str] = Counter()
        self._pinned: set[int] = set()
        self._in_kernel = 0

    # -- phases ----------------------------------------------------------------------------------------------------

    @property
    def now(self) -> Phase:
        return self.phases.setdefault(self.phase_name, Phase())

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """What happens inside counts to `name`, not to the phase around it."""
        before, self.phase_name = self.phase_name, name
        self._grew()
        try:
            yield self.now
        finally:
            self.now.end_bytes = self.live_bytes
            self.now.at_end = +self._by_line
            self.phase_name = before

    # -- events ----------------------------------------------------------------------------------------------------

    def sync(self, kind: str) -> None:
        """The host waits for the device here."""
        self.now.syncs[kind, _site().text] += 1

    def kernel(self, name: str) -> None:
        if not self._in_kernel:
            site = _site()
            self.now.kernels[f"{site.inner} [{name}]"] += 1
            self.now.kernels_of[site.part] += 1

    @contextmanager
    def one_kernel(self, name: str) -> Iterator[None]:
        """What is inside is one kernel: its temporaries never reach the device's memory, its results do."""
        self.kernel(name)
        self._in_kernel += 1
        try:
            yield
        finally:
            self._in_kernel -= 1
            self._grew()

    def collective(self, name: str, group: tuple[int, ...], peer: int | None, tensors: list[torch.Tensor]) -> None:
        sizes = tuple((t.numel(), str(t.dtype).removeprefix("torch.")) for t in tensors)
        num_bytes = sum(t.numel() * t.element_size() for t in tensors)
        self.now.comm_calls[name] += 1
        self.now.comm_bytes[name] += num_bytes
        self.collectives.append(Collective(name, group, peer, sizes, _site().text, num_bytes, self._batch))

    @contextmanager
    def batch(self) -> Iterator[None]:
        """The messages inside are begun together."""
        self._num_batches += 1
        self._batch = self._num_batches
        try:
            yield
        finally:
            self._batch = 0

    def read(self, shape: torch.Size, dtype: torch.dtype) -> Any:
        """What a host read of a device tensor returns: the answer for the innermost reader that has one, or zeros
        (ones for floats, which are then finite and can be divided by)."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            key = (frame.f_code.co_filename.rpartition("/")[2], frame.f_code.co_name)
            if key in self.answers:
                answer = self.answers[key]
                return answer(frame, shape) if callable(answer) else answer
            frame = frame.f_back
        return _filled(tuple(shape), True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 0)

    # -- dispatch --------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            return self._c10d(func, args)
        if func is aten._local_scalar_dense.default:
            if args[0].device.type == "cuda":
                self.sync("item")
            elif getattr(args[0], "constant", None) is not None:
                return func(*args, **kwargs)
            return self.read(torch.Size(()), args[0].dtype)
        elif func in (aten._to_copy.default, aten.copy_.default):
            self._note_copy(func, args, kwargs)
        elif func is aten._pin_memory.default:
            return self._pin(torch.empty_like(args[0]))
        elif func is aten.is_pinned.default:
            return args[0].untyped_storage()._cdata in self._pinned
        pins = kwargs.pop("pin_memory", None)
        out = func(*args, **kwargs)
        if pins:
            self._pin(out)
        writes = func._schema.is_mutable
        for leaf in tree_iter(out):
            if isinstance(leaf, FakeTensor) and leaf.device.type == "cuda":
                writes |= self._hold(leaf, func)
        name = func._schema.name.removeprefix("aten::")
        if writes and "empty" not in name and any(_on_device(leaf) for leaf in tree_iter((out, args))):
            self.kernel(name)
        return out

    def _pin(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self._pinned.add(storage._cdata)
        weakref.finalize(storage, self._pinned.discard, storage._cdata)
        return tensor

    def _note_copy(self, func: Any, args: tuple, kwargs: dict) -> None:
        """A copy between host and device waits, unless it is asked not to and the host's side is pinned."""
        if func is aten.copy_.default:
            target, source = args[0], args[1]
            ends, waits = (source.device.type, target.device.type), not (len(args) > 2 and args[2])
            host = source if ends[0] == "cpu" else target
            pinned = host.untyped_storage()._cdata in self._pinned
        else:
            source = args[0]
            ends = (source.device.type, torch.device(kwargs.get("device") or source.device).type)
            waits = not kwargs.get("non_blocking", False)
            # A copy to the host without a target of its own goes to pinned memory when it does not wait.
            pinned = ends[0] == "cuda" or source.untyped_storage()._cdata in self._pinned
        if set(ends) == {"cpu", "cuda"} and (waits or not pinned):
            self.sync(f"{ends[0]} to {ends[1]}" + ("" if waits else ", pageable"))

    def _c10d(self, func: Any, args: tuple) -> Any:
        from torch._C._distributed_c10d import FakeWork

        name = func._schema.name.removeprefix("c10d::")
        tensors = [leaf for leaf in tree_iter(args) if isinstance(leaf, torch.Tensor)]
        group, peer = _group_and_peer(func, args)
        if any(tensor.device.type != "cuda" for tensor in tensors):
            raise RuntimeError(f"NCCL takes no tensor on {[str(t.device) for t in tensors]}: {name} at {_site().text}")
        if any(not tensor.is_contiguous() for tensor in tensors):
            raise RuntimeError(f"NCCL takes contiguous tensors only: {name} at {_site().text}")
        self.collective(name, group, peer, tensors)
        work = FakeWork().boxed()
        return work if len(func._schema.returns) == 1 else (args[0], work)

    # -- memory ----------------------------------------------------------------------------------------------------

    def _hold(self, tensor: torch.Tensor, func: Any) -> bool:
        """Count the storage of `tensor` where it is new; whether it was."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._live or storage.nbytes() == 0:
            return False
        line = f"{_site().inner} [{func._schema.name.removeprefix('aten::')}]"
        self._live[storage._cdata] = (0, line)
        weakref.finalize(storage, self._resize, storage._cdata, 0, gone=True)
        self._resize(storage._cdata, storage.nbytes())
        return True

    def _resize(self, storage: int, num_bytes: int, gone: bool = False) -> None:
        before, line = self._live[storage]
        after = -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES
        self._live[storage] = (after, line)
        if gone:
            del self._live[storage]
        self._by_line[line] += after - before
        self.live_bytes += after - before
        self._grew()

    def resized(self, storage: torch.UntypedStorage) -> None:
        """To be called after a storage was resized in place."""
        if storage._cdata in self._live:
            self._resize(storage._cdata, storage.nbytes())

    def _grew(self) -> None:
        phase = self.now
        if self._in_kernel or self.live_bytes <= phase.peak_bytes:
            return
        phase.peak_bytes = self.live_bytes
        if self.live_bytes > SNAPSHOT_STEP * phase.pictured_bytes:
            phase.pictured_bytes = self.live_bytes
            phase.at_peak = +self._by_line


# -- places ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """A place in the code: the innermost line of Megatron, Transformer Engine or the project, and of the project."""

    inner: str
    project: str
    part: str  # head, layer or other

    @property
    def text(self) -> str:
        return self.inner if self.inner == self.project or not self.project else f"{self.inner} <- {self.project}"


@functools.cache
def _file(code: CodeType) -> str | None:
    """The path of `code` below site-packages or the repository, None where it belongs to neither of _PACKAGES."""
    path = code.co_filename
    if "/stand_ins/" in path:
        return None
    for package in _PACKAGES:
        head, found, tail = path.rpartition(f"/{package}")
        if found:
            return package + tail
    return None


def _site() -> Site:
    inner = project = ""
    part = "other"
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        file = _file(frame.f_code)
        if file is not None:
            if not inner:
                inner = f"{file}:{frame.f_lineno} {frame.f_code.co_name}"
            if not project and file.startswith("remax_megatron/"):
                project = f"{file}:{frame.f_lineno} {frame.f_code.co_name}"
            if part == "other":
                part = "head" if file.startswith(_HEAD_FILES) else "layer" if file == _LAYER_FILE else "other"
        frame = frame.f_back
    return Site(inner or "?", project, part)


def _group_and_peer(func: Any, args: tuple) -> tuple[tuple[int, ...], int | None]:
    """The ranks of the process group, and the other rank of a message or the root, as a rank of the world."""
    group: tuple[int, ...] = ()
    peer = None
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.name == "process_group":
            group = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(value)))
        elif argument.name in ("dst", "src", "root_rank"):
            peer = value
    return group, None if peer is None else group[peer]


def _on_device(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.device.type == "cuda"


def _filled(shape: tuple[int, ...], value: Any) -> Any:
    return value if not shape else [_filled(shape[1:], value) for _ in range(shape[0])]
