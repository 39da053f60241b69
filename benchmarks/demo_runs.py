"""Runs of the demo preset, real ones under torchrun, for benchmarks: started, kept, read; and a longer task for them.

The longer task: a model of 27 million parameters, or of one, with random weights, and GSM8K's lengths: prompts of about
100 tokens, answers up to 200. Its reward is a hash of the answer, so that half of all answers are right.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import ROOT
from benchmarks.random_model import Shape, config_of, make_folder
from remax_megatron.demo.warm_start import ensure_policy
from remax_megatron.demo.word_problems import ensure_data
from remax_megatron.metrics import read_metrics

RANKS = 2
# With its embedding; the demo's own shape.
LONG_MODELS: dict[str, Shape] = {"27m": (8, 512, 1536, 8, 4, 8192, True), "1m": (4, 128, 512, 4, 2, 547, False)}
LONG_PROMPT, LONG_ANSWER = 100, 200  # tokens
REWARD = """import zlib


def compute_score(data_source, solution_str, ground_truth, extra_info):
    return float(zlib.crc32(f"{ground_truth} {solution_str}".encode()) % 2)
"""


def demo_inputs(work: Path) -> tuple[Path, list[str]]:
    """The demo's model, made in `work` if need be, and the settings that name it and its data."""
    model = ensure_policy(work / "inputs" / "policy")
    train, val = ensure_data(work / "inputs" / "data")
    return model, [f"actor_rollout_ref.model.path={model}", f"data.train_files={train}", f"data.val_files={val}"]


@dataclass(frozen=True)
class Curve:
    """One run: after each validated step the accuracy, and seconds, generated tokens and steps until then."""

    accuracy: list[float]
    seconds: list[float]
    tokens: list[float]
    steps: list[int]

    @classmethod
    def of(cls, records: Sequence[dict], timed: Sequence[dict]) -> Curve:
        """The curve of the run `records`, with the seconds of the run `timed`."""
        curve, seconds, tokens = cls([], [], [], []), 0.0, 0.0
        for record, time in zip(records, timed, strict=True):
            seconds += time.get("time/step_s", 0.0)
            tokens += record.get("throughput/generated_tokens_per_s", 0.0) * record.get("time/rollout_s", 0.0)
            if "val/accuracy" in record:
                for values, value in (
                    (curve.accuracy, record["val/accuracy"]),
                    (curve.seconds, seconds),
                    (curve.tokens, tokens),
                    (curve.steps, record["step"]),
                ):
                    values.append(value)
        return curve

    def first(self, accuracy: float, axis: str) -> float:
        """Where on `axis` it first reached `accuracy`; infinity where it never did."""
        reached = (at for at, value in zip(getattr(self, axis), self.accuracy, strict=True) if value >= accuracy)
        return next(reached, float("inf"))


def curves_of(runs: Sequence[list[dict]]) -> list[Curve]:
    """Of a method's runs, one for each seed."""
    return [Curve.of(records, runs[0]) for records in runs]


def run(folder: Path, settings: Sequence[str], steps: int, ranks: int = RANKS) -> list[dict]:
    """The records of a run of the demo preset, `steps` steps on `ranks` ranks, into `folder`, which is taken as it is
    where they are there already."""
    metrics = folder / "metrics.jsonl"
    made = read_metrics(metrics) if metrics.exists() else []
    if not made or made[-1]["step"] < steps:
        shutil.rmtree(folder, ignore_errors=True)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        command = [
            *launcher,
            "--nproc-per-node",
            str(ranks),
            "-m",
            "remax_megatron",
            "--config-name",
            "demo",
            *settings,
        ]
        command += [f"trainer.default_local_dir={folder}", f"trainer.total_training_steps={steps}"]
        command.append(f"trainer.n_gpus_per_node={ranks}")
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=3600
        )
        if done.returncode != 0:
            raise RuntimeError(
                f"exit code {done.returncode}: {' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            )
    return read_metrics(metrics)


def median(records: Sequence[dict], key: str) -> float:
    """Of the steps, without the first two, in which kernels are made."""
    return statistics.median(record.get(key, 0.0) for record in records if record["step"] > 2)


def fastest(records: Sequence[dict], phase: str) -> float:
    """Seconds of a phase in the step where it took least, but the first."""
    return min(record.get(f"time/{phase}_s", 0.0) for record in records if record["step"] > 1)


def long_model(work: Path, size: str = "27m") -> Path:
    """The folder of a model of the longer task."""
    return work / f"model-{size}"


def long_settings(work: Path, demo_model: Path, size: str = "27m") -> list[str]:
    """Settings of the longer task, whose model, one of LONG_MODELS, and data are made in `work`; the tokenizer is that
    of `demo_model`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    model = long_model(work, size)
    if not model.exists():
        config = config_of(LONG_MODELS[size]) | {"eos_token_id": 1}
        with tempfile.TemporaryDirectory(dir=work) as aside:
            make_folder(Path(aside) / "model", config)
            for file in demo_model.glob("*token*"):
                shutil.copy(file, Path(aside) / "model" / file.name)
            for file in [*demo_model.glob("*.jinja"), *demo_model.glob("generation_config.json")]:
                shutil.copy(file, Path(aside) / "model" / file.name)
            (Path(aside) / "model").rename(model)
    (work / "reward.py").write_text(REWARD)
    source = pq.read_table(work / "inputs" / "data" / "train.parquet").slice(0, 512).to_pylist()
    words = [row["prompt"][-1]["content"] for row in source]
    rows = [
        row | {"prompt": [{"role": "user", "content": " ".join(words[i : i + 4])}]}
        for i, row in enumerate(source[: len(source) - 4])
    ]
    pq.write_table(pa.Table.from_pylist(rows), work / "long.parquet")
    return [
        f"actor_rollout_ref.model.path={model}",
        f"data.train_files={work / 'long.parquet'}",
        "data.val_files=null",
        "data.train_batch_size=16",
        f"data.max_prompt_length={2 * LONG_PROMPT}",
        f"data.max_response_length={LONG_ANSWER}",
        f"custom_reward_function.path={work / 'reward.py'}",
        "actor_rollout_ref.rollout.max_num_batched_tokens=8192",
        "trainer.test_freq=-1",
        "trainer.val_before_train=False",
        "trainer.export_hf=False",
    ]
