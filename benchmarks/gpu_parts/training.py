"""A run of the trainer as a user starts it, on one device, and the metrics that it wrote."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import ROOT

from gpu_parts.part import Part
from remax_megatron.demo.warm_start import make_tokenizer
from remax_megatron.metrics import read_metrics


def train(part: Part, preset: str, *overrides: str) -> list[dict[str, Any]]:
    """The records of metrics.jsonl of a run on one rank. RuntimeError with the end of its output when it fails; a run
    that hangs ends with the part."""
    folder = part.work / f"run-{preset}"
    mine = [
        f"trainer.device={part.device}",
        "trainer.n_gpus_per_node=1",
        "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=1",
        f"actor_rollout_ref.actor.megatron.dtype={'bfloat16' if part.device == 'cuda' else 'float32'}",
        f"trainer.default_local_dir={folder}",
        "trainer.export_hf=False",
    ]
    command = [sys.executable, "-m", "remax_megatron", "--config-name", preset, *mine, *overrides]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        print(done.stdout[-6000:], file=sys.stderr, flush=True)
        last = (done.stdout.strip().splitlines() or ["without output"])[-1]
        raise RuntimeError(f"exit code {done.returncode}: {last}")
    return list(read_metrics(folder / "metrics.jsonl"))


def model_with_tokenizer(part: Part, shape: str) -> Path:
    """A random model whose folder has the demo's tokenizer: it reads the word problems, and decodes the few tokens of
    an answer that it knows."""
    folder = part.model(shape)
    make_tokenizer().save_pretrained(folder)
    return folder
