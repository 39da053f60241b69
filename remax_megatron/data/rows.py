"""The rows of a data file, as plain Python values: .parquet, .json (a list of objects, or one per line) and .jsonl.

Every refusal is a DataError with the file, the row (a line for JSON lines) and the fix. A row that cannot be read is
handed out as its DataError, so that the reader can go on and show several at once; a file that cannot is raised.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from remax_megatron.data.schema import DataError
from remax_megatron.data_files import SUFFIXES

NOT_READ = ("images", "videos", "audios", "multi_modal_data", "tools")
NO_TEXT = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x1f\x8b": "gzip", b"PAR1": "parquet"}
Row = tuple[str, dict[str, Any] | DataError]  # the place for messages, and the row


def read_rows(path: Path, prompt_key: str) -> Iterator[Row]:
    """Each row of the file at `path`, with the columns that a prompt needs."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        rows = _read_parquet(path, prompt_key)
    elif suffix in SUFFIXES:
        rows = _read_json(path)
    else:
        raise DataError(f"{path}: unknown kind of file {path.suffix!r}; use .parquet, .json or .jsonl")
    for place, row in rows:
        yield place, row if isinstance(row, DataError) else _with_columns(row, place, prompt_key)


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    """(line number from 1, object, or what is wrong with the line) of each line; blank lines are skipped."""
    for number, line in enumerate(_read_bytes(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:  # also a UnicodeDecodeError
            yield number, DataError(f"{path}:{number}: not JSON: {error}")
            continue
        yield number, value if isinstance(value, dict) else _not_an_object(f"{path}:{number}", value)


def as_messages(value: Any, place: str, prompt_key: str = "prompt") -> list[dict[str, str]]:
    """The turns of a prompt: text is one user turn; a list, tuple or numpy array holds {role, content} objects.

    Text that is JSON for such a list is that list.
    """
    if isinstance(value, str):
        value = _turns_in_text(value, place, prompt_key) or [{"role": "user", "content": value}]
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list | tuple) or not value:
        raise DataError(f"{place}: {prompt_key} must be text or a list of {{role, content}}, found {value!r}")
    for turn in value:
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(k), str) for k in ("role", "content")):
            raise DataError(f"{place}: each turn of {prompt_key} needs the texts 'role' and 'content', found {turn!r}")
    for turn in value:
        if more := sorted(
            name for name in turn if name not in ("role", "content") and turn[name] not in (None, [], "")
        ):
            raise DataError(f"{place}: a turn of {prompt_key} has {', '.join(more)}, which is not read; leave it out")
        try:
            turn["content"].encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{place}: {prompt_key} holds half of a character ({error}); repair the text") from error
    if not any(turn["content"].strip() for turn in value):
        raise DataError(f"{place}: {prompt_key} is empty; write its text, or leave the row out")
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def _turns_in_text(text: str, place: str, prompt_key: str) -> list[Any] | None:
    """The list of turns that `text` is JSON for; None for plain text, DataError for what is nearly such a list."""
    if text.lstrip()[:1] not in ("[", "{"):
        return None
    turns = _objects(text)
    looks = turns is not None or ("role" in text and "content" in text and text.rstrip()[-1:] in ("]", "}"))
    if looks and (turns is None or not all("role" in turn and "content" in turn for turn in turns)):
        raise DataError(
            f"{place}: {prompt_key} is text that looks like a list of turns, but is not JSON for a list of "
            f"{{role, content}}: {text[:80]!r}; write the list itself, or plain text"
        )
    return turns


def _objects(text: str) -> list[dict[str, Any]] | None:
    """The JSON list of objects that `text` is; None where it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value) else None


def _read_bytes(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    for mark, kind in NO_TEXT.items():
        if content.startswith(mark):
            raise DataError(f"{path}: is {kind}, not UTF-8 text; convert it, or give it the name of what it is")
    return content.removeprefix(b"\xef\xbb\xbf")  # the mark that some editors put before UTF-8


def _with_columns(row: dict[str, Any], place: str, prompt_key: str) -> dict[str, Any] | DataError:
    reward_model = row.get("reward_model")
    fields = set(reward_model) if isinstance(reward_model, dict) else set()
    if unread := [name for name in NOT_READ if row.get(name) is not None and len(row[name])]:
        return DataError(f"{place}: has {', '.join(unread)}, which a model of text alone does not read; leave it out")
    return _missing_column(place, set(row), fields, prompt_key) or row


def _missing_column(place: str, columns: set[str], reward_model_fields: set[str], prompt_key: str) -> DataError | None:
    found = (columns - {"reward_model.ground_truth"}) | {f"reward_model.{field}" for field in reward_model_fields}
    for needed in (prompt_key, "data_source", "reward_model.ground_truth"):
        if needed not in found:
            fix = "; data.prompt_key names the prompt's column" if needed == prompt_key else ""
            if needed in columns:
                return DataError(
                    f"{place}: 'reward_model.ground_truth' is a column of its own; nest it: "
                    '{"reward_model": {"ground_truth": ...}}'
                )
            return DataError(f"{place}: no column {needed!r}; found: {', '.join(sorted(found)) or 'none'}{fix}")
    return None


def _read_parquet(path: Path, prompt_key: str) -> Iterator[Row]:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:  # where the file has checksums
            schema = file.schema_arrow
            wanted = (prompt_key, "data_source", "reward_model", "extra_info", *NOT_READ)
            columns = [c for c in wanted if c in schema.names]
            if twice := [c for c in columns if schema.names.count(c) > 1]:
                raise DataError(f"{path}: has several columns {twice[0]!r}; keep one")
            reward_model = schema.field("reward_model").type if "reward_model" in schema.names else pa.null()
            fields = {f.name for f in reward_model} if pa.types.is_struct(reward_model) else set()
            if missing := _missing_column(str(path), set(schema.names), fields, prompt_key):
                raise missing
            rows = file.read(columns=columns).to_pylist(maps_as_pydicts="lossy")
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # corrupt, cut, missing, a folder
        if isinstance(error, DataError):
            raise
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"{path}: cannot be read as parquet: {reason}") from error
    for number, row in enumerate(rows):
        yield f"{path}: row {number}", row


def _read_json(path: Path) -> Iterator[Row]:
    """A .json file that opens with `[` is a list of objects; anything else is one object per line."""
    content = _read_bytes(path).lstrip()
    if path.suffix.lower() != ".jsonl" and _is_one_object(content):
        raise DataError(f"{path}: holds one object over several lines; a list of objects, or one per line, is needed")
    if path.suffix.lower() == ".jsonl" or not content.startswith(b"["):
        for line, row in read_jsonl(path):
            yield f"{path}:{line}", row
        return
    try:
        rows = json.loads(_read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    for number, row in enumerate(rows):
        place = f"{path}: row {number}"
        yield place, row if isinstance(row, dict) else _not_an_object(place, row)


def _is_one_object(content: bytes) -> bool:
    """Whether a file is a single JSON object that takes more than a line."""
    try:
        return content.startswith(b"{") and b"\n" in content.strip() and isinstance(json.loads(content), dict)
    except (ValueError, RecursionError):
        return False


def _not_an_object(place: str, value: Any) -> DataError:
    return DataError(f"{place}: an object is needed, found {type(value).__name__}")
