"""How long prompts and answers are: a few named distributions, stated as assumptions, or the lengths of a file.

    gsm8k   GSM8K's questions with a chat template, 106 tokens on average (counted), and answers that are log-normal
            with mean 249 and 1 % above 1024 tokens: the length model of benchmarks/schedule.py
    math    MATH-like: answers log-normal with median 450 (the same)
    long    a reasoner's: answers log-normal with median 4500 and a tenth above 12,500 tokens. No data set was counted

A file is a dump of rollouts (`trainer.rollout_data_dir`), JSON lines with "prompt_tokens" and "response_tokens", or a
run's metrics.jsonl, whose mean and spread of answers then make a log-normal. Lengths are cut at the settings' limits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from remax_megatron.config.schema import ConfigError

QUANTILES = (0.1, 0.5, 0.9, 0.99)


@dataclass(frozen=True)
class LogNormal:
    """`offset` tokens and a log-normal with this median and sigma."""

    offset: float
    median: float
    sigma: float

    @classmethod
    def of(cls, mean: float, std: float) -> LogNormal:
        """Make the one with this mean and standard deviation."""
        sigma = math.sqrt(math.log1p((std / mean) ** 2)) if mean > 0 else 0.0
        return cls(0.0, mean * math.exp(-(sigma**2) / 2), sigma)

    def draw(self, random: np.random.Generator, count: int) -> np.ndarray:
        """Draw `count` lengths, not yet whole or cut."""
        return self.offset + self.median * np.exp(self.sigma * random.standard_normal(count))


@dataclass(frozen=True)
class Lengths:
    """Lengths of prompts and answers: two distributions, or pairs that were seen; `source` says where they are from."""

    name: str
    source: str
    prompts: LogNormal | None = None
    answers: LogNormal | None = None
    seen: tuple[tuple[int, int], ...] = ()

    def draw(
        self, num_prompts: int, answers: int, longest: tuple[int, int], seed: int = 0
    ) -> list[tuple[int, list[int]]]:
        """Draw (prompt tokens, tokens of its answers) for `num_prompts` prompts with `answers` answers each.

        `longest` are the largest prompt and answer. Equal arguments give equal lengths.
        """
        random = np.random.default_rng(seed)
        if self.seen:
            order = random.permutation(np.arange(num_prompts * answers) % len(self.seen))
            pairs = np.array(self.seen)[order]
            prompts, lengths = pairs[:num_prompts, 0], pairs[:, 1]
        else:
            assert self.prompts is not None and self.answers is not None
            prompts = self.prompts.draw(random, num_prompts)
            lengths = self.answers.draw(random, num_prompts * answers)
        whole = np.clip(np.rint(prompts), 1, longest[0]).astype(int).tolist()
        grouped = np.clip(np.rint(lengths), 1, longest[1]).astype(int).reshape(num_prompts, answers).tolist()
        return list(zip(whole, grouped, strict=True))

    def described(self, longest: tuple[int, int]) -> str:
        """Say the quantiles of 4096 drawn answers, cut at `longest`, and the source."""
        drawn = self.draw(4096, 1, longest)
        answers = np.quantile([lengths[0] for _, lengths in drawn], QUANTILES)
        said = ", ".join(f"{q:.0%} {value:.0f}" for q, value in zip(QUANTILES, answers, strict=True))
        prompt = np.mean([prompt for prompt, _ in drawn])
        return f"{self.name}: prompts {prompt:.0f} tokens on average, answers {said} ({self.source})"


NAMED = {
    "gsm8k": Lengths(
        "gsm8k",
        "assumed; questions counted, answers as in benchmarks/schedule.py",
        LogNormal(50, 56 * math.exp(-(0.38**2) / 2), 0.38),
        LogNormal(0, 249 * math.exp(-(0.62**2) / 2), 0.62),
    ),
    "math": Lengths("math", "assumed; as in benchmarks/schedule.py", LogNormal(50, 70, 0.6), LogNormal(0, 450, 0.7)),
    "long": Lengths("long", "assumed; no data set was counted", LogNormal(50, 70, 0.6), LogNormal(0, 4500, 0.8)),
}
DEFAULT = "gsm8k"


def lengths_named(name: str) -> Lengths:
    """Give the named distribution, or read a file. ConfigError for neither, and for a file without lengths."""
    if name in NAMED:
        return NAMED[name]
    path = Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(f"--lengths={name} is neither a file nor one of {', '.join(NAMED)}; set it to one of them")
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except ValueError as error:
        raise ConfigError(f"--lengths={name} is not a file of JSON lines ({error}); set it to one") from error
    if steps := [record for record in records if "response/mean_tokens" in record]:
        return of_metrics(str(path), steps)
    if seen := tuple(pair for record in records for pair in _pairs(record)):
        return Lengths(path.name, f"{len(seen)} answers of {path}", seen=seen)
    raise ConfigError(
        f'--lengths={name} has no lengths: a line has "prompt_tokens" and "response_tokens", or is one of a dump of'
        " rollouts or of metrics.jsonl; set it to such a file"
    )


def of_metrics(source: str, steps: Sequence[Mapping[str, Any]], answers_per_step: int | None = None) -> Lengths:
    """Make log-normal lengths with the mean and the spread of a run's `steps`, records of metrics.jsonl.

    `answers_per_step`, where it is known, tells the mean prompt from `batch/num_tokens`; else prompts have 100 tokens.
    """
    mean = float(np.mean([step["response/mean_tokens"] for step in steps]))
    std = float(np.mean([step["response/std_tokens"] for step in steps]))
    prompt = 100.0
    if answers_per_step:
        prompt = float(np.mean([step["batch/num_tokens"] for step in steps])) / answers_per_step - mean
    note = f"mean and spread of {len(steps)} steps of {source}"
    return Lengths(Path(source).name, note, LogNormal(max(prompt, 1.0), 0.0, 0.0), LogNormal.of(mean, std))


def _pairs(record: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """(prompt, answer) tokens of a line."""
    if "prompt_tokens" in record:
        found = record.get("response_tokens", [])
        yield from ((record["prompt_tokens"], answer) for answer in (found if isinstance(found, list) else [found]))
    elif isinstance(record.get("prompt"), dict) and "samples" in record:
        prompt = len(record["prompt"]["token_ids"])
        yield from ((prompt, len(sample["token_ids"])) for sample in record["samples"])
