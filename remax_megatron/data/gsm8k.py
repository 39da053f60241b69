r"""GSM8K as parquet: `train.parquet` (7473 rows) and `test.parquet` (1319 rows), in the schema of schema.py.

    python -m remax_megatron.data.gsm8k --local_dir ~/data/gsm8k                    # from the hub: openai/gsm8k, main
    python -m remax_megatron.data.gsm8k --local_dir ~/data/gsm8k --from_jsonl DIR   # from DIR/{train,test}.jsonl

The local files hold one object per line with `question` and `answer`, as published. Each prompt is the question and
the instruction to end with `####`; the ground truth is the number after `#### ` in the answer, without commas.
Both files are made before either is written. A bad line ends the command with one line `FILE:LINE: ...` on stderr and
exit code 2. It does not apply a chat template (the loader does) and does not score (rewards/gsm8k.py does).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

from remax_megatron.data.prepare import Preparation
from remax_megatron.data.schema import GSM8K_SCHEMA, DataError, make_row

DATA_SOURCE = "openai/gsm8k"
INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'
_GROUND_TRUTH = re.compile(r"#### (\-?[0-9\.\,]+)")


def extract_ground_truth(answer: str) -> str:
    """The number after `#### ` in a published answer, commas removed: "... #### 1,000" -> "1000".

    DataError where there is none.
    """
    match = _GROUND_TRUTH.search(answer)
    if match is None:
        raise DataError(f"no '#### NUMBER' in the answer {answer[-80:]!r}")
    return match.group(1).replace(",", "")


def to_row(example: Mapping[str, Any], split: str, index: int) -> dict[str, Any]:
    """One row of the schema from {question, answer}; DataError for a missing or non-text field."""
    for key in ("question", "answer"):
        if not isinstance(example.get(key), str):
            raise DataError(f"field {key!r} must be text, found {example.get(key)!r}; fields: {sorted(example)}")
    question, answer = example["question"], example["answer"]
    return make_row(
        data_source=DATA_SOURCE,
        prompt=f"{question} {INSTRUCTION}",
        ground_truth=extract_ground_truth(answer),
        extra_info={"split": split, "index": index, "answer": answer, "question": question},
    )


GSM8K = Preparation("GSM8K", DATA_SOURCE, "main", to_row, GSM8K_SCHEMA)


def main(argv: list[str] | None = None) -> int:
    """Write GSM8K as parquet files."""
    return GSM8K.command("remax_megatron.data.gsm8k", argv)


if __name__ == "__main__":
    sys.exit(main())
