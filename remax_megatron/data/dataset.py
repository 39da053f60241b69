"""From data files to tokenised prompts, and the order in which the trainer takes them.

Reads what rows.py reads, as prepared by this package or by verl's scripts: extra columns are ignored, `extra_info` may
differ between files or be missing. The model's chat template turns a prompt into tokens. It does not score, does not
pad, and does not cache: 7473 GSM8K prompts take about two seconds.

This is the one pass over the data before anything starts: what is wrong with a row is found here, with its file, its
row and the fix, and up to SHOWN_PROBLEMS of them are shown at once.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from remax_megatron.data.rows import as_messages, read_rows
from remax_megatron.data.schema import DataError
from remax_megatron.data_files import data_files
from remax_megatron.errors import UserError
from remax_megatron.types import Prompt

log = logging.getLogger(__name__)

TRUNCATIONS = ("error", "left", "right")
SHOWN_PROBLEMS = 10
GroundTruth = Callable[[str, Any], Any]  # (data source, value in the file) -> what the scorer takes; UserError


@dataclass(frozen=True)
class PromptDataset(Sequence[Prompt]):
    """The usable prompts, in file order. `Prompt.index` is the row's number over all files, before filtering.

    `num_rows == len(self) + num_filtered`, less those that `at_most` left out; `num_truncated` of the prompts were cut.
    `notes` say what was read otherwise than it was written.
    """

    prompts: list[Prompt]
    num_rows: int
    num_filtered: int = 0
    num_truncated: int = 0
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, i: Any) -> Any:
        return self.prompts[i]

    @property
    def sources(self) -> dict[str, int]:
        """Count the prompts of each data source, in the order of their first rows."""
        return dict(Counter(prompt.data_source for prompt in self.prompts))

    def at_most(self, count: int) -> PromptDataset:
        """The first prompts of each data source, as evenly as their numbers allow, `count` in all and in file order;
        all of them when `count` is -1."""
        if count < 0 or count >= len(self):
            return self
        quotas = even_quotas(self.sources, count)
        chosen = []
        for prompt in self.prompts:
            if quotas[prompt.data_source]:
                quotas[prompt.data_source] -= 1
                chosen.append(prompt)
        return replace(self, prompts=chosen)

    def summary(self) -> str:
        """Say in one line how many rows of each source are used, and how long their prompts are."""
        lengths = [len(prompt.token_ids) for prompt in self.prompts]
        sources = ", ".join(f"{name}: {number}" for name, number in self.sources.items())
        return f"{len(self)} of {self.num_rows} rows ({sources}), prompts of {min(lengths)} to {max(lengths)} tokens"


def even_quotas(available: Mapping[str, int], count: int) -> dict[str, int]:
    """How many of each of the `available` to take for `count` in all: the same of each, less where there are fewer.

    Example: even_quotas({"a": 10, "b": 2, "c": 10}, 9) == {"a": 4, "b": 2, "c": 3}
    """
    quotas = dict.fromkeys(available, 0)
    while count > 0 and (open_ones := [name for name in available if quotas[name] < available[name]]):
        share, rest = divmod(count, len(open_ones))
        for place, name in enumerate(open_ones):
            taken = min(share + (place < rest), available[name] - quotas[name])
            quotas[name] += taken
            count -= taken
    return quotas


def as_it_is(source: str, value: Any) -> Any:
    """Return a ground truth as it is in the file, which is for a scorer of the user's own."""
    return value


def load_prompts(
    files: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    tokenizer: Any,
    *,
    max_prompt_length: int,
    filter_overlong_prompts: bool = True,
    truncation: str = "error",
    prompt_key: str = "prompt",
    continue_final_message: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
    vocab_size: int | None = None,
    ground_truth: GroundTruth = as_it_is,
) -> PromptDataset:
    """Reads and tokenises `files`; DataError, with up to ten rows at once, when any of them cannot be used.

    files                    a path, a folder, a pattern or several of them (data_files.py)
    tokenizer                a transformers tokenizer with a chat template
    max_prompt_length        in tokens, chat template included
    filter_overlong_prompts  leaves longer prompts out
    truncation               else refuses them ("error"), or cuts tokens off their "left" or "right" end
    prompt_key               names the column; a prompt that is plain text counts as one user turn
    continue_final_message   lets the model write on where a prompt ends in a turn of the assistant
    template_kwargs          more variables for the chat template
    vocab_size               of the model: a token at or above it is refused
    ground_truth             turns a row's ground truth into what its scorer takes; its UserError refuses the row
    """
    if truncation not in TRUNCATIONS:
        raise DataError(f"data.truncation={truncation!r} is unknown; use one of {', '.join(TRUNCATIONS)}")
    paths = data_files(files)
    names = ", ".join(map(str, paths)) or str(files)
    if not paths:
        raise DataError(
            f"no data files: {names} holds none; name at least one .parquet, .json or .jsonl file in data.train_files"
        )
    problems = _Problems()
    rows = _Rows(problems, prompt_key, ground_truth, continue_final_message)
    for path in paths:
        for place, row in read_rows(path, prompt_key):
            rows.add(place, row)
    if not problems.num_rows:
        raise DataError(f"{names}: no rows")
    own = {"tokenize", "add_generation_prompt", "continue_final_message", "conversation", "messages"}
    if taken := sorted(own & set(template_kwargs or {})):
        raise DataError(f"data.apply_chat_template_kwargs has {', '.join(taken)}, which the trainer sets; leave it out")
    render = _Renderer(tokenizer, continue_final_message, template_kwargs or {})
    fit = _Fit(max_prompt_length, filter_overlong_prompts, truncation)
    prompts = []
    for place, prompt, ids in zip(rows.places, rows.prompts, render(rows, problems), strict=True):
        if ids is not None and _are_tokens(ids, place, vocab_size, tokenizer, problems):
            fitting = fit(ids, place, problems)
            if fitting is not None:
                prompts.append(replace(prompt, token_ids=tuple(fitting)))
    problems.refuse(names)
    fit.report(names)
    num_left_out = len(rows.prompts) - len(prompts)
    return PromptDataset(prompts, problems.num_rows, num_left_out, fit.num_truncated, rows.notes(names, paths, prompts))


class _Problems:
    """Counts the rows, and keeps what is wrong with the first ones that cannot be used."""

    def __init__(self) -> None:
        self.num_rows = self.num_bad = 0
        self.first: list[str] = []

    def add(self, problem: object) -> None:
        self.num_bad += 1
        if len(self.first) < SHOWN_PROBLEMS:
            self.first.append(str(problem))

    def refuse(self, names: str) -> None:
        """DataError when there is any problem: of one the problem itself, of several a list."""
        if self.num_bad == 1:
            raise DataError(self.first[0])
        if self.num_bad:
            shown = "" if self.num_bad == len(self.first) else f", the first {len(self.first)} are"
            raise DataError(f"{names}: {self.num_bad} of {self.num_rows} rows cannot be used{shown}:", self.first)


class _Rows:
    """The rows that can be read, as prompts without tokens."""

    def __init__(self, problems: _Problems, prompt_key: str, ground_truth: GroundTruth, continues: bool):
        self._problems, self._prompt_key, self._ground_truth = problems, prompt_key, ground_truth
        self._continues = continues
        self.places: list[str] = []
        self.prompts: list[Prompt] = []
        self._num_as_text = self._num_changed = self._num_half_said = 0

    def add(self, place: str, row: Mapping[str, Any] | DataError) -> None:
        self._problems.num_rows += 1
        try:
            if isinstance(row, DataError):
                raise row
            self.prompts.append(self._prompt(row, place, self._problems.num_rows - 1))
            self.places.append(place)
        except DataError as error:
            self._problems.add(error)

    def _prompt(self, row: Mapping[str, Any], place: str, index: int) -> Prompt:
        source, given = row["data_source"], row["reward_model"] and row["reward_model"]["ground_truth"]
        if not isinstance(source, str):
            raise DataError(f"{place}: data_source must be text, found {source!r}")
        if not source.strip() or not source.isprintable():
            raise DataError(f"{place}: data_source={source!r} is no name; write the name of the data set")
        if given is None:
            raise DataError(f"{place}: reward_model.ground_truth is empty")
        extra_info = {} if row.get("extra_info") is None else row["extra_info"]
        if not isinstance(extra_info, Mapping):
            raise DataError(f"{place}: extra_info must be an object, found {extra_info!r}")
        turns = as_messages(row[self._prompt_key], place, self._prompt_key)
        try:
            truth = self._ground_truth(source, given)
        except UserError as error:
            raise DataError(f"{place}: {error}") from error
        self._num_half_said += turns[-1]["role"] == "assistant" and not self._continues
        as_text = row[self._prompt_key]
        self._num_as_text += isinstance(as_text, str) and turns != [{"role": "user", "content": as_text}]
        self._num_changed += isinstance(given, str) and truth != given
        return Prompt(index, (), source, truth, dict(extra_info), turns)

    def notes(self, names: str, paths: Sequence[Path], prompts: Sequence[Prompt]) -> list[str]:
        """What was read otherwise than it was written, and what of it may not be meant."""
        notes = []
        if twice := sorted({str(path) for path in paths if paths.count(path) > 1}):
            notes.append(f"named more than once, and read as often: {', '.join(twice)}")
        if len({prompt.token_ids for prompt in prompts}) == 1 and any(one.turns != prompts[0].turns for one in prompts):
            notes.append(f"{names}: all {len(prompts)} prompts have the same tokens; look at the chat template")
        if self._num_as_text:
            notes.append(f"{names}: {self._num_as_text} prompts are JSON text and were read as the list of turns in it")
        if self._num_half_said:
            notes.append(
                f"{names}: {self._num_half_said} prompts end in a turn of the assistant, after which a new one begins; "
                "data.continue_final_message=True continues it"
            )
        if self._num_changed:
            notes.append(f"{names}: {self._num_changed} ground truths were brought into the form of their scorer")
        return notes


class _Renderer:
    """Applies the chat template to each prompt, and the tokenizer to all texts at once."""

    def __init__(self, tokenizer: Any, continue_final_message: bool, template_kwargs: Mapping[str, Any]):
        self._tokenizer, self._continues, self._kwargs = tokenizer, continue_final_message, dict(template_kwargs)

    def __call__(self, rows: _Rows, problems: _Problems) -> list[list[int] | None]:
        """The tokens of each row; None for one that is among the problems."""
        texts = [
            self._text_or_problem(prompt.turns, place, problems)
            for prompt, place in zip(rows.prompts, rows.places, strict=True)
        ]
        whole = [text for text in texts if text is not None]
        ids = iter(self._tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"] if whole else ())
        return [None if text is None else next(ids) for text in texts]

    def _text(self, turns: list[dict[str, str]]) -> str:
        continues = self._continues and turns[-1]["role"] == "assistant"
        text = self._tokenizer.apply_chat_template(
            turns,
            tokenize=False,
            add_generation_prompt=not continues,
            continue_final_message=continues,
            **self._kwargs,
        )
        return str(text)

    def _text_or_problem(self, turns: list[dict[str, str]], place: str, problems: _Problems) -> str | None:
        try:
            return self._text(turns)
        except Exception as error:  # no template at all; one that refuses these turns, or does not run
            reason = " ".join(f"{error}".split()) or type(error).__name__
            problems.add(f"{place}: the tokenizer's chat template cannot be applied: {reason}")
            return None


class _Fit:
    """Applies data.max_prompt_length, data.filter_overlong_prompts and data.truncation."""

    def __init__(self, limit: int, leaves_out: bool, truncation: str):
        self._limit, self._leaves_out, self._truncation = limit, leaves_out, truncation
        self._lengths: list[int] = []
        self._num_left_out = self.num_truncated = 0

    def __call__(self, ids: list[int], place: str, problems: _Problems) -> list[int] | None:
        """`ids`, or what is kept of them; None for a prompt that is left out, or is among the problems."""
        self._lengths.append(len(ids))
        if len(ids) <= self._limit:
            return ids
        if self._leaves_out:
            self._num_left_out += 1
            return None
        if self._truncation == "error":
            problems.add(
                f"{place}: the prompt has {len(ids)} tokens, data.max_prompt_length is {self._limit}; raise it, or set "
                "data.filter_overlong_prompts=True or data.truncation=left"
            )
            return None
        self.num_truncated += 1
        return ids[-self._limit :] if self._truncation == "left" else ids[: self._limit]

    def report(self, names: str) -> None:
        """Log how many prompts did not fit; DataError when none did."""
        if self._num_left_out == len(self._lengths):
            raise DataError(
                f"{names}: none of the {len(self._lengths)} prompts fits data.max_prompt_length={self._limit}; the "
                f"shortest has {min(self._lengths)} tokens with the chat template, the longest {max(self._lengths)}: "
                "raise it"
            )
        if self._num_left_out or self.num_truncated:
            log.warning(
                "%s: of %d prompts, %d are longer than data.max_prompt_length=%d and were left out, %d were cut",
                *(names, len(self._lengths), self._num_left_out, self._limit, self.num_truncated),
            )


def _are_tokens(ids: list[int], place: str, vocab_size: int | None, tokenizer: Any, problems: _Problems) -> bool:
    """Whether `ids` are tokens that the model has, and at least one."""
    if not ids:
        problems.add(f"{place}: the prompt is empty after the chat template; write its text, or leave the row out")
        return False
    if vocab_size is not None and (largest := max(ids)) >= vocab_size:
        token = tokenizer.convert_ids_to_tokens(largest)
        problems.add(
            f"{place}: the prompt has token {largest} ({token!r}), but the model's config.json says "
            f"vocab_size={vocab_size}; use the tokenizer that belongs to the model, or a model with more embeddings"
        )
        return False
    return True


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


def further(num_prompts: int, batch: Sequence[int], seed: int, step: int) -> list[int]:
    """All positions that are not in `batch`, in a random order that is step number `step`'s own.

    A function of its arguments alone (numpy PCG64 seeded with (seed, step, 1)). After a shuffled batch the two together
    are a random order of all prompts.
    """
    order = np.setdiff1d(np.arange(num_prompts), np.asarray(batch, dtype=int))
    np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, step, 1]))).shuffle(order)
    return [int(i) for i in order]
