"""vLLM 0.24's GPU worker, with real values, on a machine without a GPU.

In a process that began with ENVIRONMENT: `install()` before the first `import vllm`, `connect()` after it, then
everything inside `with running():`

    from tests.stand_ins import vllm_cuda
    vllm_cuda.install()
    import vllm
    vllm_cuda.connect()
    with vllm_cuda.running():
        engine = Engine(..., device=torch.device("cuda", 0))

machine.py   NVML, torch.cuda and the driver library say that this machine has eight H100s
tensors.py   "cuda" tensors live in host memory and call themselves cuda; copies between the two are real
kernels.py   torch's words for the compiled operators and FlashAttention; Triton's kernels run in its interpreter
sleep.py     the sleep allocator: what it throws away is NaN afterwards

It takes a process for itself: torch stays patched. It says nothing about torch.compile, CUDA graphs, NCCL, streams,
the real allocator, kernels or time. Where vLLM calls an operator that has no reference here, torch raises.
"""

from tests.stand_ins.vllm_cuda.kernels import connect as _connect_kernels
from tests.stand_ins.vllm_cuda.machine import ENVIRONMENT
from tests.stand_ins.vllm_cuda.machine import install as _install_machine
from tests.stand_ins.vllm_cuda.sleep import connect as _connect_allocator
from tests.stand_ins.vllm_cuda.tensors import GPU, running
from tests.stand_ins.vllm_cuda.tensors import install as _install_tensors

__all__ = ["ENVIRONMENT", "GPU", "connect", "install", "running"]


def install(memory_bytes: int = 2**30) -> None:
    """Make torch believe in GPUs of `memory_bytes` each; before vLLM is imported."""
    GPU.memory_bytes = memory_bytes
    _install_machine()
    _install_tensors()


def connect() -> None:
    """Give vLLM the references of its kernels, this allocator, and gloo; after vLLM is imported."""
    _connect_kernels()
    _connect_allocator()
