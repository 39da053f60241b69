"""A small folder, converted there and back."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.convert.folders import FP32, there_and_back, write_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf, megatron, and back; tests copy what they change."""
    work = tmp_path_factory.mktemp("models")
    source = write_model(work / "source", num_files=2, bits=False, dtype=FP32)
    there_and_back(source, work)
    return work
