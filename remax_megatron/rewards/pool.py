"""Scores many answers in worker processes that can be killed: a deadline per answer, and failures that are counted.

    with RewardPool(num_workers=4, timeout_s=10.0) as pool:
        results = pool.score([ScoreRequest("openai/gsm8k", answer.text, "18")])  # in the order of the requests
        check_failures(results, max_share=0.05)

Answers that are written one after the other are scored meanwhile: `begin` and `Scoring`.

An answer whose scorer overruns its deadline costs its worker (SIGKILL, a new one starts) and gets score 0 with outcome
"timeout"; an exception is "error", a worker that dies is "crash"; all other answers are unaffected. Workers are fresh
interpreters (worker.py), take many cheap answers per message or few expensive ones, and never outlive this process. A
scorer of coroutines has many answers at once and is killed only when one of them blocks it; one that takes batches gets
its share of all answers in one call, which has the time of all of them, and shares their fate.

One thread at a time may use a pool. Linux only (memfd, PR_SET_PDEATHSIG). A worker also dies with the *thread* that
started it, which the next `score` repairs. A scorer is trusted code here; untrusted programs run in sandbox/.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import Any

from remax_megatron.errors import UserError
from remax_megatron.rewards.sandbox.api import remove_folder
from remax_megatron.rewards.scorer import ASYNC, BATCH, RewardError, ScoreRequest, ScoreResult
from remax_megatron.rewards.worker import BOOTSTRAP, LOAD_S, Progress, Ready, Setup

FAILURES = ("error", "timeout", "crash")
_FIRST_CHUNK, _MAX_CHUNK = 8, 512  # answers per message; between them by how long the last one took
_SHORT_S, _LONG_S = 0.02, 0.1
_LOOK_S = 0.1  # how late an overrun may be noticed


class RewardFailures(UserError):
    """More rewards failed than reward.max_failure_share allows: training on them would teach the failures."""


class RewardPool:
    """`num_workers` processes that score with the built-in rules (path None) or with `name` of the file `path`."""

    def __init__(
        self,
        num_workers: int,
        timeout_s: float,
        *,
        path: str | None = None,
        name: str = "compute_score",
        kwargs: Mapping[str, Any] | None = None,
        memory_gib: float | None = None,
        async_concurrency: int = 64,
    ):
        """RewardError when a limit is none; whether the scorer can be loaded shows in `load`, or the first `score`.

        num_workers        processes
        timeout_s          the deadline of one answer in seconds of wall time
        path, name         the user's scorer (custom.py)
        kwargs             more arguments for it
        memory_gib         address space of each worker; a scorer that wants more gets MemoryError, outcome "error"
        async_concurrency  coroutines of an async scorer that run at once in a worker
        """
        if num_workers < 1:
            raise RewardError(f"reward.num_workers={num_workers} must be at least 1")
        if not 0 < timeout_s < math.inf:
            raise RewardError(f"reward.timeout_s={timeout_s} must be a positive number of seconds")
        if memory_gib is not None and not memory_gib >= 0.25:
            raise RewardError(f"reward.memory_gib={memory_gib} must be at least 0.25: an interpreter needs as much")
        self.timeout_s = timeout_s
        memory_bytes = None if memory_gib is None else int(memory_gib * 2**30)
        self._folder = tempfile.mkdtemp(
            prefix="remax-rewards-"
        )  # TMPDIR of the workers: nothing of theirs stays behind
        os.chmod(self._folder, 0o711)  # the sandbox's programs run as nobody where this process is root's
        path = None if path is None else os.path.abspath(os.path.expanduser(path))
        source = Path(path).read_bytes() if path is not None and Path(path).is_file() else None
        self._setup = Setup(path, source, name, dict(kwargs or {}), memory_bytes, timeout_s, async_concurrency)
        self._chunk_size = _FIRST_CHUNK
        self._workers: list[_Worker] = []
        try:
            for _ in range(num_workers):
                self._workers.append(_Worker(self._setup, self._folder))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kills all workers and waits for them. May be called twice."""
        while self._workers:
            self._workers.pop().kill()
        remove_folder(self._folder)

    def load(self) -> None:
        """Wait until a worker has loaded the scorer; RewardError, and the end of the pool, when it cannot be."""
        try:
            while not any(worker.ready for worker in self._workers):
                first = self._workers[0]
                if first.connection.poll(_LOOK_S):
                    self._take(first, {}, deque())
                elif first.late_sample(self.timeout_s) is not None:
                    self._end(first, {}, deque(), late=-1)
        except BaseException:
            self.close()
            raise

    def score(
        self, requests: Sequence[ScoreRequest], *, max_failure_share: float = 1.0, num_answers: int | None = None
    ) -> list[ScoreResult]:
        """The result of each request, in order; the rest is as in `begin`."""
        scoring = self.begin(len(requests), max_failure_share=max_failure_share, num_answers=num_answers)
        for request in requests:
            scoring.add(request)
        return scoring.results()

    def begin(self, num_requests: int, *, max_failure_share: float = 1.0, num_answers: int | None = None) -> Scoring:
        """Score `num_requests` answers that are still to come; the batch before must be done.

        RewardFailures as soon as more than that share of `num_answers` (of all pools together; None: these requests)
        have failed, so that a scorer that hangs does not hold the other ranks up until their collectives time out.
        """
        if not self._workers:
            raise RewardError("this reward pool is closed")
        return Scoring(self, num_requests, max_failure_share, num_answers or num_requests)

    def advance(self, scoring: Scoring, wait_s: float) -> None:
        """Send what workers have room for, and take what they have finished; waits `wait_s` for that at most."""
        todo, results = scoring.todo, scoring.scored
        for worker in self._workers:
            if todo and self._is_ready(worker) and (size := self._room(worker, scoring)) > 0:
                indices = [todo.popleft() for _ in range(min(size, len(todo)))]
                worker.send([(i, scoring.requests[i]) for i in indices], self.timeout_s)
        watched = [w for w in self._workers if w.pending or not w.ready]
        if not watched:
            return
        next_deadline = min(w.deadline(self.timeout_s) for w in watched)
        wait_s = max(0.0, min(next_deadline - time.monotonic(), wait_s))
        readable = wait([w.connection for w in watched], timeout=wait_s)
        for worker in watched:
            if worker.connection in readable:
                self._take(worker, results, todo)
            elif (late := worker.late_sample(self.timeout_s)) is not None:
                self._end(worker, results, todo, late)

    def _room(self, worker: _Worker, scoring: Scoring) -> int:
        """How many more answers the worker is sent, of those that no worker has."""
        fair = -(-scoring.num_requests // len(self._workers))
        if worker.kind == ASYNC:
            return min(self._setup.async_concurrency, fair) - len(worker.pending)
        if worker.pending:
            return 0
        if worker.kind == BATCH:
            return fair if len(scoring.requests) == scoring.num_requests else 0
        return max(1, min(self._chunk_size, len(scoring.todo) // (2 * len(self._workers))))

    def _is_ready(self, worker: _Worker) -> bool:
        """Whether chunks can be sent. One that died between two calls (its starting thread ended) is replaced."""
        if worker.ready and worker.process.poll() is not None:
            self._replace(worker)
            return False
        return worker.ready

    def _take(self, worker: _Worker, results: dict[int, ScoreResult], todo: deque[int]) -> None:
        """Takes one message of the worker, or notes its death."""
        try:
            message = worker.connection.recv()
        except (ImportError, AttributeError, pickle.UnpicklingError) as error:
            raise RewardError(f"a reward worker sent what cannot be read here: {error}") from error
        except (EOFError, OSError):
            if not worker.ready:
                code = worker.stop(grace_s=5.0)
                message = f"a reward worker ended with code {code} before it was ready; its output says why"
                raise RewardError(message) from None
            self._end(worker, results, todo, late=None)
            return
        if not worker.ready:
            if not isinstance(message, Ready):
                raise RewardError(message)
            worker.is_ready(message)
            return
        finished, done = message
        worker.take(finished, results)
        if done:
            elapsed = time.monotonic() - worker.sent
            if elapsed < _SHORT_S:
                self._chunk_size = min(2 * self._chunk_size, _MAX_CHUNK)
            elif elapsed > _LONG_S:
                self._chunk_size = max(self._chunk_size // 2, 1)

    def _end(self, worker: _Worker, results: dict[int, ScoreResult], todo: deque[int], late: int | None) -> None:
        """Buries a worker that is late (kills it) or dead, blames the sample it was at, and starts another."""
        if not worker.ready:
            worker.kill()
            raise RewardError(f"a reward worker was not ready after {LOAD_S:.0f} s: the scorer's import hangs")
        code = worker.stop(grace_s=1.0 if late is None else 0.0)  # a dying one is to tell its own exit code
        with suppress(EOFError, OSError):  # what it had sent before it died counts
            while worker.connection.poll():
                worker.take(worker.connection.recv()[0], results)
        culprit = worker.progress.index  # final: the process is gone
        if worker.kind == BATCH:
            how = "timeout" if late is not None else "crash"
            message = f"no scores of {len(worker.pending)} answers in time" if late is not None else "the worker died"
            results |= {index: ScoreResult(0.0, how, message) for index in worker.pending}
            worker.pending.clear()
        elif culprit in worker.pending and (late is None or late == culprit):
            worker.pending.remove(culprit)
            if late is None:
                how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                results[culprit] = ScoreResult(0.0, "crash", f"the reward worker died: {how}")
            else:
                results[culprit] = ScoreResult(0.0, "timeout", f"no score within {self.timeout_s:g} s")
        elif late is None and worker.pending and culprit not in worker.pending:
            # died between two samples; without a culprit the chunk would come back for ever
            first = min(worker.pending)
            worker.pending.remove(first)
            results[first] = ScoreResult(0.0, "crash", "the reward worker died between two samples")
        todo.extendleft(sorted(worker.pending, reverse=True))
        self._replace(worker)

    def _replace(self, worker: _Worker) -> None:
        place = self._workers.index(worker)
        worker.kill()
        self._workers[place] = _Worker(self._setup, self._folder)


class Scoring:
    """A batch of answers that are scored while others of it are still being written: `add` each, `poll` in between,
    take all `results` in the end. Any error or Ctrl-C closes the pool. Made by `RewardPool.begin`, where the errors of
    all three are said."""

    def __init__(self, pool: RewardPool, num_requests: int, max_share: float, num_answers: int):
        self.num_requests = num_requests
        self.requests: list[ScoreRequest] = []
        self.todo: deque[int] = deque()  # indices of requests that no worker has
        self.scored: dict[int, ScoreResult] = {}
        self._pool, self._max_share, self._num_answers = pool, max_share, num_answers

    def add(self, request: ScoreRequest) -> None:
        """Take one more request."""
        self.todo.append(len(self.requests))
        self.requests.append(request)

    def poll(self, wait_s: float = 0.0) -> None:
        """Let the workers go on; waits for one of them at most `wait_s` seconds."""
        before = len(self.scored)
        try:
            self._pool.advance(self, wait_s)
            if len(self.scored) > before:
                failed = [result for result in self.scored.values() if result.outcome != "ok"]
                if len(failed) > self._max_share * self._num_answers:
                    raise _too_many(failed, self._num_answers, self._max_share)
        except BaseException:
            self._pool.close()
            raise

    def results(self) -> list[ScoreResult]:
        """Wait for the result of each request; they are in the order of `add`."""
        assert len(self.requests) == self.num_requests, "all answers are there"
        while len(self.scored) < self.num_requests:
            self.poll(_LOOK_S)
        return [self.scored[i] for i in range(self.num_requests)]


class _Worker:
    """A worker process as the pool sees it; `pending` are the indices sent and not yet answered."""

    def __init__(self, setup: Setup, folder: str):
        self.ready, self.kind = False, ""
        self._unwanted: dict[str, Any] = {}  # fields of a request that need not be sent
        self.pending: set[int] = set()
        self.sent = time.monotonic()
        self.connection, theirs = Pipe()
        progress_fd = os.memfd_create("reward-progress")
        try:
            os.ftruncate(progress_fd, Progress.NUM_BYTES)
            self.progress = Progress(progress_fd)
            self.progress.set(-1, self.sent + LOAD_S)
            arguments = [json.dumps([p or os.getcwd() for p in sys.path]), *map(str, (theirs.fileno(), progress_fd))]
            self.process = subprocess.Popen(
                [sys.executable, "-c", BOOTSTRAP, *arguments, str(os.getpid())],
                pass_fds=(theirs.fileno(), progress_fd),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is the trainer's to handle
                env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": folder},
            )
        finally:
            os.close(progress_fd)
            theirs.close()
        with suppress(BrokenPipeError):  # its death shows when it is waited for
            self.connection.send(setup)

    def is_ready(self, message: Ready) -> None:
        self.ready, self.kind = True, message.kind
        self._unwanted = {} if "prompt" in message.wants else {"prompt": []}
        if not message.wants & {"token_ids", "num_tokens"}:
            self._unwanted["token_ids"] = []

    def deadline(self, timeout_s: float) -> float:
        """When it has to be killed (CLOCK_MONOTONIC, s)."""
        return self.progress.started + (timeout_s if self.ready else 0.0)

    def late_sample(self, timeout_s: float) -> int | None:
        """The index it is at (-1: it is starting) where its deadline has passed."""
        deadline = self.deadline(timeout_s)
        index = self.progress.index
        return index if deadline == self.deadline(timeout_s) < time.monotonic() else None

    def send(self, chunk: list[tuple[int, ScoreRequest]], timeout_s: float) -> None:
        self.pending |= {index for index, _ in chunk}
        self.sent = time.monotonic()
        if self.kind != ASYNC:  # which tells by itself when it is at work
            self.progress.set(chunk[0][0], self.sent + (timeout_s * (len(chunk) - 1) if self.kind == BATCH else 0.0))
        with suppress(BrokenPipeError, ConnectionResetError):  # its death shows when it is waited for
            self.connection.send([(index, replace(request, **self._unwanted)) for index, request in chunk])

    def take(self, finished: list[tuple[int, ScoreResult]], results: dict[int, ScoreResult]) -> None:
        for index, result in finished:
            results[index] = result
            self.pending.discard(index)

    def stop(self, grace_s: float = 0.0) -> int:
        """Kills the process after `grace_s`, and its group; returns the exit code, negative for a signal."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(grace_s)
        with suppress(ProcessLookupError):  # also when it is dead: what it had started is in its group
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def kill(self) -> int:
        code = self.stop()
        self.connection.close()
        self.progress.close()
        return code


def failure_counts(results: Sequence[ScoreResult]) -> dict[str, int]:
    """How many results failed in each way: {"error": 0, "timeout": 1, "crash": 0}."""
    counts = Counter(result.outcome for result in results)
    return {outcome: counts[outcome] for outcome in FAILURES}


def check_failures(results: Sequence[ScoreResult], max_share: float) -> None:
    """RewardFailures when more than `max_share` of the results are not "ok"; the first message is shown."""
    failed = [result for result in results if result.outcome != "ok"]
    if len(failed) > max_share * len(results):
        raise _too_many(failed, len(results), max_share)


def _too_many(failed: Sequence[ScoreResult], total: int, max_share: float) -> RewardFailures:
    counts, first = failure_counts(failed), failed[0]
    return RewardFailures(
        f"reward.max_failure_share={max_share:g}: {len(failed)} of {total} rewards failed "
        f"({len(failed) / total:.1%}: {', '.join(f'{n} {outcome}' for outcome, n in counts.items())}); "
        f"the first, {first.outcome}: {first.message}. Fix the scorer or the data, raise reward.timeout_s "
        "or reward.memory_gib, or raise reward.max_failure_share to train with these scored 0"
    )
