"""Rewards: the strict rule on its published table, and what a custom function may and may not do."""

from __future__ import annotations

from pathlib import Path

import pytest

from remax_megatron.rewards.gsm8k import extract_answer, strict_score
from remax_megatron.rewards.scorer import RewardError, ScoreRequest
from remax_megatron.rewards.scoring import check_data_sources, load_scorer


@pytest.mark.parametrize(
    ("solution", "ground_truth", "score"),
    [
        ("#### 18", "18", 1.0),
        ("#### 1,000", "1000", 1.0),
        ("#### 18%", "18", 1.0),
        ("#### 18.", "18", 0.0),
        ("#### $18", "18", 0.0),
        ("####18", "18", 0.0),
        ("#### **18**", "18", 0.0),
        (r"\boxed{18}", "18", 0.0),
        ("#### 18.0", "18", 0.0),
        ("#### -18", "-18", 1.0),
        ("#### 17\nno, #### 18", "18", 1.0),  # the last match counts
        ("#### 18\nno, #### 17", "18", 0.0),
        ("#### 18 apples", "18", 1.0),
        ("", "18", 0.0),
        ("#### 18" + "x" * 293, "18", 1.0),  # 7 + 293 = 300 characters: still in sight
        ("#### 18" + "x" * 294, "18", 0.0),  # the first '#' is out of sight
    ],
)
def test_strict_scorer(solution: str, ground_truth: str, score: float) -> None:
    assert strict_score(solution, ground_truth) == score
    for data_source in ("openai/gsm8k", "word_problems"):
        assert load_scorer(None).score(ScoreRequest(data_source, solution, ground_truth)).score == score


def test_extract_answer() -> None:
    assert extract_answer("so #### 1,234.50.") == "1234.50." and extract_answer("1234") is None


def test_unknown_data_source() -> None:
    message = r"no scorer for data_source 'lighteval/MATH'; known: openai/gsm8k, .*, code; "
    message += r"set custom_reward_function\.path"
    with pytest.raises(RewardError, match=message):
        load_scorer(None).score(ScoreRequest("lighteval/MATH", "#### 1", "1"))
    check_data_sources({"openai/gsm8k", "word_problems"})
    with pytest.raises(RewardError, match="'a', 'b'"):
        check_data_sources({"b", "openai/gsm8k", "a"})


def custom(tmp_path: Path, code: str, name: str = "compute_score"):
    path = tmp_path / "reward.py"
    path.write_text(code)
    scorer = load_scorer(str(path), name)
    return lambda *sample: scorer.score(ScoreRequest(*sample)).score


SIGNATURE = "def compute_score(data_source, solution_str, ground_truth, extra_info=None): "


@pytest.mark.parametrize(
    ("body", "score"),
    [
        ("return len(solution_str)", 3.0),
        ("return {'score': 0.25, 'acc': True}", 0.25),
        ("return solution_str == ground_truth", 1.0),
        ("return extra_info['bonus'] + (data_source == 'mine')", 1.5),
        ("import numpy; return numpy.float32(0.5)", 0.5),
        ("import numpy; return numpy.bool_(True)", 1.0),
    ],
)
def test_custom_function(body: str, score: float, tmp_path: Path) -> None:
    result = custom(tmp_path, SIGNATURE + body)("mine", "abc", "abc", {"bonus": 0.5})
    assert result == score and type(result) is float


def test_custom_function_by_name(tmp_path: Path) -> None:
    code = "HIDDEN = 2\ndef mine(data_source, solution_str, ground_truth, **rest): return HIDDEN\n"
    assert custom(tmp_path, code, "mine")("d", "", "", {}) == 2.0


@pytest.mark.parametrize(
    "result", ["float('nan')", "float('inf')", "None", "'1'", "{'acc': 1}", "{'score': 'x'}", "[1]"]
)
def test_custom_result_that_is_no_number(result: str, tmp_path: Path) -> None:
    score = custom(tmp_path, SIGNATURE + f"return {result}")
    with pytest.raises(
        RewardError, match=r"a finite number, or a dict with one under 'score', is needed; sample: .*'mine'"
    ):
        score("mine", "abc", "18", {})


def test_custom_exception_names_the_sample(tmp_path: Path) -> None:
    score = custom(tmp_path, SIGNATURE + "return 1 / 0")
    with pytest.raises(
        RewardError, match="raised ZeroDivisionError: division by zero; sample: .*'18'.*'index': 7"
    ) as error:
        score("mine", "x" * 1000, "18", {"index": 7})
    assert isinstance(error.value.__cause__, ZeroDivisionError) and len(str(error.value)) < 1000


def test_custom_function_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"custom_reward_function\.path=.*no\.py is not a file"):
        load_scorer(str(tmp_path / "no.py"))
    with pytest.raises(
        RewardError, match=r"name='compute_score' is not a function of .*reward\.py; found: scoer, other"
    ):
        custom(tmp_path, "def scoer(): ...\ndef other(): ...\n")
    with pytest.raises(RewardError, match="does not import: SyntaxError"):
        custom(tmp_path, "def compute_score(:\n")
    with pytest.raises(RewardError, match="does not import: ModuleNotFoundError: No module named 'not_there'"):
        custom(tmp_path, "import not_there\n")
    with pytest.raises(
        RewardError, match=r"compute_score\(answer\) does not fit: .*; needed: compute_score\(data_source"
    ):
        custom(tmp_path, "def compute_score(answer): return 0\n")
    (tmp_path / "reward.txt").write_text("")
    with pytest.raises(RewardError, match=r"reward\.txt is not a Python file"):
        load_scorer(str(tmp_path / "reward.txt"))
