"""What the preparation commands (gsm8k.py, math.py) have in common: published files in, train and test parquet out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from remax_megatron.data.rows import read_jsonl
from remax_megatron.data.schema import DataError, write_parquet

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Preparation:
    """One data set: its name on the hub and there its config (None: the only one), and (example, split, index) -> row
    of `schema`, which raises DataError for an example that does not fit."""

    name: str
    data_source: str
    config: str | None
    to_row: Callable[[Mapping[str, Any], str, int], dict[str, Any]]
    schema: pa.Schema

    def rows_from_jsonl(self, folder: Path, split: str) -> list[dict[str, Any]]:
        """The rows of `folder/split.jsonl`, in order. DataError "FILE:LINE: ..." for the first bad line."""
        path = folder / f"{split}.jsonl"
        rows: list[dict[str, Any]] = []
        for line, example in read_jsonl(path):
            if isinstance(example, DataError):
                raise example
            try:
                rows.append(self.to_row(example, split, len(rows)))
            except DataError as error:
                raise DataError(f"{path}:{line}: {error}") from error
        if not rows:
            raise DataError(f"{path}: no rows")
        return rows

    def rows_from_hub(self, split: str) -> Iterator[dict[str, Any]]:
        """The rows of the split as the hub has them (needs the network or a filled cache of `datasets`)."""
        import datasets
        import httpx

        try:
            examples = datasets.load_dataset(self.data_source, self.config, split=split)
        except (OSError, httpx.HTTPError) as error:  # offline, not in the cache, not reachable: all of these end here
            reason = str(error).strip().splitlines()[0]
            place = ", ".join(part for part in (self.config, split) if part)
            raise DataError(
                f"{self.data_source} ({place}) cannot be read from the hub: {reason}; "
                "with the published files at hand, use --from_jsonl DIR (DIR/train.jsonl and DIR/test.jsonl)"
            ) from error
        for index, example in enumerate(examples):
            yield self.to_row(example, split, index)

    def write(self, local_dir: Path, from_jsonl: Path | None = None) -> dict[str, int]:
        """Writes both files and returns the number of rows of each split."""
        rows = {}
        for split in SPLITS:
            print(f"{split}: reading {from_jsonl or 'the hub'}", flush=True)
            rows[split] = list(
                self.rows_from_hub(split) if from_jsonl is None else self.rows_from_jsonl(from_jsonl, split)
            )
        return {split: write_parquet(rows[split], local_dir / f"{split}.parquet", self.schema) for split in SPLITS}

    def command(self, module: str, argv: list[str] | None) -> int:
        """The command line of `python -m MODULE`; returns the exit code."""
        parser = argparse.ArgumentParser(
            prog=f"python -m {module}", description=f"Writes {self.name} as train.parquet and test.parquet."
        )
        parser.add_argument("--local_dir", type=Path, required=True, help="folder for the two parquet files")
        parser.add_argument("--from_jsonl", type=Path, help="folder with train.jsonl and test.jsonl (default: the hub)")
        args = parser.parse_args(argv)
        local_dir = args.local_dir.expanduser()
        try:
            counts = self.write(local_dir, args.from_jsonl and args.from_jsonl.expanduser())
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"wrote {counts['train']} train and {counts['test']} test rows to {local_dir}")
        return 0
