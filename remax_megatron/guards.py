"""What happens when an update must not be made: which step is forbidden, what is kept of its rows, how the run stops.

Two things forbid an optimizer step (Policy.update asks `forbidden`, on every rank alike): a loss or a gradient that is
not finite, and an engine whose log-probabilities are not those of the policy. The first is skipped, and stops the run
only after `trainer.max_nonfinite_updates` in a row; the second stops it at once. Either way the rows are in
`trainer.default_local_dir`/guards/*.jsonl, one JSON object per row; numbers that are not finite, for which JSON has no
word, are the strings "nan", "inf" and "-inf" there (Python's float() reads them). Counting is the learner's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from remax_megatron.atomic import replacing
from remax_megatron.types import Row

# Why a step was not made, the graver the later.
MADE, MISMATCH, NONFINITE = "", "mismatch", "nonfinite"
VERDICTS = (MADE, MISMATCH, NONFINITE)
# Largest accepted mean of |engine - policy| over the response tokens of an update, in nats.
MISMATCH_LIMIT = {"float32": 1e-3, "bfloat16": 0.2}
NUM_WORST_ROWS = 16


class NonFiniteError(RuntimeError):
    """Too many updates in a row had a loss or a gradient that is not finite; none of them changed a weight."""


class MismatchError(RuntimeError):
    """The engine's log-probabilities are not the policy's; the update that would have used them was not made."""


def mismatch_limit(threshold: float | None, policy_dtype: str, engine_dtype: str) -> float:
    """`actor_rollout_ref.rollout.mismatch_threshold`, or what None stands for: either side's bfloat16 decides."""
    if threshold is not None:
        return threshold
    return MISMATCH_LIMIT["float32" if policy_dtype == engine_dtype == "float32" else "bfloat16"]


def forbidden(loss: float, grad_norm: float, mismatch: float, limit: float | None) -> str:
    """One of VERDICTS for an update with these sums over all ranks; `limit` None: the mismatch is not looked at.

    A mismatch that is NaN is over any limit.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return NONFINITE
    return MISMATCH if limit is not None and not mismatch <= limit else MADE


def nonfinite_records(rows: Sequence[Row], numbers: Sequence[int], logprobs: Sequence[list[float]]) -> list[dict]:
    """What is kept of the rows `numbers` of an update with a loss or gradient that is not finite; [] of them names the
    gradient, then all rows are kept. `logprobs`: the policy's, of the rows that are kept, in order."""
    kept = numbers or range(len(rows))
    records = []
    for number, policy in zip(kept, logprobs, strict=True):
        row = rows[number]
        streams = {
            "advantages": row.advantages,
            "weight": [] if row.weight is None else [row.weight],
            "rollout_logprobs": row.rollout_logprobs,
            "policy_logprobs": policy,
            "old_logprobs": row.old_logprobs or [],
            "ref_logprobs": row.ref_logprobs or [],
        }
        why = [
            f"{name}[{i}] is {values[i]}"
            for name, values in streams.items()
            for i in [i for i, value in enumerate(values) if not math.isfinite(value)][:1]
        ]
        why.insert(0, "the loss is not finite" if numbers else "the gradient of the update is not finite, its rows are")
        ids = {"row": number, "prompt_ids": list(row.prompt_ids), "response_ids": row.response_ids}
        records.append({**ids, **streams, "weight": row.weight, "why": "; ".join(why)})
    return records


def mismatch_records(rows: Sequence[Row], logprobs: Sequence[list[float]]) -> list[dict]:
    """Both streams of the NUM_WORST_ROWS rows with the largest difference at a single token, the largest first."""
    records: list[dict[str, Any]] = []
    for number, (row, policy) in enumerate(zip(rows, logprobs, strict=True)):
        differences = [abs(a - b) for a, b in zip(row.rollout_logprobs, policy, strict=True)]
        if not differences:
            continue
        at = max(range(len(differences)), key=lambda i: _nan_is_most(differences[i]))
        worst = {
            "position": at,  # of the response
            "token": row.response_ids[at],
            "engine": row.rollout_logprobs[at],
            "policy": policy[at],
            "difference": differences[at],
        }
        records.append(
            {
                "row": number,
                "worst": worst,
                "mean_difference": sum(differences) / len(differences),
                "prompt_ids": list(row.prompt_ids),
                "response_ids": row.response_ids,
                "rollout_logprobs": row.rollout_logprobs,
                "policy_logprobs": policy,
            }
        )
    records.sort(key=lambda record: -_nan_is_most(record["worst"]["difference"]))
    return records[:NUM_WORST_ROWS]


def keep(path: Path, records: Iterable[dict], rank: int) -> str:
    """Rank 0 writes `records` as JSON lines; what came of it, for people, on every rank. Collective over the world:
    no rank goes on, or ends the run, before the file is there. A disk that is full is said and stops nothing."""
    said = [""]
    if rank == 0:
        try:
            with replacing(path) as tmp:
                tmp.write_text("".join(json.dumps(_named(record), allow_nan=False) + "\n" for record in records))
            said = [f"see {path}"]
        except OSError as error:
            said = [f"{path} could not be written ({error})"]
    dist.broadcast_object_list(said, src=0)
    return said[0]


def _nan_is_most(difference: float) -> float:
    return math.inf if math.isnan(difference) else difference


def _named(value: Any) -> Any:
    """`value` with numbers that are not finite as strings."""
    if isinstance(value, dict):
        return {key: _named(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_named(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
