"""The pool: results in order, deadlines per sample, failures that are counted, and nothing left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from remax_megatron.errors import UserError
from remax_megatron.rewards import pool as pool_module
from remax_megatron.rewards.gsm8k import flexible_score, strict_score
from remax_megatron.rewards.pool import (
    RewardFailures,
    RewardPool,
    check_failures,
    failure_counts,
)
from remax_megatron.rewards.scorer import RewardError, ScoreRequest, ScoreResult
from remax_megatron.rewards.scoring import check_data_sources

# What the answer says is what the scorer does.
SCORER = """
import os, signal, sys, time
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    word, _, rest = solution_str.partition(" ")
    if word == "sleep":
        time.sleep(float(rest))
    elif word == "spin":  # within one big integer: no signal handler and no other thread of Python runs
        7 ** 7 ** 12
    elif word == "raise":
        raise KeyError(rest)
    elif word == "exit":
        sys.exit(rest)
    elif word == "die":
        os._exit(int(rest))
    elif word == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif word == "memory":
        bytearray(8 << 30)
    elif word == "pid":
        return os.getpid()
    elif word == "child":
        import subprocess
        return subprocess.Popen(["sleep", "60"]).pid
    bonus = extra_info.get("bonus", 0)
    return {"score": float(ground_truth), "length": len(solution_str), "note": "text", "bonus": bonus}
"""


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("scorer") / "mine.py"
    path.write_text(SCORER)
    return str(path)


def asks(*solutions: str) -> list[ScoreRequest]:
    return [ScoreRequest("mine", solution, str(i)) for i, solution in enumerate(solutions)]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # a zombie whose parent is slow to take it is dead


def gone(pid: int, within_s: float = 5.0) -> bool:
    end = time.monotonic() + within_s
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pid)


def test_in_order_with_other_numbers(scorer: str) -> None:
    with RewardPool(2, 5.0, path=scorer) as pool:
        results = pool.score(asks("sleep 0.2", "a", "bb", "sleep 0.1", *["x"] * 50))
        assert [r.score for r in results] == list(range(54))
        assert results[2] == ScoreResult(2.0, extra={"length": 2.0, "bonus": 0.0}, texts={"note": "text"})
        assert pool.score([]) == []
        assert pool.score([ScoreRequest("mine", "", "3", {"bonus": 0.5})])[0].extra["bonus"] == 0.5


def test_each_failure_is_one_sample_of_its_own(scorer: str) -> None:
    """Slow, spinning in C, raising, exiting, dying, killed, greedy: 0 with the right outcome; all others are scored."""
    with RewardPool(2, 0.6, path=scorer, memory_gib=2.0) as pool:
        bad = ["sleep 30", "spin", "raise x", "exit no", "die 3", "kill", "memory"]
        results = pool.score(asks(*(s for b in bad for s in (b, "fine", "fine"))))
        start = time.monotonic()
        assert [r.score for r in pool.score(asks("fine", "fine"))] == [0, 1]  # and it goes on
        assert time.monotonic() - start < 5
    assert [r.outcome for r in results[::3]] == ["timeout", "timeout", "error", "error", "crash", "crash", "error"]
    assert [r.score for r in results] == [i if i % 3 else 0 for i in range(21)]
    messages = [r.message for r in results[::3]]
    assert messages[0] == "no score within 0.6 s" and messages[4] == "the reward worker died: exit code 3"
    assert "mine.py:10: compute_score raised KeyError: 'x'; sample: data_source='mine'" in messages[2]
    assert "SystemExit: no" in messages[3] and "SIGKILL" in messages[5] and "MemoryError" in messages[6]
    assert failure_counts(results) == {"error": 3, "timeout": 2, "crash": 2}


def test_the_deadline_is_per_sample_not_per_message(scorer: str) -> None:
    with RewardPool(1, 0.5, path=scorer) as pool:
        pool._chunk_size = 8
        results = pool.score(asks(*["sleep 0.15"] * 16))  # 1.2 s per message
        assert {r.outcome for r in results} == {"ok"} and [r.score for r in results] == list(range(16))


def test_the_clock_is_never_read_half_written(scorer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 000 starts of the clock while the pool looks at it without a pause: none looks late."""
    monkeypatch.setattr(pool_module, "_LOOK_S", 0.0)
    with RewardPool(1, 5.0, path=scorer) as pool:
        for _ in range(5):
            assert {r.outcome for r in pool.score(asks(*["fine"] * 4000))} == {"ok"}


def test_a_worker_that_died_between_calls_is_replaced(scorer: str) -> None:
    with RewardPool(1, 5.0, path=scorer) as pool:
        pid = int(pool.score(asks("pid"))[0].score)
        os.kill(pid, signal.SIGKILL)
        assert gone(pid) or pool._workers[0].process.poll() is not None
        result = pool.score(asks("pid"))[0]
        assert result.outcome == "ok" and result.score != pid
    results = []
    pool = RewardPool(1, 5.0, path=scorer)
    for _ in range(2):  # a worker dies with the thread that started it: the next call, from another one, goes on
        thread = threading.Thread(target=lambda: results.extend(pool.score(asks("die 1", "fine"))))
        thread.start()
        thread.join()
    pool.close()
    assert [r.outcome for r in results] == ["crash", "ok"] * 2


def test_nothing_is_left(scorer: str) -> None:
    fds, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    with RewardPool(2, 0.5, path=scorer) as pool:
        grandchild = int(pool.score(asks("child"))[0].score)
        pool.score(asks("sleep 9", "die 1", "fine"))
        pids, folder = [w.process.pid for w in pool._workers], Path(pool._folder)
        assert folder.is_dir()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids) and gone(grandchild) and not folder.exists()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == (fds, threads)
    pool.close()  # twice is once
    with pytest.raises(RewardError, match="this reward pool is closed"):
        pool.score(asks("fine"))


def test_workers_die_with_the_parent(scorer: str, tmp_path: Path) -> None:
    """Also in the middle of a computation that no signal handler interrupts."""
    code = f"""
import sys
sys.path[:] = {sys.path!r}
from remax_megatron.rewards.pool import RewardPool
from remax_megatron.rewards.scorer import ScoreRequest
pool = RewardPool(2, 60.0, path={scorer!r})
pool.score([ScoreRequest("mine", "fine", "1")] * 4)
print(*[w.process.pid for w in pool._workers], flush=True)
pool.score([ScoreRequest("mine", "spin", "1")] * 2)
"""
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    time.sleep(0.3)
    assert len(pids) == 2 and all(alive(pid) for pid in pids)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert all(gone(pid) for pid in pids)


def test_scorers_that_cannot_be_loaded(tmp_path: Path, scorer: str) -> None:
    with RewardPool(1, 1.0, path=str(tmp_path / "no.py")) as pool, pytest.raises(RewardError, match="is not a file"):
        pool.score(asks("fine"))
    with RewardPool(1, 1.0, path=scorer, name="scor") as pool, pytest.raises(RewardError, match="found: compute_score"):
        pool.score(asks("fine"))
    (tmp_path / "dies.py").write_text("import os; os._exit(7)")
    with (
        RewardPool(1, 1.0, path=str(tmp_path / "dies.py")) as pool,
        pytest.raises(RewardError, match="ended with code 7"),
    ):
        pool.score(asks("fine"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_workers": 0}, "reward.num_workers=0 must be at least 1"),
        ({"timeout_s": 0.0}, "reward.timeout_s=0.0 must be a positive number"),
        ({"timeout_s": float("nan")}, "reward.timeout_s=nan must be"),
        ({"memory_gib": 0.1}, "reward.memory_gib=0.1 must be at least 0.25"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        RewardPool(**{"num_workers": 1, "timeout_s": 1.0, **settings})


def test_check_failures() -> None:
    ok, late = ScoreResult(1.0), ScoreResult(0.0, "timeout", "no score within 3 s")
    check_failures([], 0.0)
    check_failures([ok] * 19 + [late], 0.05)
    with pytest.raises(RewardFailures) as error:
        check_failures([ok] * 17 + [late, ScoreResult(0.0, "error", "ValueError: x"), late], 0.05)
    assert isinstance(error.value, UserError)
    assert str(error.value).startswith(
        "reward.max_failure_share=0.05: 3 of 20 rewards failed (15.0%: 1 error, 2 timeout, 0 crash); "
        "the first, timeout: no score within 3 s. "
    )


def test_built_in_rules_by_data_source() -> None:
    with RewardPool(1, 20.0) as pool:
        results = pool.score(
            [
                ScoreRequest("openai/gsm8k", "so #### 18", "18"),
                ScoreRequest("word_problems", "so 18.", "18"),
                ScoreRequest("lighteval/MATH", "18", "18"),
            ]
        )
    assert results[0] == ScoreResult(1.0, extra={"flexible": 1.0})
    assert results[1] == ScoreResult(0.0, extra={"flexible": 1.0})  # the disagreement of the two rules
    assert results[2].outcome == "error" and results[2].message.startswith("no scorer for data_source 'lighteval/MATH'")
    check_data_sources({"code", "DigitalLearningGmbH/MATH-lighteval"})


@pytest.mark.parametrize(
    ("solution", "truth", "strict", "flexible"),
    [
        ("#### 18", "18", 1, 1),
        ("#### 1,000", "1000", 1, 1),
        ("#### 18%", "18", 1, 1),
        ("#### 18.", "18", 0, 1),
        ("#### $18", "18", 0, 1),
        ("####18", "18", 0, 1),
        ("#### **18**", "18", 0, 1),
        (r"\boxed{18}", "18", 0, 1),
        ("#### 18.0", "18", 0, 1),
        ("The answer is 18.", "18", 0, 1),
        ("So -18, as said ...", "-18", 0, 1),  # dots alone are no number
        ("#### 18 apples in 3 boxes", "18", 1, 0),
        ("#### 17", "18", 0, 0),
        ("none", "18", 0, 0),
        ("1.2.3", "18", 0, 0),
        ("18" + "x" * 299, "18", 0, 0),  # "8" alone is in sight
    ],
)
def test_strict_and_flexible(solution: str, truth: str, strict: int, flexible: int) -> None:
    assert (strict_score(solution, truth), flexible_score(solution, truth)) == (strict, flexible)


def test_thousands_of_cheap_samples_take_well_under_a_second() -> None:
    text = "Natalia sold 48 clips. " * 60
    requests = [ScoreRequest("openai/gsm8k", f"{text}#### {i}", str(i), {"index": i}) for i in range(5120)]
    with RewardPool(2, 10.0) as pool:
        pool.score(requests[:512])  # the workers are up
        start = time.perf_counter()
        results = pool.score(requests)
        seconds = time.perf_counter() - start
    assert all(r.score == 1.0 for r in results) and seconds < 1.0, seconds


def test_answers_are_scored_while_others_are_written(scorer: str) -> None:
    """Four slow answers that come one after the other: at the end only the last is left to wait for."""
    with RewardPool(2, 5.0, path=scorer) as pool:
        pool.score(asks("warm", "up"))  # both workers are there
        scoring = pool.begin(4)
        for request in asks(*["sleep 0.3"] * 4):
            scoring.add(request)
            until = time.monotonic() + 0.4  # the next answer is being written
            while time.monotonic() < until:
                scoring.poll()
                time.sleep(0.01)
        assert len(scoring.scored) >= 3
        began = time.monotonic()
        assert [result.score for result in scoring.results()] == [0.0, 1.0, 2.0, 3.0]
        assert time.monotonic() - began < 0.3


def test_a_scorer_of_batches_still_gets_its_share_in_one_call(tmp_path: Path) -> None:
    (tmp_path / "batch.py").write_text(
        "def compute_score(data_sources, solution_strs, ground_truths, extra_infos):\n"
        "    return [float(len(solution_strs))] * len(solution_strs)\n"
    )
    with RewardPool(1, 5.0, path=str(tmp_path / "batch.py")) as pool:
        scoring = pool.begin(5)
        for request in asks(*"abcde"):
            scoring.add(request)
            scoring.poll(0.05)
        assert [result.score for result in scoring.results()] == [5.0] * 5


def test_too_many_failures_end_the_batch_before_all_answers_are_written(scorer: str) -> None:
    with RewardPool(1, 5.0, path=scorer) as pool:
        scoring = pool.begin(10, max_failure_share=0.1)
        scoring.add(asks("raise now")[0])
        scoring.add(asks("raise again")[0])
        with pytest.raises(RewardFailures, match="2 of 10 rewards failed"):
            while True:
                scoring.poll(0.1)
