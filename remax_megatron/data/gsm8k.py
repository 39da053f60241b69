r"""GSM8K as parquet: `train.parquet` (7473 rows) and `test.parquet` (1319 rows), in the schema of schema.py.

    python -m remax_megatron.data.gsm8k --local_dir ~/data/gsm8k                    # from the hub: openai/gsm8k, main
    python -m remax_megatron.data.gsm8k --local_dir ~/data/gsm8k --from_jsonl DIR   # from DIR/{train,test}.jsonl

The local files hold one object per line with `question` and `answer`, as published. Each prompt is the question and
the instruction to end with `####`; the ground truth is the number after `#### ` in the answer, without commas.
Both files are made before either is written. A bad line ends the command with one line `FILE:LINE: ...` on stderr and
exit code 2. It does not apply a chat template (the loader does) and does not score (rewards/gsm8k.py does).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from remax_megatron.data.dataset import read_jsonl
from remax_megatron.data.schema import DataError, make_row, write_parquet

DATA_SOURCE = "openai/gsm8k"
INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'
SPLITS = ("train", "test")
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


def rows_from_jsonl(folder: Path, split: str) -> list[dict[str, Any]]:
    """The rows of `folder/split.jsonl`, in order. DataError "FILE:LINE: ..." for the first bad line."""
    path = folder / f"{split}.jsonl"
    rows: list[dict[str, Any]] = []
    for line, example in read_jsonl(path):
        try:
            rows.append(to_row(example, split, len(rows)))
        except DataError as error:
            raise DataError(f"{path}:{line}: {error}") from error
    if not rows:
        raise DataError(f"{path}: no rows")
    return rows


def rows_from_hub(split: str) -> Iterator[dict[str, Any]]:
    """The rows of the split as the hub has them (needs the network or a filled cache of `datasets`)."""
    import datasets
    import httpx

    try:
        examples = datasets.load_dataset(DATA_SOURCE, "main", split=split)
    except (OSError, httpx.HTTPError) as error:  # offline, not in the cache, not reachable: all of these end here
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"{DATA_SOURCE} (main, {split}) cannot be read from the hub: {reason}; "
            "with the published files at hand, use --from_jsonl DIR (DIR/train.jsonl and DIR/test.jsonl)"
        ) from error
    for index, example in enumerate(examples):
        yield to_row(example, split, index)


def prepare(local_dir: Path, from_jsonl: Path | None = None) -> dict[str, int]:
    """Writes both files and returns the number of rows of each split."""
    rows = {}
    for split in SPLITS:
        print(f"{split}: reading {from_jsonl or 'the hub'}", flush=True)
        rows[split] = list(rows_from_hub(split)) if from_jsonl is None else rows_from_jsonl(from_jsonl, split)
    return {split: write_parquet(rows[split], local_dir / f"{split}.parquet") for split in SPLITS}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m remax_megatron.data.gsm8k", description="Writes GSM8K as train.parquet and test.parquet."
    )
    parser.add_argument("--local_dir", type=Path, required=True, help="folder for the two parquet files")
    parser.add_argument("--from_jsonl", type=Path, help="folder with train.jsonl and test.jsonl (default: the hub)")
    args = parser.parse_args(argv)
    local_dir = args.local_dir.expanduser()
    try:
        counts = prepare(local_dir, args.from_jsonl and args.from_jsonl.expanduser())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {counts['train']} train and {counts['test']} test rows to {local_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
