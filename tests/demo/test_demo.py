"""The demo: word problems, tokenizer, warm-started policy. CPU only; the policy is trained for two steps."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from remax_megatron.demo import model_config, warm_start, word_problems
from remax_megatron.demo.once import build_once, digest
from remax_megatron.errors import UserError
from tests import ROOT

STEP = re.compile(r"(\d+)([+*-])(\d+)=(\d+)")
APPLY = {"+": lambda x, y: x + y, "-": lambda x, y: x - y, "*": lambda x, y: x * y}


# ---- word problems ---------------------------------------------------------------------------------------------------


def test_every_sentence_computes_what_it_says():
    families = Counter()
    for problem in islice(word_problems.problems(random.Random(1)), 3000):
        families[problem.family] += 1
        for sentence, result in (
            (problem.solution, problem.result),
            (problem.wrong_solution, problem.wrong_result),
        ):
            steps = STEP.findall(sentence)
            assert len(steps) == (2 if problem.family == "two_steps" else 1)
            assert all(APPLY[sign](int(x), int(y)) == int(z) for x, sign, y, z in steps), sentence
            assert int(steps[-1][3]) == result
        assert problem.result != problem.wrong_result
        assert 1 <= problem.result <= 81 and 1 <= problem.wrong_result <= 99
    assert set(families) == set(word_problems.FAMILIES)
    assert min(families.values()) > 500  # of 3000 in five families


def test_a_problem_by_hand():
    problem = word_problems._compare(random.Random(0), "Anna", "Ben", "eggs")
    x, y = map(int, re.findall(r"\d+", problem.question))
    assert problem.answer == f"Ben has {x}-{y}={x - y} eggs.\n#### {x - y}"
    assert problem.wrong_solution == f"Ben has {x}+{y}={x + y} eggs."


def test_parquet_has_the_schema_of_gsm8k_files(tmp_path):
    train_path, test_path = word_problems.write_files(tmp_path, num_train=20, num_test=10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test.parquet", "train.parquet"]  # nothing left aside
    train, test = pq.read_table(train_path), pq.read_table(test_path)
    assert train.num_rows == 20 and test.num_rows == 10
    assert train.schema.names == ["data_source", "prompt", "ability", "reward_model", "extra_info"]
    types = {field.name: str(field.type) for field in train.schema}
    assert types["data_source"] == "string" and types["ability"] == "string"
    assert re.sub("element|item", "x", types["prompt"]) == "list<x: struct<role: string, content: string>>"
    assert types["reward_model"] == "struct<style: string, ground_truth: string>"
    assert types["extra_info"] == "struct<split: string, index: int64, answer: string, question: string>"

    row = test.to_pylist()[3]
    assert row["data_source"] == "word_problems" and row["ability"] == "math"
    assert row["extra_info"]["split"] == "test" and row["extra_info"]["index"] == 3
    question = row["extra_info"]["question"]
    assert row["prompt"] == [{"role": "user", "content": f"{question} {word_problems.INSTRUCTION}"}]
    assert row["reward_model"]["style"] == "rule"
    assert row["extra_info"]["answer"].endswith(f"\n#### {row['reward_model']['ground_truth']}")


def test_same_arguments_same_bytes_other_seed_other_problems(tmp_path):
    paths = [word_problems.write_files(tmp_path / str(i), 50, 50, seed) for i, seed in enumerate((0, 0, 1))]
    contents = [[path.read_bytes() for path in pair] for pair in paths]
    assert contents[0] == contents[1]
    assert contents[0][0] != contents[2][0] and contents[0][1] != contents[2][1]


def test_no_question_twice_and_none_in_both_files():
    train, test = word_problems.splits()
    assert (len(train), len(test)) == (word_problems.NUM_TRAIN, word_problems.NUM_TEST)
    questions = [problem.question for problem in train + test]
    assert len(set(questions)) == len(questions)
    assert word_problems.splits(num_train=10)[1] == test  # the test file does not depend on the train file's size


@pytest.mark.parametrize(("num_train", "num_test"), [(0, 5), (5, -1), (word_problems.MAX_PROBLEMS, 1)])
def test_impossible_numbers_are_refused(tmp_path, num_train, num_test):
    with pytest.raises(ValueError, match="num_t.*set num_t"):
        word_problems.write_files(tmp_path / "data", num_train, num_test)
    assert not (tmp_path / "data").exists()


def test_command_line(tmp_path):
    command = [sys.executable, "-m", "remax_megatron.demo.word_problems", "--local_dir", str(tmp_path)]
    done = subprocess.run([*command, "--num_train", "7", "--num_test", "3"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert pq.read_metadata(tmp_path / "train.parquet").num_rows == 7
    done = subprocess.run([*command, "--num_train", "0"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "num_train=0" in done.stderr and "Traceback" not in done.stderr


def test_ensure_data_writes_once(tmp_path):
    first = word_problems.ensure_data(tmp_path / "data")
    stamps = [path.stat().st_mtime_ns for path in first]
    assert word_problems.ensure_data(tmp_path / "data") == first
    assert [path.stat().st_mtime_ns for path in first] == stamps
    assert pq.read_metadata(first[1]).num_rows == word_problems.NUM_TEST


# ---- folders that are built once -------------------------------------------------------------------------------------


def test_two_processes_build_one_folder(tmp_path):
    script = f"""
import time
from pathlib import Path
from remax_megatron.demo.once import build_once
base = Path({str(tmp_path)!r})
def build(folder):
    with (base / "builds.log").open("a") as log:
        log.write("built\\n")
    (folder / "half").write_text("1")
    time.sleep(0.5)
    (folder / "whole").write_text("2")
folder = build_once(base / "thing", 1, build)
assert sorted(p.name for p in folder.iterdir()) == ["half", "recipe.json", "whole"]
"""
    processes = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(3)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    assert (tmp_path / "builds.log").read_text() == "built\n"


def test_a_failed_build_leaves_no_folder_and_the_next_one_starts_clean(tmp_path):
    def fails(folder: Path) -> None:
        (folder / "rubbish").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        build_once(tmp_path / "thing", 1, fails)
    assert not (tmp_path / "thing").exists()
    folder = build_once(tmp_path / "thing", 1, lambda folder: (folder / "good").write_text("y"))
    assert sorted(path.name for path in folder.iterdir()) == ["good", "recipe.json"]


def test_another_recipe_builds_anew_and_what_was_not_made_here_stays(tmp_path):
    for recipe in (1, 1, 2):
        build_once(tmp_path / "thing", recipe, lambda folder, recipe=recipe: (folder / f"made-{recipe}").touch())
    assert sorted(path.name for path in (tmp_path / "thing").iterdir()) == ["made-2", "recipe.json"]
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="mine exists and was not made by this command"):
        build_once(tmp_path / "mine", 1, lambda folder: None)
    assert list((tmp_path / "mine").iterdir()) == []


def test_digest_changes_with_the_recipe():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})


# ---- tokenizer -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    return warm_start.ensure_policy(tmp_path_factory.mktemp("inputs") / "policy", num_steps=2, progress=False)


def test_tokenizer_takes_any_text_and_gives_one_token_per_number(policy):
    tokenizer = AutoTokenizer.from_pretrained(policy)
    for text in ("Anna has 5+30=35 apples.\n#### 35", "Zoë  paid\t1,024.50 €\r\n\n\\boxed{7}", "  "):
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    for number in range(100):
        assert len(tokenizer.encode(f"#### {number}")) == 3  # the marks, the space, the number
    answer = tokenizer.encode("Anna has 5+30=35 apples.\n#### 35<|im_end|>")
    assert tokenizer.convert_ids_to_tokens(answer) == (
        ["Anna", "Ġhas", "Ġ", "5", "+", "30", "=", "35", "Ġapples", ".Ċ", "####", "Ġ", "35", "<|im_end|>"]
    )


def test_the_saved_tokenizer_is_the_one_trained_with(policy):
    made, loaded = warm_start.make_tokenizer(), AutoTokenizer.from_pretrained(policy)
    assert made.backend_tokenizer.to_str() == warm_start.make_tokenizer().backend_tokenizer.to_str()
    for problem in islice(word_problems.problems(random.Random(2)), 200):
        text = f"{problem.prompt}\n{problem.answer}"
        assert made.encode(text) == loaded.encode(text)


def test_chat_template(policy):
    tokenizer = AutoTokenizer.from_pretrained(policy)
    turn = [{"role": "user", "content": "How many?"}]
    text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer.encode(text)
    assert ids.count(tokenizer.eos_token_id) == 1 and tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_lengths_fit_the_demo_preset(policy):
    tokenizer = AutoTokenizer.from_pretrained(policy)
    train, test = word_problems.splits()
    turns = [[{"role": "user", "content": problem.prompt}] for problem in train + test]
    prompts = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert max(map(len, prompts)) <= 48
    assert max(len(ids) for ids in tokenizer([p.answer for p in train + test]).input_ids) + 1 <= 24


# ---- demonstrations and policy ---------------------------------------------------------------------------------------


def test_demonstrations_part_as_the_recipe_says():
    rng = random.Random(3)
    total, right, final = Counter(), Counter(), Counter()
    for problem in islice(word_problems.problems(random.Random(4)), 10_000):
        text = warm_start.demonstration(problem, rng)
        sentence, _, last = text.partition("\n")
        total[problem.family] += 1
        right[problem.family] += sentence == problem.solution
        final[problem.family] += bool(last)
        assert sentence in (problem.solution, problem.wrong_solution)
        if last:
            assert last == f"#### {problem.result if sentence == problem.solution else problem.wrong_result}"
    for family, count in total.items():  # about 2000 each: a standard deviation is 0.011 at most
        assert abs(right[family] / count - warm_start.RIGHT_SHARE[family]) < 0.045
        assert abs(final[family] / count - warm_start.FINAL_LINE_SHARE[family]) < 0.045


def test_policy_is_an_ordinary_qwen2_folder(policy):
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in policy.iterdir()
    }
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy), AutoTokenizer.from_pretrained(policy)
    assert type(model).__name__ == "Qwen2ForCausalLM" and model.dtype == torch.float32
    assert 1_000_000 < sum(parameter.numel() for parameter in model.parameters()) < 3_000_000
    config = model.config
    assert config.vocab_size == len(tokenizer)
    assert all(getattr(config, name) == value for name, value in model_config.MODEL_CONFIG.items())
    assert config.hidden_size // config.num_attention_heads >= 32  # vLLM's CPU attention takes no less
    assert config.num_hidden_layers % 4 == config.num_attention_heads % 4 == config.intermediate_size % 4 == 0
    assert model.model.layers[0].self_attn.q_proj.bias is not None
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == config.eos_token_id


def test_the_other_family_differs_in_the_model_alone(policy, tmp_path):
    folder = warm_start.ensure_policy(tmp_path / "policy", num_steps=2, progress=False, family="qwen3")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "Qwen3ForCausalLM" and model.config.head_dim == 64
    assert 1_000_000 < sum(parameter.numel() for parameter in model.parameters()) < 3_000_000
    assert model.model.layers[0].self_attn.q_proj.bias is None
    assert (folder / "tokenizer.json").read_bytes() == (policy / "tokenizer.json").read_bytes()
    read, same = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(policy)
    text = "Anna has 12 eggs.\nHow many?"
    assert read(text).input_ids == same(text).input_ids


def test_warm_start_is_deterministic_and_leaves_the_random_state_alone(policy):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    again = warm_start.train_policy(warm_start.make_tokenizer(), seed=0, num_steps=2, progress=False).state_dict()
    assert torch.equal(torch.rand(3), expected)
    saved = AutoModelForCausalLM.from_pretrained(policy).state_dict()
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[name], again[name]) for name in saved)
    other = warm_start.train_policy(warm_start.make_tokenizer(), seed=1, num_steps=2, progress=False).state_dict()
    assert not torch.equal(other["lm_head.weight"], again["lm_head.weight"])


def test_ensure_policy_builds_once_per_recipe(policy, monkeypatch):
    def builds(folder, *args):
        raise AssertionError(f"built {folder} again")

    monkeypatch.setattr(warm_start, "save_policy", builds)
    assert warm_start.ensure_policy(policy, num_steps=2, progress=False) == policy
    monkeypatch.setattr(warm_start, "LEARNING_RATE", 1.0)
    with pytest.raises(AssertionError, match="again"):
        warm_start.ensure_policy(policy, num_steps=2, progress=False)


def test_labels_cover_the_answer_and_its_end(policy):
    tokenizer = AutoTokenizer.from_pretrained(policy)
    input_ids, labels = next(warm_start._batches(tokenizer, seed=0))
    assert input_ids.shape == labels.shape and input_ids.shape[0] == warm_start.BATCH_SIZE
    row, label = input_ids[0], labels[0]
    answer = label[label != -100]
    assert answer[-1] == tokenizer.eos_token_id and (row[label != -100] == answer).all()
    assert " has " in tokenizer.decode(answer.tolist())


def test_prepare_makes_both_folders_once(tmp_path):
    command = [sys.executable, "-m", "remax_megatron.demo.prepare", "--folder", str(tmp_path / "inputs")]

    def prepare(num_steps: int) -> subprocess.CompletedProcess:
        options = [*command, "--num_steps", str(num_steps)]
        return subprocess.run(options, cwd=ROOT, capture_output=True, text=True, timeout=120)

    done = prepare(1)
    assert done.returncode == 0 and "Warm start" in done.stderr, done.stderr
    files = [
        tmp_path / "inputs" / name for name in ("policy/model.safetensors", "data/train.parquet", "data/test.parquet")
    ]
    assert [pq.read_metadata(file).num_rows for file in files[1:]] == [word_problems.NUM_TRAIN, word_problems.NUM_TEST]
    stamps = [file.stat().st_mtime_ns for file in files]
    assert prepare(1).returncode == 0
    assert [file.stat().st_mtime_ns for file in files] == stamps
    done = prepare(0)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "error: num_steps=0" in done.stderr
