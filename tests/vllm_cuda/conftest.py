"""What the tests of this folder need: vLLM's CUDA build, and a C compiler for the driver's stand-in."""

from __future__ import annotations

import importlib.util
import os
import shutil
from unittest import mock

import pytest

from tests.ranks import run_ranks
from tests.stand_ins.vllm_cuda import ENVIRONMENT


def pytest_collection_modifyitems(items):
    vllm = importlib.util.find_spec("vllm")
    compiled = vllm is not None and importlib.util.find_spec("vllm._C_stable_libtorch") is not None
    reason = None if compiled else "vLLM 0.24 for CUDA is not installed: see requirements/gpu.txt"
    if shutil.which("cc") is None:
        reason = "no C compiler (cc), which makes the stand-in of libcuda.so.1"
    for item in items:
        if reason is not None and item.path.parent.name == "vllm_cuda":
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def gpu_ranks(tmp_path_factory):
    """`run_ranks` in processes that begin as the stand-in needs them, and that share vLLM's cache."""
    environment = ENVIRONMENT | {"VLLM_CACHE_ROOT": str(tmp_path_factory.mktemp("vllm-cache"))}

    def run(function: str, world_size: int, payload):
        with mock.patch.dict(os.environ, environment):
            return run_ranks(function, world_size, payload, timeout_s=600, preload=())

    return run
