"""The tests of this folder need a CUDA device: `make test-gpu`. They are skipped where there is none."""

from __future__ import annotations

import pytest
import torch


def pytest_runtest_setup(item):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
