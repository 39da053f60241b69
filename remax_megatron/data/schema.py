"""The parquet schema of a data set, and its writer. Shared by every preparation command; reading is in dataset.py.

Columns in order: `data_source`, `prompt` (list of {role, content} turns), `ability`, `reward_model` {style,
ground_truth}, `extra_info` (struct; its fields differ between data sets), then any columns of the data set's own. The
names are those of verl's preparation scripts, so files of either are read by both.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from remax_megatron.atomic import replacing
from remax_megatron.errors import UserError


class DataError(UserError):
    """A data file, or a data setting, that cannot be used; the message names the file, the place and the fix."""


def prompt_schema(extra_info: Mapping[str, pa.DataType], more: Mapping[str, pa.DataType] | None = None) -> pa.Schema:
    """The schema with the given fields of `extra_info`, in order, and `more` columns after it."""
    return pa.schema(
        [
            ("data_source", pa.string()),
            ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
            ("ability", pa.string()),
            ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
            ("extra_info", pa.struct(list(extra_info.items()))),
            *(more or {}).items(),
        ]
    )


GSM8K_SCHEMA = prompt_schema(
    {"split": pa.string(), "index": pa.int64(), "answer": pa.string(), "question": pa.string()}
)


def make_row(
    *, data_source: str, prompt: str, ground_truth: str, extra_info: dict[str, Any], ability: str = "math", **more: Any
) -> dict[str, Any]:
    """One row with a single user turn and a rule-based reward; `more` are the data set's own columns."""
    return {
        "data_source": data_source,
        "prompt": [{"role": "user", "content": prompt}],
        "ability": ability,
        "reward_model": {"style": "rule", "ground_truth": ground_truth},
        "extra_info": extra_info,
        **more,
    }


def write_parquet(
    rows: Iterable[Mapping[str, Any]], path: str | os.PathLike[str], schema: pa.Schema = GSM8K_SCHEMA
) -> int:
    """Writes `rows` to `path`, whole or not at all, and returns their number.

    A value that does not fit the schema, and a column or `extra_info` field that the schema lacks, is a DataError
    naming the row: pyarrow would drop the latter silently.
    """
    rows = list(rows)
    extra_fields = {field.name for field in schema.field("extra_info").type}
    for i, row in enumerate(rows):
        if unknown := (row.keys() - set(schema.names)) | (row["extra_info"].keys() - extra_fields):
            raise DataError(f"{path}: row {i} has {sorted(unknown)}, which the schema lacks ({schema.names})")
        if missing := set(schema.names) - row.keys():
            raise DataError(f"{path}: row {i} lacks {sorted(missing)}")
    try:
        table = pa.Table.from_pylist(rows, schema=schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"{path}: a row does not fit the schema: {error}") from error
    with replacing(path) as tmp:
        pq.write_table(table, tmp, write_page_checksum=True)  # the loader verifies: a flipped bit is an error
    return len(rows)
