r"""MATH as parquet: `train.parquet` (7500 rows) and `test.parquet` (5000 rows), in the schema of schema.py.

    python -m remax_megatron.data.math --local_dir ~/data/math                    # DigitalLearningGmbH/MATH-lighteval
    python -m remax_megatron.data.math --local_dir ~/data/math --from_jsonl DIR   # from DIR/{train,test}.jsonl

The local files hold one object per line with `problem`, `solution`, and `level` and `type`, which stay as columns of
their own. Each prompt is the problem and the instruction to put the answer in a \boxed{}; the ground truth is the
content of the solution's last box. Both files are made before either is written. A bad line ends the command with one
line `FILE:LINE: ...` on stderr and exit code 2. It does not apply a chat template (the loader does) and does not score
(rewards/math.py does).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from remax_megatron.data.prepare import Preparation
from remax_megatron.data.schema import DataError, make_row, prompt_schema
from remax_megatron.rewards.boxed import last_boxed

DATA_SOURCE = "DigitalLearningGmbH/MATH-lighteval"
INSTRUCTION = "Let's think step by step and output the final answer within \\boxed{}."
MATH_SCHEMA = prompt_schema({"split": pa.string(), "index": pa.int64()}, {"level": pa.string(), "type": pa.string()})


def extract_ground_truth(solution: str) -> str:
    r"""The content of the last \boxed{} of a published solution; DataError where there is none."""
    answer = last_boxed(solution)
    if answer is None:
        raise DataError(f"no \\boxed{{...}} in the solution {solution[-80:]!r}")
    return answer


def to_row(example: Mapping[str, Any], split: str, index: int) -> dict[str, Any]:
    """One row from {problem, solution, level, type}; DataError for a missing or non-text field. The last two may be
    missing or null."""
    for key in ("problem", "solution"):
        if not isinstance(example.get(key), str):
            raise DataError(f"field {key!r} must be text, found {example.get(key)!r}; fields: {sorted(example)}")
    for key in ("level", "type"):
        if not isinstance(example.get(key), str | None):
            raise DataError(f"field {key!r} must be text, found {example[key]!r}")
    return make_row(
        data_source=DATA_SOURCE,
        prompt=f"{example['problem']} {INSTRUCTION}",
        ground_truth=extract_ground_truth(example["solution"]),
        extra_info={"split": split, "index": index},
        level=example.get("level"),
        type=example.get("type"),
    )


MATH = Preparation("MATH", DATA_SOURCE, None, to_row, MATH_SCHEMA)


def main(argv: list[str] | None = None) -> int:
    """Write MATH as parquet files."""
    return MATH.command("remax_megatron.data.math", argv)


if __name__ == "__main__":
    sys.exit(main())
