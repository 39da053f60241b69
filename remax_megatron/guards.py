"""What happens when an update must not be made: which step is forbidden, what is kept of its rows, how the run stops.

Two things forbid an optimizer step (Policy.update asks `skip_reason`, on every rank alike): a loss or a gradient that
is not finite, and an engine whose log-probabilities are not those of the policy. The first is skipped, and stops the
run only after `trainer.max_nonfinite_updates` in a row; the second stops it at once. Either way the rows are in
`trainer.default_local_dir`/guards/*.jsonl, one JSON object per row; numbers that are not finite, for which JSON has no
word, are the strings "nan", "inf" and "-inf" there (Python's float() reads them).
"""

from __future__ import annotations

import enum
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from remax_megatron.atomic import replacing
from remax_megatron.types import Row

if TYPE_CHECKING:
    from remax_megatron.policy.policy import Policy
    from remax_megatron.policy.trained_model import UpdateResult

log = logging.getLogger(__name__)


class Skip(enum.IntEnum):
    """Why an optimizer step was not made, the graver the later; NONE: it was made."""

    NONE = 0
    MISMATCH = 1
    NONFINITE = 2


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


def skip_reason(loss: float, grad_norm: float, mismatch: float, limit: float | None) -> Skip:
    """Why an update with these sums over all ranks must not be made; `limit` None: the mismatch is not looked at.

    A mismatch that is NaN is over any limit.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return Skip.NONFINITE
    return Skip.MISMATCH if limit is not None and not mismatch <= limit else Skip.NONE


class Guards:
    """Looks at every update of a run: counts those that were skipped, keeps their rows, and stops the run."""

    def __init__(self, policy: Policy, folder: Path, *, max_nonfinite: int, mismatch_limit: float | None):
        """`folder` gets the rows; `max_nonfinite` is trainer.max_nonfinite_updates, `mismatch_limit` in nats,
        None where engine and policy are known to differ."""
        self._policy, self._folder = policy, folder
        self._max_nonfinite, self._mismatch_limit = max_nonfinite, mismatch_limit
        self.nonfinite_in_a_row = 0

    def state_dict(self) -> dict[str, int]:
        """Return what a checkpoint keeps."""
        return {"nonfinite_in_a_row": self.nonfinite_in_a_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Take over what `state_dict` gave."""
        self.nonfinite_in_a_row = state["nonfinite_in_a_row"]

    def mismatch_limit(self, before: Sequence[UpdateResult]) -> float | None:
        """The limit for the next update of a batch after the updates `before`. None once a step was made: until then
        the weights are those that wrote the answers, and engine and policy must agree."""
        return self._mismatch_limit if all(update.skipped for update in before) else None

    def check(self, update: UpdateResult, rows: list[Row], *, label: str, number: int, count: int, step: int) -> None:
        """Report `update`, which is `number` of `count` in this `step` of the run. Collective.

        A skipped one is written down with its `rows` and logged after `label`. MismatchError, or NonFiniteError when it
        is one too many, on every rank.
        """
        if update.skipped == Skip.MISMATCH:
            self._stop_for_mismatch(update, rows, label, step)
        if update.skipped == Skip.NONFINITE:
            self.nonfinite_in_a_row += 1
            self._report_nonfinite(update, rows, f"{label}: update {number} of {count}", f"{step}-update{number}")
        else:
            self.nonfinite_in_a_row = 0

    def metrics(self, updates: Sequence[UpdateResult]) -> dict[str, float]:
        """Skipped updates of a batch, and how many in a row the run has had up to its end."""
        return {
            "guard/nonfinite_updates": sum(update.skipped == Skip.NONFINITE for update in updates),
            "guard/nonfinite_in_a_row": self.nonfinite_in_a_row,
        }

    def _report_nonfinite(self, update: UpdateResult, rows: list[Row], which: str, where: str) -> None:
        found = update.nonfinite_rows
        logprobs = self._policy.logprobs([rows[i] for i in found] if found else rows)
        file = self._folder / f"nonfinite-step{where}.jsonl"
        saved = save_rows(file, nonfinite_records(rows, found, logprobs), self._policy.layout.rank)
        blame = f"{len(found)} of {len(rows)} rows have such a loss" if found else "no row's loss is to blame"
        what = (
            f"{which} was skipped, the weights were not changed: loss {update.loss:g}, gradient norm "
            f"{update.grad_norm:g}; {blame}, {saved}."
        )
        count, limit = self.nonfinite_in_a_row, self._max_nonfinite
        if count < limit:
            log.warning("%s %d in a row, trainer.max_nonfinite_updates=%d end the run", what, count, limit)
            return
        raise NonFiniteError(
            f"{what} It is number {count} in a row, and trainer.max_nonfinite_updates={limit}. Look for what is not "
            "finite in that file: advantages come from the reward function; log-probabilities come from the weights, "
            "which a lower actor_rollout_ref.actor.optim.lr or an actor_rollout_ref.actor.optim.clip_grad of 1.0 may "
            "keep sound; a higher trainer.max_nonfinite_updates skips more"
        )

    def _stop_for_mismatch(self, update: UpdateResult, rows: list[Row], label: str, step: int) -> None:
        """MismatchError with the worst token, after the worst rows are on the disk."""
        records = mismatch_records(rows, self._policy.logprobs(rows))
        saved = save_rows(self._folder / f"mismatch-step{step}.jsonl", records, self._policy.layout.rank)
        worst = records[0]["worst"]
        assert self._mismatch_limit is not None, "without a limit no update is over it"
        raise MismatchError(
            f"{label}: the rollout engine's log-probabilities are not the policy's: they differ by "
            f"{update.mismatch:.3g} nats on average over {update.num_response_tokens} response tokens, limit "
            f"{self._mismatch_limit:g} (actor_rollout_ref.rollout.mismatch_threshold); worst in row "
            f"{records[0]['row']} at response position {worst['position']}, token {worst['token']}: policy "
            f"{worst['policy']:.6f}, engine {worst['engine']:.6f}; {saved}. No step was made with them. Rounding alone "
            "is within 1e-3 in float32 and 0.2 in bfloat16: set a higher limit only if yours is known to be larger"
        )


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
        why = _not_finite(streams)
        why.insert(0, "the loss is not finite" if numbers else "the gradient of the update is not finite, its rows are")
        ids = {"row": number, "prompt_ids": list(row.prompt_ids), "response_ids": row.response_ids}
        records.append({**ids, **streams, "weight": row.weight, "why": "; ".join(why)})
    return records


def taught_records(rows: Sequence[Row], numbers: Sequence[int]) -> list[dict]:
    """What is kept of the rows `numbers` of a critic's update that is not finite; [] of them: of all rows."""
    records = []
    for number in numbers or range(len(rows)):
        row = rows[number]
        streams = {"values": row.values or [], "returns": row.returns or []}
        ids = {"row": number, "prompt_ids": list(row.prompt_ids), "response_ids": row.response_ids}
        records.append({**ids, **streams, "weight": row.weight, "why": "; ".join(_not_finite(streams))})
    return records


def _not_finite(streams: Mapping[str, Sequence[float]]) -> list[str]:
    """Of each list its first number that is not finite, in words."""
    return [
        f"{name}[{i}] is {values[i]}"
        for name, values in streams.items()
        for i in [i for i, value in enumerate(values) if not math.isfinite(value)][:1]
    ]


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


def save_rows(path: Path, records: Iterable[dict], rank: int) -> str:
    """Let rank 0 write `records` as JSON lines; returns, on every rank, a part of a sentence that says where they are.

    Collective over the world: no rank continues, or ends the run, before the file is there. A full disk is reported and
    stops nothing.
    """
    report = [""]
    if rank == 0:
        try:
            with replacing(path) as tmp:
                tmp.write_text("".join(json.dumps(_named(record), allow_nan=False) + "\n" for record in records))
            report = [f"see {path}"]
        except OSError as error:
            report = [f"{path} could not be written ({error})"]
    dist.broadcast_object_list(report, src=0)
    return report[0]


def _nan_is_most(difference: float) -> float:
    return math.inf if math.isnan(difference) else difference


def _named(value: Any) -> Any:
    """`value` with numbers that are not finite as strings."""
    if isinstance(value, dict):
        return {key: _named(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_named(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
