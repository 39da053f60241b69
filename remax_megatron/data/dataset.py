"""From data files to tokenised prompts, and the order in which the trainer takes them.

Reads .parquet, .json (a list of objects, or one object per line) and .jsonl, as prepared by this package or by verl's
scripts: extra columns are ignored, `extra_info` may differ between files or be missing. The model's chat template turns
a prompt into tokens. It does not score, does not pad, and does not cache: 7473 GSM8K prompts take about a second.

Every refusal is a DataError with the file, the row (a line for JSON lines) and the fix.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from remax_megatron.data.schema import DataError
from remax_megatron.types import Prompt

log = logging.getLogger(__name__)

TRUNCATIONS = ("error", "left", "right")


@dataclass(frozen=True)
class PromptDataset(Sequence[Prompt]):
    """The usable prompts, in file order. `Prompt.index` is the row's number over all files, before filtering.

    `num_rows == len(self) + num_filtered`; `num_truncated` of the prompts were cut.
    """

    prompts: list[Prompt]
    num_rows: int
    num_filtered: int = 0
    num_truncated: int = 0

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, i: Any) -> Any:
        return self.prompts[i]


def load_prompts(
    files: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    tokenizer: Any,
    *,
    max_prompt_length: int,
    filter_overlong_prompts: bool = True,
    truncation: str = "error",
    prompt_key: str = "prompt",
) -> PromptDataset:
    """Reads and tokenises `files` (one path or several; `~` is expanded).

    A prompt longer than `max_prompt_length` tokens, chat template included, is left out when `filter_overlong_prompts`;
    otherwise `truncation` refuses it ("error"), or cuts tokens off its "left" or "right" end. A prompt that is plain
    text counts as one user turn; `prompt_key` names the column. `tokenizer` is a transformers tokenizer with a chat
    template.
    """
    if truncation not in TRUNCATIONS:
        raise DataError(f"data.truncation={truncation!r} is unknown; use one of {', '.join(TRUNCATIONS)}")
    paths = [Path(f).expanduser() for f in ([files] if isinstance(files, str | os.PathLike) else files)]
    if not paths:
        raise DataError("no data files: name at least one .parquet, .json or .jsonl file in data.train_files")

    prompts: list[Prompt] = []
    lengths: list[int] = []
    num_truncated = 0
    for path in paths:
        for place, row in _read_rows(path, prompt_key):
            prompt = _to_prompt(row, place, len(lengths), tokenizer, prompt_key)
            ids = prompt.token_ids
            lengths.append(len(ids))
            if len(ids) > max_prompt_length:
                if filter_overlong_prompts:
                    continue
                if truncation == "error":
                    raise DataError(
                        f"{place}: the prompt has {len(ids)} tokens, data.max_prompt_length is {max_prompt_length}; "
                        "raise it, or set data.filter_overlong_prompts=True or data.truncation=left"
                    )
                num_truncated += 1
                cut = ids[-max_prompt_length:] if truncation == "left" else ids[:max_prompt_length]
                prompt = Prompt(prompt.index, cut, prompt.data_source, prompt.ground_truth, prompt.extra_info)
            prompts.append(prompt)

    names = ", ".join(map(str, paths))
    if not lengths:
        raise DataError(f"{names}: no rows")
    if not prompts:
        raise DataError(
            f"{names}: none of the {len(lengths)} prompts fits data.max_prompt_length={max_prompt_length}; the "
            f"shortest has {min(lengths)} tokens with the chat template, the longest {max(lengths)}: raise it"
        )
    dataset = PromptDataset(prompts, len(lengths), len(lengths) - len(prompts), num_truncated)
    if dataset.num_filtered or num_truncated:
        log.warning(
            "%s: of %d prompts, %d are longer than data.max_prompt_length=%d and were left out, %d were cut",
            *(names, dataset.num_rows, dataset.num_filtered, max_prompt_length, num_truncated),
        )
    return dataset


def batches(num_prompts: int, batch_size: int, seed: int, epoch: int, shuffle: bool = True) -> list[list[int]]:
    """The batches of one epoch, as positions 0 .. num_prompts - 1 in the data set.

    A function of its arguments alone (numpy PCG64 seeded with (seed, epoch)): a resumed run finds its place again. The
    remainder of num_prompts / batch_size is dropped, as in verl; with shuffle another remainder each epoch. `seed` and
    `epoch` are at least 0. Example: batches(5, 2, seed=1, epoch=0, shuffle=False) == [[0, 1], [2, 3]]
    """
    if batch_size < 1:
        raise DataError(f"data.train_batch_size={batch_size} must be at least 1")
    if num_prompts < batch_size:
        raise DataError(
            f"data.train_batch_size={batch_size} is more than the {num_prompts} usable prompts: not one batch; "
            f"set it to {num_prompts} or less"
        )
    order = np.arange(num_prompts)
    if shuffle:
        np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch]))).shuffle(order)
    num_batches = num_prompts // batch_size
    return [[int(i) for i in row] for row in order[: num_batches * batch_size].reshape(num_batches, batch_size)]


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of each line; blank lines are skipped. DataError "FILE:LINE: ..." for a bad one."""
    for number, line in enumerate(_read_bytes(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:  # also a UnicodeDecodeError
            raise DataError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(value, dict):
            raise DataError(f"{path}:{number}: an object is needed, found {type(value).__name__}")
        yield number, value


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _read_rows(path: Path, prompt_key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place for messages, row) of each row; the needed columns are known to be there."""
    if path.suffix == ".parquet":
        yield from _read_parquet(path, prompt_key)
    elif path.suffix in (".json", ".jsonl"):
        for place, row in _read_json(path):
            reward_model = row.get("reward_model")
            fields = set(reward_model) if isinstance(reward_model, dict) else set()
            _need_columns(place, set(row), fields, prompt_key)
            yield place, row
    else:
        raise DataError(f"{path}: unknown kind of file {path.suffix!r}; use .parquet, .json or .jsonl")


def _need_columns(place: str, columns: set[str], reward_model_fields: set[str], prompt_key: str) -> None:
    found = columns | {f"reward_model.{field}" for field in reward_model_fields}
    for needed in (prompt_key, "data_source", "reward_model.ground_truth"):
        if needed not in found:
            fix = "; data.prompt_key names the prompt's column" if needed == prompt_key else ""
            raise DataError(f"{place}: no column {needed!r}; found: {', '.join(sorted(found)) or 'none'}{fix}")


def _read_parquet(path: Path, prompt_key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:  # where the file has checksums
            schema = file.schema_arrow
            reward_model = schema.field("reward_model").type if "reward_model" in schema.names else pa.null()
            fields = {f.name for f in reward_model} if pa.types.is_struct(reward_model) else set()
            _need_columns(str(path), set(schema.names), fields, prompt_key)
            columns = [c for c in (prompt_key, "data_source", "reward_model", "extra_info") if c in schema.names]
            rows = file.read(columns=columns).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # corrupt (any of them), cut, missing, a folder
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"{path}: cannot be read as parquet: {reason}") from error
    for number, row in enumerate(rows):
        yield f"{path}: row {number}", row


def _read_json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """A .json file that opens with `[` is a list of objects; anything else is one object per line."""
    if path.suffix == ".jsonl" or not _read_bytes(path).lstrip().startswith(b"["):
        for line, row in read_jsonl(path):
            yield f"{path}:{line}", row
        return
    try:
        rows = json.loads(_read_bytes(path))
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {number}: an object is needed, found {type(row).__name__}")
        yield f"{path}: row {number}", row


def _to_prompt(row: Mapping[str, Any], place: str, index: int, tokenizer: Any, prompt_key: str) -> Prompt:
    data_source, ground_truth = row["data_source"], row["reward_model"] and row["reward_model"]["ground_truth"]
    if not isinstance(data_source, str):
        raise DataError(f"{place}: data_source must be text, found {data_source!r}")
    if ground_truth is None:
        raise DataError(f"{place}: reward_model.ground_truth is empty")
    extra_info = row.get("extra_info") or {}
    if not isinstance(extra_info, Mapping):
        raise DataError(f"{place}: extra_info must be an object, found {extra_info!r}")
    messages = as_messages(row[prompt_key], place, prompt_key)
    try:
        # return_dict=False: transformers 5 otherwise returns a BatchEncoding
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    except (ValueError, jinja2.TemplateError) as error:  # no template at all; a template that refuses these turns
        raise DataError(f"{place}: the tokenizer's chat template cannot be applied: {error}") from error
    return Prompt(
        index=index,
        token_ids=tuple(ids),
        data_source=data_source,
        # Scorers take text; numbers and lists of other data sets reach a custom scorer as JSON.
        ground_truth=ground_truth if isinstance(ground_truth, str) else json.dumps(ground_truth),
        extra_info=dict(extra_info),
    )


def as_messages(value: Any, place: str, prompt_key: str = "prompt") -> list[dict[str, str]]:
    """The turns of a prompt: text is one user turn; a list, tuple or numpy array holds {role, content} objects."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list | tuple) or not value:
        raise DataError(f"{place}: {prompt_key} must be text or a list of {{role, content}}, found {value!r}")
    for turn in value:
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(k), str) for k in ("role", "content")):
            raise DataError(f"{place}: each turn of {prompt_key} needs the texts 'role' and 'content', found {turn!r}")
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]
