"""These tests need the GPU stack's torch (a CUDA build) and megatron-core, no GPU: `make test-fake-gpu`."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
