"""Data: the GSM8K schema and counts, what the loader accepts and refuses, and the order of batches."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from remax_megatron.atomic import replacing
from remax_megatron.data import gsm8k
from remax_megatron.data.dataset import PromptDataset, batches, further, load_prompts
from remax_megatron.data.rows import as_messages
from remax_megatron.data.schema import GSM8K_SCHEMA, DataError, make_row, prompt_schema, write_parquet
from tests import ROOT

REAL_GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"

# The schema as pyarrow prints it: columns, their order and their types.
EXACT_SCHEMA = """\
data_source: string
prompt: list<element: struct<role: string, content: string>>
  child 0, element: struct<role: string, content: string>
      child 0, role: string
      child 1, content: string
ability: string
reward_model: struct<style: string, ground_truth: string>
  child 0, style: string
  child 1, ground_truth: string
extra_info: struct<split: string, index: int64, answer: string, question: string>
  child 0, split: string
  child 1, index: int64
  child 2, answer: string
  child 3, question: string"""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word. A single user turn of k words has k + 2 tokens: <user> ... <assistant>."""
    words = ["<unk>", "<user>", "<system>", "<assistant>", *(f"w{i}" for i in range(50))]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer


def words(n: int) -> str:
    return " ".join(f"w{i}" for i in range(n))


def row(prompt: object = "w0 w1", **changes: object) -> dict:
    fields = {"data_source": "openai/gsm8k", "prompt": prompt, "reward_model": {"ground_truth": "18"}, **changes}
    return {key: value for key, value in fields.items() if value is not ...}


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def load(files: object, tokenizer: object, **settings: object) -> PromptDataset:
    return load_prompts(files, tokenizer, **{"max_prompt_length": 16, **settings})


# ---- GSM8K -----------------------------------------------------------------------------------------------------------


def test_gsm8k_real_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not REAL_GSM8K.is_dir():
        pytest.skip("needs the published GSM8K files in ../shared/data/gsm8k")
    assert gsm8k.main(["--local_dir", str(tmp_path / "out"), "--from_jsonl", str(REAL_GSM8K)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote 7473 train and 1319 test rows to {tmp_path / 'out'}"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["test.parquet", "train.parquet"]
    for split, num_rows in (("train", 7473), ("test", 1319)):
        table = pq.read_table(tmp_path / "out" / f"{split}.parquet")
        assert table.num_rows == num_rows
        assert table.schema.to_string(show_schema_metadata=False, show_field_metadata=False) == EXACT_SCHEMA
        truths = [reward_model["ground_truth"] for reward_model in table["reward_model"].to_pylist()]
        assert all(truth and "," not in truth for truth in truths)
        assert [info["index"] for info in table["extra_info"].to_pylist()] == list(range(num_rows))

    first = pq.read_table(tmp_path / "out" / "train.parquet").slice(0, 1).to_pylist()[0]
    question, answer = first["extra_info"]["question"], first["extra_info"]["answer"]
    assert question.startswith("Natalia sold clips to 48 of her friends") and answer.endswith("#### 72")
    assert first == {
        "data_source": "openai/gsm8k",
        "prompt": [
            {
                "role": "user",
                "content": question + ' Let\'s think step by step and output the final answer after "####".',
            }
        ],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "72"},
        "extra_info": {"split": "train", "index": 0, "answer": answer, "question": question},
    }


@pytest.mark.parametrize(
    ("answer", "truth"),
    [("so.\n#### 72", "72"), ("#### 1,450,000", "1450000"), ("#### -3", "-3"), ("#### 2.5", "2.5")],
)
def test_ground_truth(answer: str, truth: str) -> None:
    assert gsm8k.extract_ground_truth(answer) == truth


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "q"', "not JSON"),
        ("[1]", "an object is needed, found list"),
        ('{"question": "q"}', "field 'answer' must be text, found None; fields: ['question']"),
        ('{"question": "q", "answer": "72"}', "no '#### NUMBER' in the answer '72'"),
        ('{"question": "\udcff"}', "not JSON"),  # not UTF-8
    ],
)
def test_gsm8k_malformed_line(line: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = '{"question": "q", "answer": "#### 1"}\n'
    (tmp_path / "train.jsonl").write_text(good)
    (tmp_path / "test.jsonl").write_bytes((good + line + "\n").encode(errors="surrogateescape"))
    assert gsm8k.main(["--local_dir", str(tmp_path / "out"), "--from_jsonl", str(tmp_path)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and f"{tmp_path / 'test.jsonl'}:2: " in errors[0] and message in errors[0]
    assert not (tmp_path / "out").exists()  # nothing was written, train.parquet neither


def test_gsm8k_missing_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gsm8k.main(["--local_dir", str(tmp_path), "--from_jsonl", str(tmp_path / "no")]) == 2
    assert (
        capsys.readouterr().err
        == f"error: {tmp_path / 'no' / 'train.jsonl'}: cannot be read: No such file or directory\n"
    )


def test_write_parquet_refuses_what_does_not_fit(tmp_path: Path) -> None:
    info = {"split": "train", "index": 0, "answer": "a", "question": "q"}
    fine = make_row(data_source="d", prompt="p", ground_truth="1", extra_info=info)
    path = tmp_path / "a.parquet"
    assert write_parquet([fine], path) == 1
    before = path.read_bytes()
    for bad, message in (
        ({**fine, "level": 1}, "row 0 has ['level']"),
        ({**fine, "extra_info": {**info, "hint": ""}}, "row 0 has ['hint']"),
        ({k: v for k, v in fine.items() if k != "ability"}, "row 0 lacks ['ability']"),
        ({**fine, "ability": 3}, "does not fit the schema"),
    ):
        with pytest.raises(DataError, match=message.replace("[", r"\[")):
            write_parquet([bad], path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.parquet"]

    math_schema = prompt_schema(
        {"split": pa.string(), "index": pa.int64()}, {"level": pa.string(), "type": pa.string()}
    )
    math_row = make_row(
        data_source="m", prompt="p", ground_truth="1", extra_info={"split": "s", "index": 0}, level="5", type="Algebra"
    )
    write_parquet([math_row], path, math_schema)
    assert pq.read_table(path).to_pylist() == [math_row]


def test_replacing_leaves_the_old_file_on_error(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    with replacing(path) as tmp:
        tmp.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as tmp:
        tmp.write_text("new")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(path.parent) == ["a.txt"]


# ---- loading ---------------------------------------------------------------------------------------------------------


def test_formats_and_shapes_of_prompts(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Parquet (as pandas writes numpy arrays), JSON list, JSON lines; text and turns; extra_info of three kinds."""
    turns = [{"role": "system", "content": "w5"}, {"role": "user", "content": "w0 w1"}]
    info = {"split": "train", "index": 0, "answer": "a", "question": "q"}
    write_parquet(
        [make_row(data_source="d", prompt="w0 w1", ground_truth="1", extra_info=info)], tmp_path / "a.parquet"
    )
    frame = pd.DataFrame([row(np.array(turns, dtype=object), level="x", extra_info={"split": "train", "index": 7})])
    frame.to_parquet(tmp_path / "b.parquet")
    (tmp_path / "c.json").write_text(json.dumps([row("w0 w1", reward_model={"ground_truth": 18})]))
    jsonl(tmp_path / "d.json", row(turns))
    (tmp_path / "e.jsonl").write_text(json.dumps(row("w0 w1", extra_info=None)) + "\n\n")

    files = [tmp_path / name for name in ("a.parquet", "b.parquet", "c.json", "d.json", "e.jsonl")]
    dataset = load(files, tokenizer)
    user, with_system = (
        (1, 4, 5, 3),
        (2, 9, 1, 4, 5, 3),
    )  # <user> w0 w1 <assistant>; <system> w5 <user> w0 w1 <assistant>
    assert [p.token_ids for p in dataset] == [user, with_system, user, with_system, user]
    assert [p.index for p in dataset] == [0, 1, 2, 3, 4]
    assert [p.ground_truth for p in dataset] == ["1", "18", 18, "18", "18"]
    assert [p.extra_info for p in dataset] == [info, {"split": "train", "index": 7}, {}, {}, {}]
    assert dataset[0].data_source == "d" and (dataset.num_rows, dataset.num_filtered) == (5, 0)


def test_as_messages_takes_numpy_arrays() -> None:
    turn = {"role": "user", "content": "hi"}
    assert (
        as_messages(np.array([turn], dtype=object), "x")
        == as_messages((turn,), "x")
        == as_messages("hi", "x")
        == [turn]
    )


def test_prompt_key(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = jsonl(tmp_path / "a.jsonl", row(..., question="w0"))
    assert load(path, tokenizer, prompt_key="question")[0].token_ids == (1, 4, 3)


def test_overlong_prompts(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture) -> None:
    path = jsonl(
        tmp_path / "a.jsonl", row(words(20)), row(words(14)), row(words(15)), row("w1")
    )  # 22, 16, 17, 3 tokens
    dataset = load(path, tokenizer)
    assert [p.index for p in dataset] == [1, 3] and (dataset.num_rows, dataset.num_filtered) == (4, 2)
    assert "of 4 prompts, 2 are longer than data.max_prompt_length=16 and were left out" in caplog.text

    with pytest.raises(DataError, match=r"a\.jsonl:1: the prompt has 22 tokens, data\.max_prompt_length is 16; "):
        load(path, tokenizer, filter_overlong_prompts=False)
    whole = load(path, tokenizer, max_prompt_length=22)[0].token_ids
    for truncation, ids in (("left", whole[-16:]), ("right", whole[:16])):
        cut = load(path, tokenizer, filter_overlong_prompts=False, truncation=truncation)
        assert cut[0].token_ids == ids and len(cut) == 4 and cut.num_truncated == 2
    with pytest.raises(DataError, match="data.truncation='middle' is unknown; use one of error, left, right"):
        load(path, tokenizer, truncation="middle")


def test_no_usable_prompt(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = jsonl(tmp_path / "a.jsonl", row(words(20)), row(words(30)))
    with pytest.raises(
        DataError, match="none of the 2 prompts fits data.max_prompt_length=16; the shortest has 22 tokens"
    ):
        load(path, tokenizer)
    with pytest.raises(DataError, match=r"a\.jsonl: no rows"):
        load(jsonl(path), tokenizer)
    with pytest.raises(DataError, match="no data files"):
        load([], tokenizer)


@pytest.mark.parametrize("kind", ["parquet", "json", "jsonl"])
@pytest.mark.parametrize(
    ("changes", "column"),
    [
        ({"prompt": ...}, "prompt"),
        ({"data_source": ...}, "data_source"),
        ({"reward_model": ...}, "reward_model.ground_truth"),
        ({"reward_model": {"style": "rule"}}, "reward_model.ground_truth"),
    ],
)
def test_missing_column(
    kind: str, changes: dict, column: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path, bad = tmp_path / f"a.{kind}", row(**changes)
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist([bad]), path)
    else:
        path.write_text(json.dumps([bad] if kind == "json" else bad))
    with pytest.raises(DataError) as error:
        load(path, tokenizer)
    message = str(error.value)
    assert message.startswith(str(path)) and f"no column {column!r}; found: " in message and "\n" not in message
    assert all(key in message for key in bad)


def test_bad_values(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    for bad, message in (
        (row([]), r"prompt must be text or a list of \{role, content\}, found \[\]"),
        (row([{"role": "user", "content": None}]), "each turn of prompt needs the texts 'role' and 'content'"),
        (row(reward_model={"ground_truth": None}), "reward_model.ground_truth is empty"),
        (row(data_source=None), "data_source must be text, found None"),
        (row(extra_info="x"), "extra_info must be an object, found 'x'"),
    ):
        with pytest.raises(DataError, match=rf"a\.jsonl:2: {message}"):
            load(jsonl(tmp_path / "a.jsonl", row(), bad), tokenizer)
    (tmp_path / "a.jsonl").write_text("{}x")
    with pytest.raises(DataError, match=r"a\.jsonl:1: not JSON"):
        load(tmp_path / "a.jsonl", tokenizer)
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(DataError, match=r"a\.json: row 0: an object is needed, found int"):
        load(tmp_path / "a.json", tokenizer)


def test_broken_files(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Cut, a bit flipped, overwritten, empty, missing, a folder, an unknown kind: one DataError naming the file."""
    info = {"split": "train", "index": 0, "answer": "a" * 500, "question": "q"}
    rows = [make_row(data_source="d", prompt=words(i % 10), ground_truth=str(i), extra_info=info) for i in range(200)]
    whole = tmp_path / "whole.parquet"
    write_parquet(rows, whole)
    content = whole.read_bytes()
    broken = {
        "half.parquet": content[: len(content) // 2],
        "tail.parquet": content[:-1],
        "empty.parquet": b"",
        "bit.parquet": content[:100] + bytes([content[100] ^ 1]) + content[101:],  # found by the page's checksum
        "inside.parquet": content[:40] + b"\xff" * 400 + content[440:],
        "text.parquet": b"hello, this is not parquet at all",
    }
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=f"{name}: cannot be read as parquet: ") as error:
            load(tmp_path / name, tokenizer)
        assert "\n" not in str(error.value)
    for name in ("missing.parquet", "missing.jsonl"):
        with pytest.raises(DataError, match=f"{name}: cannot be read"):
            load(tmp_path / name, tokenizer)
    with pytest.raises(DataError, match=r"a\.csv: unknown kind of file '\.csv'; use \.parquet, \.json or \.jsonl"):
        load(tmp_path / "a.csv", tokenizer)


def test_chat_template_errors(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = jsonl(tmp_path / "a.jsonl", row())
    template = tokenizer.chat_template
    try:
        for broken, message in ((None, "chat_template"), ("{{ raise_exception('only system turns') }}", "only system")):
            tokenizer.chat_template = broken
            with pytest.raises(
                DataError, match=rf"a\.jsonl:1: the tokenizer's chat template cannot be applied: .*{message}"
            ):
                load(path, tokenizer)
    finally:
        tokenizer.chat_template = template


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_further_prompts_are_all_others_in_an_order_of_the_step() -> None:
    assert further(7, [5, 0, 1], seed=1, step=1) == further(7, [5, 0, 1], seed=1, step=1) == [3, 6, 4, 2]
    orders = {tuple(further(50, [3], seed, step)) for seed in (1, 2) for step in (1, 2, 3)}
    assert len(orders) == 6
    assert further(2, [1, 0], seed=1, step=1) == []


def test_batches_golden() -> None:
    """The order is part of a run's identity: a resumed run must find the same one."""
    assert batches(7, 3, seed=1, epoch=0, shuffle=False) == [[0, 1, 2], [3, 4, 5]]
    assert batches(7, 3, seed=1, epoch=0) == [[5, 0, 1], [4, 2, 6]]
    assert batches(7, 3, seed=1, epoch=1) == [[6, 1, 4], [0, 3, 2]]


@given(st.integers(1, 200), st.integers(1, 200), st.integers(0, 2**32), st.integers(0, 1000), st.booleans())
def test_batches_take_each_prompt_at_most_once(n: int, batch_size: int, seed: int, epoch: int, shuffle: bool) -> None:
    if batch_size > n:
        with pytest.raises(DataError, match=f"data.train_batch_size={batch_size} is more than the {n} usable prompts"):
            batches(n, batch_size, seed, epoch, shuffle)
        return
    result = batches(n, batch_size, seed, epoch, shuffle)
    assert len(result) == n // batch_size and all(len(batch) == batch_size for batch in result)
    counts = Counter(i for batch in result for i in batch)
    assert set(counts.values()) == {1} and set(counts) <= set(range(n))
    assert result == batches(n, batch_size, seed, epoch, shuffle)


def test_epochs_and_seeds_differ() -> None:
    orders = {str(batches(100, 10, seed, epoch)) for seed in (1, 2, 3) for epoch in (0, 1, 2)}
    assert len(orders) == 9
    with pytest.raises(DataError, match="data.train_batch_size=0 must be at least 1"):
        batches(3, 0, 0, 0)


def test_the_exact_schema_is_the_one_we_write() -> None:
    assert GSM8K_SCHEMA.names == ["data_source", "prompt", "ability", "reward_model", "extra_info"]
