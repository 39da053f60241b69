"""The user's scorer as users write it: an ordinary module, in every form, with values as they are in the file."""

from __future__ import annotations

import time
from decimal import Decimal
from pathlib import Path

import pytest

from remax_megatron.rewards.pool import RewardPool
from remax_megatron.rewards.scorer import RewardError, ScoreRequest, ScoreResult
from remax_megatron.rewards.scoring import load_scorer

TURNS = [{"role": "user", "content": "2 + 2"}]
ASKED = ScoreRequest("mine", "abcd", {"a": 1}, {"index": 7}, TURNS, [5, 6, 2], finished=False)


def write(folder: Path, code: str, name: str = "my_reward") -> str:
    path = folder / f"{name}.py"
    path.write_text(code)
    return str(path)


def scored(path: str, *requests: ScoreRequest, **settings) -> list[ScoreResult]:
    """What one worker of a pool makes of it, as in a run."""
    with RewardPool(1, settings.pop("timeout_s", 20.0), path=path, **settings) as pool:
        return pool.score(requests)


# -- an ordinary module --------------------------------------------------------------------------------------------

ORDINARY = {
    "a dataclass with deferred annotations": """
from __future__ import annotations
from dataclasses import dataclass
@dataclass
class Rule:
    weight: float = 2.0
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return Rule().weight
""",
    "a module beside it": """
import beside
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return beside.WEIGHT
""",
    "a module beside it, imported late": """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    from beside import WEIGHT
    return WEIGHT
""",
    "functions and enums in other processes": """
import enum, multiprocessing
from concurrent.futures import ProcessPoolExecutor
class Size(enum.Enum):
    TWO = 2.0
def value(size):
    return size.value
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as workers:
        return workers.submit(value, Size.TWO).result()
""",
    "its own pickle": """
import pickle
class Two:
    value = 2.0
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return pickle.loads(pickle.dumps(Two())).value
""",
    "a script": """
import argparse
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return 2.0
if __name__ == "__main__":
    argparse.ArgumentParser().parse_args()
""",
}


@pytest.mark.parametrize("code", ORDINARY.values(), ids=ORDINARY.keys())
def test_an_ordinary_module(code: str, tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("WEIGHT = 2.0\n")
    assert scored(write(tmp_path, code), ASKED)[0].score == 2.0


@pytest.mark.parametrize(
    ("code", "name", "message"),
    [
        (
            "import argparse\nargparse.ArgumentParser().parse_args(['--x'])\n",
            "r",
            r"r\.py:2 does not import: SystemExit",
        ),
        ("import sys\n\nsys.exit()\n", "r", r"r\.py:3 does not import: SystemExit: .*__name__ == '__main__'"),
        ("x = 1\nx.y\n", "r", r"r\.py:2 does not import: AttributeError"),
        ("def f(:\n", "r", r"r\.py:1 does not import: SyntaxError"),
        ("compute_score = None\n", "random", "a module named 'random' exists already; rename the file"),
        ("compute_score = None\n", "numpy", "a module named 'numpy' exists already; rename the file"),
        ("def compute_score(data_source, solution_str, ground_truth, extra_info):\n    yield 1\n", "r", "generator"),
        ("class compute_score:\n    pass\n", "r", "class compute_score has none of the methods"),
        ("class compute_score:\n    def __init__(self, url): ...\n", "r", "reward_kwargs are its arguments"),
        ("async def compute_score(answer): ...\n", "r", r"needed: compute_score\(data_source, solution_str"),
        ("def compute_score_batch(solution_strs): ...\n", "r", r"needed: compute_score_batch\(data_sources"),
    ],
)
def test_what_cannot_be_loaded_is_refused_before_the_first_answer(
    code: str, name: str, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path, code, name)
    with pytest.raises(RewardError, match=message), RewardPool(1, 5.0, path=path) as pool:
        pool.load()
    with pytest.raises(RewardError, match=message):
        load_scorer(path)


def test_an_error_names_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path, f"def inner():\n    return {{}}['x']\ndef compute_score({EACH}):\n    return inner()\n")
    result = scored(path, ASKED)[0]
    assert result.outcome == "error" and f"{path}:2: compute_score raised KeyError: 'x'; sample: " in result.message


# -- values as they are in the file --------------------------------------------------------------------------------


@pytest.mark.parametrize("truth", [["4", "40"], 4, 4.5, {"a": [1, None]}, Decimal("1.10"), b"x", True, "4"], ids=repr)
def test_ground_truth_and_extra_info_arrive_as_they_are(truth: object, tmp_path: Path) -> None:
    code = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": 1, "truth": repr(ground_truth), "info": repr(extra_info)}
"""
    info = {"index": 7, "tests": [1, 2], "nested": {"a": None}}
    result = scored(write(tmp_path, code), ScoreRequest("mine", "", truth, info))[0]
    assert result.texts == {"truth": repr(truth), "info": repr(info)}


# -- forms ---------------------------------------------------------------------------------------------------------

EACH = "data_source, solution_str, ground_truth, extra_info=None"
MANY = "data_sources, solution_strs, ground_truths, extra_infos"
FORMS = {
    "function": f"def compute_score({EACH}): return len(solution_str)",
    "async": f"async def compute_score({EACH}): return len(solution_str)",
    "batch": f"def compute_score_batch({MANY}): return [len(text) for text in solution_strs]",
    "batch under the common name": f"def compute_score({MANY}): return [len(text) for text in solution_strs]",
    "async batch": f"async def compute_score_batch({MANY}): return [len(text) for text in solution_strs]",
    "batch of an array": f"import numpy\ndef compute_score_batch({MANY}):\n"
    "    return numpy.array([len(text) for text in solution_strs])",
    "lambda": f"compute_score = lambda {EACH}: len(solution_str)",
    "everything by keyword": "def compute_score(**sample): return len(sample['solution_str'])",
    "class": f"class compute_score:\n    def __call__(self, {EACH}): return len(solution_str)",
    "class with a method": f"class compute_score:\n    def compute_score(self, {EACH}): return len(solution_str)",
    "async class": f"class compute_score:\n    async def __call__(self, {EACH}): return len(solution_str)",
    "class of batches": f"class compute_score:\n    def compute_score_batch(self, {MANY}):\n"
    "        return [{'score': len(text)} for text in solution_strs]",
    "tensor": f"import torch\ndef compute_score({EACH}): return torch.tensor(float(len(solution_str)))",
}


@pytest.mark.parametrize("code", FORMS.values(), ids=FORMS.keys())
def test_every_form_scores(code: str, tmp_path: Path) -> None:
    answers = [ScoreRequest("mine", "x" * i, str(i)) for i in range(20)]
    results = scored(write(tmp_path, code), *answers, memory_gib=None)
    assert [(result.score, result.outcome) for result in results] == [(float(i), "ok") for i in range(20)]


def test_optional_arguments_come_by_name(tmp_path: Path) -> None:
    code = f"""
def compute_score({EACH}, prompt=None, num_tokens=0, finished=True, token_ids=()):
    return {{"score": 1, "seen": repr((prompt, num_tokens, finished, token_ids))}}
"""
    assert scored(write(tmp_path, code), ASKED)[0].texts["seen"] == repr((TURNS, 3, False, [5, 6, 2]))
    many = f"""
def compute_score_batch({MANY}, prompts, num_tokens, finished, token_ids):
    return [{{"score": 1, "seen": repr(one)}} for one in zip(prompts, num_tokens, finished, token_ids)]
"""
    assert scored(write(tmp_path, many), ASKED)[0].texts["seen"] == repr((TURNS, 3, False, [5, 6, 2]))


def test_reward_kwargs(tmp_path: Path) -> None:
    path = write(tmp_path, f"def compute_score({EACH}, scale=1.0): return scale")
    assert scored(path, ASKED, kwargs={"scale": 2.5})[0].score == 2.5
    path = write(
        tmp_path,
        f"class Judge:\n    def __init__(self, scale): self.scale = scale\n"
        f"    def __call__(self, {EACH}): self.scale += 1; return self.scale",
    )
    results = scored(path, ASKED, ASKED, name="Judge", kwargs={"scale": 2.5})
    assert [result.score for result in results] == [3.5, 4.5]  # one object per worker, with state
    with pytest.raises(RewardError, match=r"got an unexpected keyword argument 'scael'; needed: .*, scael\)"):
        load_scorer(write(tmp_path, f"def compute_score({EACH}): return 1"), kwargs={"scael": 1})


def test_texts_and_numbers_beside_the_score(tmp_path: Path) -> None:
    path = write(tmp_path, f"def compute_score({EACH}): return dict(score=0.5, why='too long', acc=True, skip=[1])")
    assert scored(path, ASKED)[0] == ScoreResult(0.5, extra={"acc": 1.0}, texts={"why": "too long"})


# -- what goes wrong -----------------------------------------------------------------------------------------------


def test_forty_answers_of_a_slow_judge_take_under_two_seconds(tmp_path: Path) -> None:
    path = write(tmp_path, f"import asyncio\nasync def compute_score({EACH}): return await asyncio.sleep(0.5, 1.0)")
    with RewardPool(1, 10.0, path=path) as pool:
        pool.load()
        began = time.monotonic()
        results = pool.score([ASKED] * 40)
        assert time.monotonic() - began < 2.0
    assert [result.score for result in results] == [1.0] * 40


def test_async_concurrency_bounds_what_waits_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        f"""
import asyncio
now = most = 0
async def compute_score({EACH}):
    global now, most
    now += 1
    most = max(most, now)
    await asyncio.sleep(0.01)
    now -= 1
    return most
""",
    )
    results = scored(path, *[ASKED] * 30, async_concurrency=3)
    assert max(result.score for result in results) == 3


def test_one_bad_coroutine_harms_no_other(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        f"""
import asyncio, sys, time
async def compute_score({EACH}):
    await asyncio.sleep(0.05)
    if solution_str == "waits":
        await asyncio.sleep(60)
    if solution_str == "clings":
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                pass
    if solution_str == "blocks":
        time.sleep(60)
    if solution_str == "exits":
        sys.exit(3)
    if solution_str == "raises":
        raise KeyError("x")
    return 1.0
""",
    )
    said = ["fine", "waits", "clings", "blocks", "exits", "raises"] * 2
    began = time.monotonic()
    results = scored(path, *[ScoreRequest("mine", text, "") for text in said], timeout_s=1.0)
    assert time.monotonic() - began < 20
    outcomes = {"fine": "ok", "waits": "timeout", "clings": "timeout", "blocks": "timeout", "exits": "error"}
    assert [result.outcome for result in results] == [outcomes.get(text, "error") for text in said]


@pytest.mark.parametrize(
    ("body", "outcome", "message"),
    [
        ("return [1]", "error", "returned list of 1 for 3 answers; a list of as many scores is needed"),
        ("return 1.0", "error", "returned float for 3 answers"),
        ("return [1, 2, 'x']", "error", "a finite number"),
        ("raise KeyError('x')", "error", "my_reward.py:2: compute_score_batch raised KeyError"),
        ("import time; time.sleep(60)", "timeout", "no scores of 3 answers in time"),
        ("import os; os._exit(3)", "crash", "the worker died"),
    ],
)
def test_a_batch_that_fails_is_counted(body: str, outcome: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, f"def compute_score_batch({MANY}):\n    {body}\n")
    results = scored(path, *[ASKED] * 3, timeout_s=0.4)
    assert [result.outcome for result in results] == [outcome] * 3
    assert message in results[0].message


def test_a_function_that_returns_a_coroutine_is_told_to_be_async(tmp_path: Path) -> None:
    path = write(tmp_path, f"async def later(): return 1\ndef compute_score({EACH}): return later()")
    assert "write `async def compute_score`" in scored(path, ASKED)[0].message


def test_a_cancelled_coroutine_is_an_error_and_no_hang(tmp_path: Path) -> None:
    code = f"""
import asyncio
async def compute_score({EACH}):
    if solution_str == "raises":
        raise asyncio.CancelledError
    task = asyncio.ensure_future(asyncio.sleep(0.01))
    task.cancel()
    await task
"""
    results = scored(write(tmp_path, code), *[ScoreRequest("mine", text, "") for text in ("raises", "waits")])
    assert [result.outcome for result in results] == ["error", "error"]
    assert "CancelledError" in results[0].message


def test_texts_of_a_class_of_the_file_are_plain_texts_outside(tmp_path: Path) -> None:
    code = f"""
import enum
class Verdict(str, enum.Enum):
    RIGHT = "right"
def compute_score({EACH}): return {{"score": 1, "verdict": Verdict.RIGHT}}
"""
    (result,) = scored(write(tmp_path, code), ASKED)
    assert type(result.texts["verdict"]) is str and result.texts == {"verdict": "right"}


def test_a_function_that_changes_its_arguments_changes_its_own(tmp_path: Path) -> None:
    code = f"def compute_score({EACH}, prompt=None): prompt.clear(); ground_truth.sort(); return extra_info.pop('a')"
    shared = ScoreRequest("mine", "", [2, 1], {"a": 1.0}, list(TURNS))
    assert [result.outcome for result in scored(write(tmp_path, code), *[shared] * 6)] == ["ok"] * 6


def test_workers_that_start_later_score_with_the_same_code(tmp_path: Path) -> None:
    code = f"import time\ndef compute_score({EACH}): time.sleep(9 * (solution_str == 'slow')); return VALUE\nVALUE = 1"
    path = write(tmp_path, code)
    with RewardPool(1, 1.0, path=path) as pool:
        pool.load()
        Path(path).write_text(code.replace("VALUE = 1", "VALUE = 2"))  # edited while the run is going
        results = pool.score([ScoreRequest("mine", text, "") for text in ("fine", "slow", "fine")])
    assert [result.score for result in results] == [1.0, 0.0, 1.0] and results[1].outcome == "timeout"


def test_batches_of_coroutines_share_one_loop(tmp_path: Path) -> None:
    code = f"""
import asyncio
gate = asyncio.Semaphore(1)
async def one(text):
    async with gate:
        await asyncio.sleep(0.001)
        return len(text)
async def compute_score_batch({MANY}):
    return await asyncio.gather(*[one(text) for text in solution_strs])
"""
    with RewardPool(1, 10.0, path=write(tmp_path, code)) as pool:
        for _ in range(2):
            assert [result.outcome for result in pool.score([ASKED] * 4)] == ["ok"] * 4


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("compute_score = max", "max has no signature|compute_score has no signature|does not fit"),
        ("from . import helper", "relative import.*write `import helper`"),
        ("import sys\nclass compute_score:\n    def __init__(self): sys.exit('need a key')", "SystemExit: need a key"),
    ],
)
def test_more_that_cannot_be_loaded(code: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=message):
        load_scorer(write(tmp_path, code))
    with pytest.raises(RewardError, match="a module's name has no dot; rename the file.*my_reward_v2.py"):
        load_scorer(write(tmp_path, "x = 1", "my.reward.v2"))
    with pytest.raises(RewardError, match="reward_kwargs has prompt, which the trainer gives to compute_score"):
        load_scorer(write(tmp_path, f"def compute_score({EACH}, prompt=''): return 1"), kwargs={"prompt": "Judge"})


@pytest.mark.parametrize(
    ("value", "score"),
    [("Decimal('0.5')", 0.5), ("numpy.ones((1, 1))", 1.0), ("10**400", None), ("1e200", None), ("-1e7", None)],
)
def test_numbers_of_every_kind_and_size(value: str, score: float | None, tmp_path: Path) -> None:
    path = write(tmp_path, f"import numpy\nfrom decimal import Decimal\ndef compute_score({EACH}): return {value}")
    (result,) = scored(path, ASKED)
    assert (result.score, result.outcome) == ((0.0, "error") if score is None else (score, "ok"))
    assert score is not None or "is needed; sample: " in result.message
