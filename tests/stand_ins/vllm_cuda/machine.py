"""The machine: eight H100s for NVML and torch.cuda, and a driver library that only refuses.

vLLM's compiled extension is linked against libcuda.so.1, and its operators' signatures come from loading it. The loader
takes any library of that name that is loaded already; ours is compiled here, and each function of it returns an error.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch

from tests.stand_ins.vllm_cuda.tensors import GPU

NUM_GPUS = 8
NAME = "NVIDIA H100 80GB HBM3"
CAPABILITY = (9, 0)
# What vLLM 0.24's extensions take from the driver. A new version that takes more says "undefined symbol".
DRIVER = (
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDevicePrimaryCtxRetain",
    "cuDriverGetVersion",
    "cuGetErrorString",
    "cuGetProcAddress_v2",
    "cuInit",
    "cuMemAddressFree",
    "cuMemAddressReserve",
    "cuMemCreate",
    "cuMemGetAllocationGranularity",
    "cuMemMap",
    "cuMemRelease",
    "cuMemSetAccess",
    "cuMemUnmap",
    "cuPointerGetAttribute",
    "cuTensorMapEncodeTiled",
)
# For the process that calls `install`, from its start on.
ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    "TORCHDYNAMO_DISABLE": "1",  # some of vLLM's functions are compiled even under enforce_eager
    "HF_HUB_OFFLINE": "1",
}
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


def install() -> None:
    """Answer for the GPUs wherever vLLM asks before it computes."""
    missing = ENVIRONMENT.items() - os.environ.items()
    assert not missing, f"torch and Triton read these before this runs: {sorted(missing)}"
    load_driver()
    properties = SimpleNamespace(
        name=NAME,
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
        total_memory=GPU.memory_bytes,
        multi_processor_count=132,
        is_integrated=0,
        warp_size=32,
        max_threads_per_multi_processor=2048,
        regs_per_multiprocessor=65536,
        shared_memory_per_block_optin=227 * 1024,
        L2_cache_size=50 * 2**20,
        uuid="GPU-0",
    )
    for name, answer in {
        "is_available": True,
        "device_count": NUM_GPUS,
        "_device_count_nvml": NUM_GPUS,
        "get_device_name": NAME,
        "get_device_capability": CAPABILITY,
        "get_device_properties": properties,
    }.items():
        setattr(torch.cuda, name, lambda *args, _answer=answer: _answer)
    torch.accelerator.device_count = lambda: NUM_GPUS
    sys.meta_path.insert(0, _NvmlFinder())


def load_driver() -> None:
    """Load a libcuda.so.1 whose functions return CUDA_ERROR_NO_DEVICE. Needs a C compiler."""
    source = "\n".join(f"int {name}(void) {{ return {NO_DEVICE}; }}" for name in DRIVER)
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "libcuda.so.1"
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", str(library), "-x", "c", "-"]
        subprocess.run(command, input=source, text=True, check=True, timeout=60)
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


class _NvmlFinder:
    """Patches vLLM's copy of NVML as it is loaded: `import vllm` asks it for the platform."""

    def find_spec(self, name, path=None, target=None):
        if name != "vllm.third_party.pynvml":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module) -> None:
            execute(module)
            _answer_for_nvml(module)

        spec.loader.exec_module = exec_module
        return spec


def _answer_for_nvml(nvml) -> None:
    memory = SimpleNamespace(total=GPU.memory_bytes, free=GPU.memory_bytes, used=0)
    for name, answer in {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: NUM_GPUS,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetCudaComputeCapability": lambda handle: CAPABILITY,
        "nvmlDeviceGetName": lambda handle: NAME,
        "nvmlDeviceGetUUID": lambda handle: f"GPU-{handle}",
        "nvmlDeviceGetMemoryInfo": lambda handle: memory,
        "nvmlDeviceGetP2PStatus": lambda one, other, kind: nvml.NVML_P2P_STATUS_OK,
        "nvmlDeviceGetNumaNodeId": lambda handle: 0,
    }.items():
        setattr(nvml, name, answer)
