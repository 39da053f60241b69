r"""MATH: finding the box, comparing what is in it, and the sample that no time-out of math-verify's own ends. And the
preparation of its data (`python -m remax_megatron.data.math`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from remax_megatron.data import math as math_data
from remax_megatron.data.rows import as_messages
from remax_megatron.rewards import math as math_rule
from remax_megatron.rewards.boxed import last_boxed
from remax_megatron.rewards.pool import RewardPool
from remax_megatron.rewards.scorer import RewardError, ScoreRequest
from tests import ROOT

MATH = "DigitalLearningGmbH/MATH-lighteval"


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1}, no, \boxed{ 2 }", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),  # an escaped brace does not count
        (r"\boxed{a\\}", r"a\\"),  # an escaped backslash before a brace that does
        (r"\fbox{3}", "3"),
        (r"\boxed {4}", "4"),
        (r"is $\boxed 9$.", "9"),
        (r"\boxed{}", ""),
        (r"\boxed{1} and \boxed{2", None),  # cut by the length limit
        (r"\boxedx", None),
        (r"\boxed", None),
        ("5", None),
    ],
)
def test_last_boxed(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("answer", "truth", "equal"),
    [
        (r"\frac{1}{2}", r"\frac12", 1),
        (r"\dfrac{1}{2}", "0.5", 1),
        ("1,000", "1000", 1),
        (r"\text{Friday}", r"\text{Friday}", 1),
        (r"\text{Friday}", r"\text{Monday}", 0),
        (r"(3,\pi/2)", r"\left( 3, \frac{\pi}{2} \right)", 1),
        ("(1, 2)", "(2, 1)", 0),
        ("x^2+2x+1", "(x+1)^2", 1),
        (r"\sqrt{8}", r"2\sqrt{2}", 1),
        ("x = 5", "5", 1),
        ("4", "5", 0),
        ("", "5", 0),
        (r"\frac{1}{", "5", 0),
        ("}{", "5", 0),
    ],
)
def test_equal(answer: str, truth: str, equal: int) -> None:
    assert math_rule.score(f"so $\\boxed{{{answer}}}$", truth)["score"] == equal


def test_no_box_is_told_apart() -> None:
    assert math_rule.score("it is 5", "5") == {"score": 0.0, "boxed": 0.0}
    assert math_rule.score(r"it is \boxed{6}", "5") == {"score": 0.0, "boxed": 1.0}


def test_a_broken_math_verify_is_an_error_not_a_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    math_rule._check_math_verify.cache_clear()
    monkeypatch.setattr("math_verify.parse", lambda *_, **__: [])
    with pytest.raises(RewardError, match="its installation is broken"):
        math_rule.score(r"\boxed{6}", "5")


def test_the_sample_that_hangs_ends_at_the_deadline() -> None:
    """Math-Verify issue #65: a power tower that sympy evaluates. The samples beside it are scored."""
    hang = r"\boxed{\dfrac{5^{(5^{(5^{(5^5)})} - 4)} - 5}{16}}"
    with RewardPool(1, 1.0, memory_gib=4.0) as pool:
        fine = [ScoreRequest(MATH, r"\boxed{0.5}", r"\frac{1}{2}")]
        assert pool.score(fine)[0].outcome == "ok"  # the import of sympy has its own allowance
        start = time.monotonic()
        results = pool.score([*fine, ScoreRequest(MATH, hang, "7"), *fine])
        assert time.monotonic() - start < 20
    assert [(r.score, r.outcome) for r in results] == [(1.0, "ok"), (0.0, "timeout"), (1.0, "ok")]


# ---- data/math.py ----------------------------------------------------------------------------------------------------

ROW = {
    "problem": "What is $1 + 1$?",
    "level": "Level 1",
    "type": "Prealgebra",
    "solution": r"It is $\boxed{1}$, no, $\boxed{\frac{4}{2}}$.",
}


def write(folder: Path, train: list[dict], test: list[dict]) -> Path:
    for split, rows in (("train", train), ("test", test)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path, [ROW, {**ROW, "level": None}], [ROW])
    out = tmp_path / "out"
    assert math_data.main(["--local_dir", str(out), "--from_jsonl", str(source)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote 2 train and 1 test rows to {out}"
    table = pq.read_table(out / "train.parquet")
    assert table.schema.names == ["data_source", "prompt", "ability", "reward_model", "extra_info", "level", "type"]
    assert table.to_pylist()[0] == {
        "data_source": MATH,
        "prompt": [
            {
                "role": "user",
                "content": "What is $1 + 1$? Let's think step by step and output the final answer within \\boxed{}.",
            }
        ],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": r"\frac{4}{2}"},
        "extra_info": {"split": "train", "index": 0},
        "level": "Level 1",
        "type": "Prealgebra",
    }
    second = table.to_pylist()[1]
    assert second["level"] is None and second["extra_info"]["index"] == 1
    assert as_messages(second["prompt"], "x")[0]["role"] == "user"  # the loader takes it


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({**ROW, "solution": "It is 2."}, r"no \boxed{...} in the solution 'It is 2.'"),
        ({"problem": "q"}, "field 'solution' must be text, found None; fields: ['problem']"),
        ({**ROW, "level": 3}, "field 'level' must be text, found 3"),
    ],
)
def test_malformed_line(bad: dict, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path, [ROW], [ROW, bad])
    assert math_data.main(["--local_dir", str(tmp_path / "out"), "--from_jsonl", str(source)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and f"{source / 'test.jsonl'}:2: " in errors[0] and message in errors[0]
    assert not (tmp_path / "out").exists()


def test_command(tmp_path: Path) -> None:
    source = write(tmp_path, [ROW], [ROW])
    command = [sys.executable, "-m", "remax_megatron.data.math", "--local_dir", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--from_jsonl", str(source)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "test.parquet",
        "train.parquet",
    ]
