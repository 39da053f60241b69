"""What all parts share: the device, the models, a policy from settings, and the record that each case is written to.

A case is one row of a part's table. One that cannot run here is recorded with the reason, one that fails with its
error, and the next one runs: only a crash or the time limit ends a part.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from random_model import SHAPES, Shape, config_of, make_folder

from remax_megatron.config.load import load_config
from remax_megatron.config.schema import Config
from remax_megatron.environment import ATTENTION
from remax_megatron.errors import UserError
from remax_megatron.model_facts import ModelFacts
from remax_megatron.parallel.layout import Layout, init_distributed, init_model_parallel

# What a case may die of without ending its part: errors of CUDA, memory and compilation are RuntimeErrors.
FAILURES = (RuntimeError, ValueError, TypeError, KeyError, AttributeError, AssertionError, ImportError, OSError)
TINY = (2, 128, 192, 4, 2, 640, True)  # the shape that stands for all of SHAPES on a CPU
MAX_LINE = 160
Numbers = dict[str, Any]


@dataclass
class Part:
    """One part in its own process, on one device. `work` keeps models for the parts after it; `record` is a file of
    JSON lines, one for each case; `tiny` asks for sizes that a CPU computes in seconds."""

    device: str  # cuda | cpu
    tiny: bool
    work: Path
    record: Path
    _layout: Layout | None = None

    def case(self, name: str, measure: Callable[[], Numbers]) -> Numbers | None:
        """Record what `measure` returns as the case `name`; None, and the reason recorded, when it cannot."""
        started = time.perf_counter()
        found: Numbers | None = None
        try:
            found = measure()
            self.write(name, found | {"case_s": time.perf_counter() - started})
        except UserError as error:
            self.not_available(name, str(error))
        except torch.OutOfMemoryError as error:
            self.not_available(name, f"out of memory: {error}".splitlines()[0][:MAX_LINE])
        except FAILURES as error:
            traceback.print_exc()
            self.write(name, {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:MAX_LINE]})
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return found

    def not_available(self, name: str, reason: str) -> None:
        """Record that the case `name` cannot run here, and why."""
        self.write(name, {"not_available": reason})

    def write(self, name: str, found: Numbers) -> None:
        """Append a case to the record, and print it."""
        with open(self.record, "a") as file:
            file.write(json.dumps({"case": name} | found) + "\n")
        print(f"  {name}: {', '.join(f'{key} {_short(value)}' for key, value in found.items())}", flush=True)

    # -- what cases are made of --------------------------------------------------------------------------------------

    def layout(self) -> Layout:
        """One rank, made at the first call."""
        if self._layout is None:
            self._layout = init_model_parallel(init_distributed(self.device, 120), tp=1, pp=1, vpp=None, seed=1)
        return self._layout

    def model(self, name: str, shape: Shape | None = None, std: float = 0.02) -> Path:
        """The folder of a model with random weights and the sizes of `shape` (None: those of SHAPES); the parts after
        this one find it made."""
        folder = self.work / name
        if not folder.exists():
            making = self.work / f"{name}.making"  # a part that is stopped in between leaves no half model
            make_folder(making, config_of(TINY if self.tiny else shape or SHAPES[name]), std)
            making.rename(folder)
        return folder

    def settings(self, folder: Path, *overrides: str) -> Config:
        """The settings of the 3B preset for one rank on the model in `folder`."""
        dtype = "bfloat16" if self.device == "cuda" else "float32"
        mine = [
            f"actor_rollout_ref.model.path={folder}",
            f"actor_rollout_ref.actor.megatron.dtype={dtype}",
            f"trainer.device={self.device}",
            "trainer.n_gpus_per_node=1",
        ]
        return load_config("qwen2_5_3b", [*mine, *overrides]).config

    def policy(self, config: Config, model_folder: Path | None = None):
        """The policy of `config`, with the weights of its model or of `model_folder`."""
        from remax_megatron.policy.policy import Policy
        from remax_megatron.policy.settings import PolicySettings

        for name in ATTENTION:  # Megatron sets them for the first model of a process, and refuses a second that differs
            os.environ.pop(name, None)
        folder = config.actor_rollout_ref.model.path
        settings = PolicySettings.of(config)
        return Policy(ModelFacts.from_folder(folder), self.layout(), settings, str(model_folder or folder))

    def lacks_transformer_engine(self) -> str | None:
        """Why Transformer Engine's layers cannot run here; None when they can."""
        from megatron.core.extensions.transformer_engine import HAVE_TE

        return None if HAVE_TE else "Transformer Engine cannot be imported here"

    # -- measuring ---------------------------------------------------------------------------------------------------

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object]) -> float:
        """Wall time of `call`, the work that it queued on the device included."""
        self.synchronize()
        started = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - started

    def reset_peak(self) -> None:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float:
        """Largest memory since `reset_peak`: of the allocator on a GPU; on a CPU, of the process since its start."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def relative(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Norm of the difference over the norm of what is expected, of all tensors together."""
    pairs = list(zip(found, expected, strict=True))
    difference = sum((a.double() - b.double()).square().sum().item() for a, b in pairs)
    return (difference / sum(b.double().square().sum().item() for _, b in pairs)) ** 0.5


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
