"""The one pass over the data: what is wrong with rows is said before anything starts, ten at once."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from remax_megatron.data.dataset import PromptDataset, even_quotas, load_prompts
from remax_megatron.data.schema import DataError
from remax_megatron.data_files import data_files
from remax_megatron.demo.warm_start import make_tokenizer
from remax_megatron.inputs import Inputs
from remax_megatron.rewards.scoring import built_in_ground_truth

GSM8K, MATH = "openai/gsm8k", "DigitalLearningGmbH/MATH-lighteval"
TURNS = [{"role": "user", "content": "Anna has 2 apples."}]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def row(prompt: object = "Anna has 2 apples.", truth: object = "2", source: str = GSM8K) -> dict:
    return {"data_source": source, "prompt": prompt, "reward_model": {"ground_truth": truth}}


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def load(files: object, tokenizer: object, **settings: object) -> PromptDataset:
    return load_prompts(files, tokenizer, **{"max_prompt_length": 64, **settings})


# -- ground truths that an answer can equal ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "truth"),
    [
        ("18", "18"),
        (18, "18"),
        (18.0, "18"),
        (2.5, "2.5"),
        (1e21, "1000000000000000000000"),
        (Decimal("7.00"), "7"),
        ("1,000", "1000"),
        (" 18", "18"),
        ("18\n", "18"),
        ("$18", "18"),
        ("-$1,250.50", "-1250.50"),
        ("+5", "5"),
        ("18.0", "18.0"),  # verl's rule compares texts
        (".5", ".5"),
    ],
)
def test_a_number_becomes_the_text_that_an_answer_can_equal(value: object, truth: str) -> None:
    assert built_in_ground_truth(GSM8K, value) == truth


@pytest.mark.parametrize(
    "value",
    ["", " ", ["18"], {"a": 1}, True, float("nan"), float("inf"), "abc", "18%", "1/2", ".", "1.2.3", "1e3", "١٨"],
)
def test_what_no_answer_can_equal_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="openai/gsm8k: the ground truth .* is no number"):
        built_in_ground_truth(GSM8K, value)


def test_ground_truths_of_the_other_rules() -> None:
    assert built_in_ground_truth(MATH, r" \frac{1}{2} ") == r"\frac{1}{2}"
    assert built_in_ground_truth(MATH, 5) == "5"
    for bad in ("", r"\frac{1", "}", ["5"], None, True):
        with pytest.raises(ValueError, match="MATH-lighteval: the ground truth"):
            built_in_ground_truth(MATH, bad)
    pairs = {"inputs": ["1"], "outputs": ["2"]}
    assert json.loads(built_in_ground_truth("code", pairs)) == pairs
    assert built_in_ground_truth("code", json.dumps(pairs)) == json.dumps(pairs)
    for bad in ("", "x", {"inputs": ["1"]}, {"inputs": [], "outputs": []}, 5):
        with pytest.raises(ValueError, match="code: the ground truth of a 'code' sample must be JSON"):
            built_in_ground_truth("code", bad)
    with pytest.raises(ValueError, match="no scorer for data_source 'mine'"):
        built_in_ground_truth("mine", "5")


def test_an_empty_ground_truth_is_no_prize_for_an_answer_of_a_comma() -> None:
    from remax_megatron.rewards.gsm8k import strict_score

    assert strict_score("#### ,", "") == 0.0


def test_values_reach_a_scorer_of_ones_own_as_they_are(tmp_path: Path, tokenizer) -> None:
    truths = [["4", "40"], 4, {"a": 1}, "4", 4.5, False]
    found = load(jsonl(tmp_path / "a.jsonl", *(row(truth=truth, source="mine") for truth in truths)), tokenizer)
    assert [prompt.ground_truth for prompt in found] == truths
    assert found[0].turns == TURNS
    kind = pa.struct([("ground_truth", pa.decimal128(5, 2))])
    truth = pa.array([{"ground_truth": Decimal("1.10")}], kind)
    table = pa.table({"data_source": ["mine"], "prompt": ["Anna has 2 apples."], "reward_model": truth})
    pq.write_table(table, tmp_path / "a.parquet")
    assert load(tmp_path / "a.parquet", tokenizer)[0].ground_truth == Decimal("1.10")


def test_what_was_brought_into_form_is_noted(tmp_path: Path, tokenizer) -> None:
    path = jsonl(tmp_path / "a.jsonl", row(truth="1,000"), row(truth="$5"), row(truth="5"), row(truth=5))
    found = load(path, tokenizer, ground_truth=built_in_ground_truth)
    assert [prompt.ground_truth for prompt in found] == ["1000", "5", "5", "5"]
    assert found.notes == [f"{path}: 2 ground truths were brought into the form of their scorer"]


# -- ten at once ---------------------------------------------------------------------------------------------------


def test_ten_bad_rows_are_named_at_once(tmp_path: Path, tokenizer) -> None:
    bad = [row(truth=""), row(prompt=[]), row(prompt=" "), row(source=3), row(truth=None), {"prompt": "x"}]
    rows = [row(), *bad, *(row(truth="x") for _ in range(6)), row()]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    path.write_text(path.read_text() + "not JSON\n[1]\n")
    with pytest.raises(DataError) as error:
        load(path, tokenizer, ground_truth=built_in_ground_truth)
    first, *details = error.value.lines().splitlines()
    assert first == f"error: {path}: 14 of 16 rows cannot be used, the first 10 are:"
    assert [line.split(": ")[0].strip() for line in details] == [f"{path}:{n}" for n in range(2, 12)]
    assert "a.jsonl:4: prompt is empty; write its text, or leave the row out" in details[2]

    with pytest.raises(DataError) as error:
        load(jsonl(path, row(), row(truth="x")), tokenizer, ground_truth=built_in_ground_truth)
    assert str(error.value) == (
        f"{path}:2: {GSM8K}: the ground truth 'x' is no number, so that no answer '#### NUMBER' equals it"
    )


def test_a_template_that_raises_names_its_rows(tmp_path: Path, tokenizer) -> None:
    own = tokenizer.chat_template
    others = [row([{"role": role, "content": "x"}]) for role in ("system", "bot")]
    path = jsonl(tmp_path / "a.jsonl", row(), *others)
    try:
        for broken in (
            "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('no') }}{% endif %}{% endfor %}x",
            "{% for m in messages %}{{ {'user': 'x'}[m.role] + 'y' }}{% endfor %}",
        ):
            tokenizer.chat_template = broken
            with pytest.raises(DataError) as error:
                load(path, tokenizer)
            assert [detail.split(": the tokenizer's chat template")[0] for detail in error.value.details] == [
                f"{path}:2",
                f"{path}:3",
            ]
    finally:
        tokenizer.chat_template = own


def test_a_prompt_that_the_template_makes_empty(tmp_path: Path, tokenizer) -> None:
    own = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{{ messages[0]['content'] if messages[0]['role'] == 'user' else '' }}"
        path = jsonl(tmp_path / "a.jsonl", row(), row([{"role": "system", "content": "x"}]))
        with pytest.raises(DataError, match=r"a\.jsonl:2: the prompt is empty after the chat template"):
            load(path, tokenizer)
    finally:
        tokenizer.chat_template = own


def test_tokens_that_the_model_does_not_have(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    tokenizer.add_tokens(["<extra>", "<more>"])
    path = jsonl(tmp_path / "a.jsonl", row(), row("Anna has <extra> apples."), row("Anna has <more> apples."))
    assert len(load(path, tokenizer, vocab_size=size + 2)) == 3
    with pytest.raises(DataError) as error:
        load(path, tokenizer, vocab_size=size)
    assert len(error.value.details) == 2 and f":2: the prompt has token {size} ('<extra>')" in error.value.details[0]
    assert f"vocab_size={size}" in error.value.details[0]


# -- prompts as JSON text ------------------------------------------------------------------------------------------


def test_json_text_of_turns_is_read_as_turns(tmp_path: Path, tokenizer) -> None:
    path = jsonl(tmp_path / "a.jsonl", row(TURNS), row(json.dumps(TURNS)), row(json.dumps(TURNS, indent=1)))
    found = load(path, tokenizer)
    assert len({prompt.token_ids for prompt in found}) == 1
    assert found.notes == [f"{path}: 2 prompts are JSON text and were read as the list of turns in it"]


@pytest.mark.parametrize("text", ["[1, 2] is a list", "[]", "{x}", "[Anna] has 2", '{"a": 1}', "[1, 2]"])
def test_text_that_only_begins_like_json_is_text(text: str, tmp_path: Path, tokenizer) -> None:
    found = load(jsonl(tmp_path / "a.jsonl", row(text)), tokenizer)
    assert found[0].turns == [{"role": "user", "content": text}] and not found.notes


@pytest.mark.parametrize(
    "text",
    [
        "[{'role': 'user', 'content': 'hi'}]",  # Python's own way to write it
        '{"role": "user", "content": "hi"}',
        '[{"role": "user", "text": "hi"}]',
        '[{"role": "user", "content": "hi"}}]',
        '[{"from": "human", "value": "hi"}]',
    ],
)
def test_text_that_looks_like_turns_and_is_not_is_refused(text: str, tmp_path: Path, tokenizer) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:1: prompt is text that looks like a list of turns"):
        load(jsonl(tmp_path / "a.jsonl", row(text)), tokenizer)


# -- files, samples, templates -------------------------------------------------------------------------------------


def test_folders_and_patterns(tmp_path: Path, tokenizer) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("part-2.jsonl", "part-1.jsonl", "deep/part-3.jsonl"):
        jsonl(tmp_path / name, row(name.split(".")[0]))
    (tmp_path / "notes.txt").write_text("x")
    names = lambda files: [str(file.relative_to(tmp_path)) for file in data_files(files)]  # noqa: E731
    assert names(tmp_path) == names(tmp_path / "part-*.jsonl") == ["part-1.jsonl", "part-2.jsonl"]
    assert names(str(tmp_path / "**" / "*.jsonl")) == ["deep/part-3.jsonl", "part-1.jsonl", "part-2.jsonl"]
    assert names([tmp_path / "deep", tmp_path / "part-1.jsonl"]) == ["deep/part-3.jsonl", "part-1.jsonl"]
    jsonl(tmp_path / "with[1].jsonl", row())
    assert names(tmp_path / "with[1].jsonl") == ["with[1].jsonl"]  # a file of that name beats a pattern
    assert [prompt.turns[0]["content"] for prompt in load(tmp_path, tokenizer)][:2] == ["part-1", "part-2"]
    with pytest.raises(DataError, match=r"no data files: .*deep/\*\.parquet holds none"):
        load(tmp_path / "deep" / "*.parquet", tokenizer)


def test_samples_are_taken_of_every_source(tmp_path: Path, tokenizer) -> None:
    one = jsonl(tmp_path / "one.jsonl", *(row(truth=str(i)) for i in range(10)))
    two = jsonl(tmp_path / "two.jsonl", *(row(truth=str(i), source="word_problems") for i in range(3)))
    both = load([one, two], tokenizer)
    assert both.sources == {GSM8K: 10, "word_problems": 3}
    few = both.at_most(4)
    assert few.sources == {GSM8K: 2, "word_problems": 2}
    assert [prompt.index for prompt in few] == [0, 1, 10, 11]  # the numbers of the rows stay
    assert both.at_most(9).sources == {GSM8K: 6, "word_problems": 3}
    assert both.at_most(-1) is both and both.at_most(100) is both
    length = len(few[0].token_ids)
    assert few.summary() == (f"4 of 13 rows ({GSM8K}: 2, word_problems: 2), prompts of {length} to {length} tokens")
    assert even_quotas({"a": 10, "b": 2, "c": 10}, 9) == {"a": 4, "b": 2, "c": 3}
    assert even_quotas({"a": 1, "b": 1}, 5) == {"a": 1, "b": 1}


def test_a_turn_of_the_assistant_is_continued(tmp_path: Path, tokenizer) -> None:
    begun = [*TURNS, {"role": "assistant", "content": "Anna has"}]
    path = jsonl(tmp_path / "a.jsonl", row(begun), row())
    own = tokenizer.chat_template
    try:
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}"
        )
        texts = [tokenizer.decode(p.token_ids) for p in load(path, tokenizer, continue_final_message=True)]
        new_turn = [tokenizer.decode(p.token_ids) for p in load(path, tokenizer)]
    finally:
        tokenizer.chat_template = own
    assert texts[0].rstrip().endswith("has") and new_turn[0].rstrip().endswith("assistant:")
    assert texts[1] == new_turn[1]


def test_arguments_of_the_template(tmp_path: Path, tokenizer) -> None:
    own = tokenizer.chat_template
    path = jsonl(tmp_path / "a.jsonl", row())
    try:
        tokenizer.chat_template = "{{ messages[0].content }}{% if think is defined and think %} Think{% endif %}"
        plain, thinking = load(path, tokenizer)[0], load(path, tokenizer, template_kwargs={"think": True})[0]
    finally:
        tokenizer.chat_template = own
    assert len(thinking.token_ids) > len(plain.token_ids)


# -- more that users have in their files ---------------------------------------------------------------------------

TURN = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({**row(), "images": ["a.png"]}, "has images, which a model of text alone does not read"),
        ({**row(), "tools": [{"name": "add"}]}, "has tools, which"),
        (row([{**TURN, "tool_calls": [{"name": "add"}]}]), "a turn of prompt has tool_calls, which is not read"),
        (row("Say \ud83d now?"), "prompt holds half of a character"),
        ({"prompt": "x", "data_source": "m", "reward_model.ground_truth": "5"}, "is a column of its own; nest it"),
        (row(source=""), "data_source='' is no name"),
        (row(source="a\nb"), r"data_source='a\\nb' is no name"),
        ({**row(), "extra_info": []}, r"extra_info must be an object, found \[\]"),
    ],
)
def test_rows_that_would_be_read_in_part(bad: dict, message: str, tmp_path: Path, tokenizer) -> None:
    with pytest.raises(DataError, match=rf"a\.jsonl:2: .*{message}"):
        load(jsonl(tmp_path / "a.jsonl", row(), bad), tokenizer)
    fine = {**row([{**TURN, "tool_calls": None, "name": ""}]), "images": [], "tools": None}  # as parquet fills them up
    assert len(load(jsonl(tmp_path / "a.jsonl", fine), tokenizer)) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}".encode("utf-16"), "is UTF-16, not UTF-8 text"),
        (b"\x1f\x8b\x08", "is gzip, not UTF-8 text"),
        (b"PAR1", "is parquet, not UTF-8 text"),
        (b'{"data": [\n1]\n}', "holds one object over several lines"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_files_of_another_kind(content: bytes, message: str, tmp_path: Path, tokenizer) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.json.*: {message}"):
        load(tmp_path / "a.json", tokenizer)


def test_marks_and_names_that_windows_writes(tmp_path: Path, tokenizer) -> None:
    text = json.dumps([row(), row()], indent=1).replace("\n", "\r\n")
    (tmp_path / "a.JSON").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert len(load(tmp_path / "a.JSON", tokenizer)) == 2 == len(load(tmp_path, tokenizer))
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "._a.jsonl").write_bytes(b"\x00")
    assert len(load(tmp_path, tokenizer)) == 2
    (tmp_path / "v[1]").mkdir()
    jsonl(tmp_path / "v[1]" / "part-1.jsonl", row())
    assert len(load(tmp_path / "v[1]" / "part-*.jsonl", tokenizer)) == 1


def test_parquet_with_a_column_twice_and_times_out_of_range(tmp_path: Path, tokenizer) -> None:
    column = pa.array([{"ground_truth": "1"}])
    names = ["prompt", "data_source", "reward_model", "reward_model"]
    pq.write_table(pa.table([pa.array(["x"]), pa.array(["m"]), column, column], names), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: has several columns 'reward_model'; keep one"):
        load(tmp_path / "a.parquet", tokenizer)
    late = pa.StructArray.from_arrays([pa.array([2**61], pa.timestamp("us"))], ["t"])
    table = pa.table([pa.array(["x"]), pa.array(["m"]), column, late], [*names[:3], "extra_info"])
    pq.write_table(table, tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet: cannot be read as parquet"):
        load(tmp_path / "b.parquet", tokenizer)


def test_numbers_that_a_file_has_rounded() -> None:
    assert built_in_ground_truth(GSM8K, 10**40) == "1" + "0" * 40
    assert built_in_ground_truth(GSM8K, 1e30).startswith("1000000000000000")
    assert [built_in_ground_truth(GSM8K, value) for value in (0.1, 3.14, 0.5, 1234567.25)] == [
        "0.1",
        "3.14",
        "0.5",
        "1234567.25",
    ]
    with pytest.raises(ValueError, match="3.140000104904175 was rounded to 32 bits in its file; store it as text"):
        built_in_ground_truth(GSM8K, 3.140000104904175)


def test_notes_on_templates_and_turns(tmp_path: Path, tokenizer) -> None:
    path = jsonl(tmp_path / "a.jsonl", row("a"), row([TURN, {"role": "assistant", "content": "Well,"}]))
    assert load(path, tokenizer).notes == [
        f"{path}: 1 prompts end in a turn of the assistant, after which a new one begins; "
        "data.continue_final_message=True continues it"
    ]
    own = tokenizer.chat_template
    try:
        tokenizer.chat_template = "Anna"
        assert "all 2 prompts have the same tokens" in load(path, tokenizer).notes[0]
    finally:
        tokenizer.chat_template = own
    with pytest.raises(DataError, match="apply_chat_template_kwargs has add_generation_prompt, which the trainer sets"):
        load(path, tokenizer, template_kwargs={"add_generation_prompt": False})


def test_prompts_that_are_there_twice_are_noted(tmp_path: Path, tokenizer) -> None:
    path = jsonl(tmp_path / "a.jsonl", row("a"), row("b"))
    assert load([path, path], tokenizer).notes == [f"named more than once, and read as often: {path}"]
    train, val = load(path, tokenizer), load(jsonl(tmp_path / "b.jsonl", row("b"), row("c")), tokenizer)
    inputs = Inputs("folder", tokenizer, [], train, val)
    assert inputs.notes == ["1 of 2 prompts of data.val_files are in data.train_files as well"]
