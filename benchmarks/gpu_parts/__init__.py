"""The parts of benchmarks/gpu.py, one module each: `run(part)` measures cases and records each as it is done."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from remax_megatron.environment import QUIET


def be_part(name: str, device: str, tiny: bool, work: Path, record: Path, errors: Path) -> None:
    """Run the part `name` as this process, with standard error in the file `errors`; see `part.Part`. Never returns."""
    os.setsid()  # whatever the part starts ends with its group
    with open(errors, "w") as file:
        os.dup2(file.fileno(), 2)
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    from gpu_parts.part import Part

    importlib.import_module(f"gpu_parts.{name}").run(Part(device, tiny, work, record))
    sys.stdout.flush()
    os._exit(0)  # vLLM, Megatron and NCCL tear down in an order that may wait for each other
