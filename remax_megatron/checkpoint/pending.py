"""Answers that were written ahead, as a file of a checkpoint: a resumed run trains on these, since their weights are
gone.

    pending.jsonl    a line on the batch, then one line per rollout: the index of its prompt, its samples, its greedy
                     answer

Numbers come back as they were (Python writes a float's shortest text that reads as the same float).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from remax_megatron.checkpoint.state import CheckpointError
from remax_megatron.rollout.batches import AnsweredBatch
from remax_megatron.types import Completion, Prompt, Rollout

PENDING = "pending.jsonl"


def pending_files(batch: AnsweredBatch | None) -> dict[str, bytes]:
    """What a checkpoint keeps of a batch that was written ahead, by file; nothing without one."""
    if batch is None:
        return {}
    lines = [{"metrics": dict(batch.metrics), "began": batch.began, "ended": batch.ended}]
    for rollout in batch.rollouts:
        greedy = None if rollout.greedy is None else asdict(rollout.greedy)
        samples = [asdict(sample) for sample in rollout.samples]
        lines.append({"prompt": rollout.prompt.index, "samples": samples, "greedy": greedy})
    return {PENDING: "".join(json.dumps(line) + "\n" for line in lines).encode()}


def read_pending(folder: Path, prompts: Iterable[Prompt]) -> AnsweredBatch | None:
    """The batch that the checkpoint in `folder` keeps, of prompts among `prompts`; None when it keeps none.

    CheckpointError when the file is not what `pending_files` made.
    """
    path = folder / PENDING
    if not path.exists():
        return None
    by_index = {prompt.index: prompt for prompt in prompts}
    try:
        about, *lines = map(json.loads, path.read_text().splitlines())
        rollouts = [
            Rollout(
                by_index[line["prompt"]],
                [Completion(**sample) for sample in line["samples"]],
                None if line["greedy"] is None else Completion(**line["greedy"]),
            )
            for line in lines
        ]
        return AnsweredBatch(rollouts, about["metrics"], about["began"], about["ended"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error})") from error
