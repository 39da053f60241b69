"""One worker of the reward pool (pool.py): a process of its own that scores what comes over a socket.

Started as `python -c BOOTSTRAP SYS_PATH CONNECTION_FD PROGRESS_FD PARENT_PID`, so nothing of the trainer (CUDA, vLLM,
gloo, threads) is inherited. It scores in its main thread and dies with its parent. It notes in 16 shared bytes which
sample it is at and since when, and the pool kills it when that is too long ago. Only of coroutines that wait does it
keep the deadlines itself: such a sample ends as "timeout" and costs no other one anything.

Messages in: once a Setup; then lists of (index, ScoreRequest) to score, until the socket closes.
Messages out: once Ready, or the text of why the scorer cannot be loaded; then (list of (index, ScoreResult), done).
"""

from __future__ import annotations

import asyncio
import ctypes
import math
import mmap
import os
import resource
import signal
import sys
import time
import types
from collections.abc import Coroutine, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from remax_megatron.rewards.scorer import ASYNC, BATCH, RewardError, Scorer, ScoreRequest, ScoreResult
from remax_megatron.rewards.scoring import built_in_rule, load_scorer

BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from remax_megatron.rewards.worker import main; main(*map(int, sys.argv[2:5]))"
)
FLUSH_S = 0.02  # finished results are sent at least this often, so that a kill loses no more work than this
LOAD_S = 120.0  # what importing a rule may take (sympy on a cold network file system), beside the sample's deadline
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Setup:
    """What a worker is told first: the arguments of `load_scorer`, the limits of its memory (bytes, None: none) and of
    an answer's time (s), and how many coroutines of an async scorer run at once."""

    path: str | None
    source: bytes | None = None  # of the file: a worker that starts later scores with the same code
    name: str = "compute_score"
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    memory_bytes: int | None = None
    timeout_s: float = 10.0
    async_concurrency: int = 64


@dataclass(frozen=True)
class Ready:
    """How the worker's scorer takes answers (Scorer.kind), and the fields of a request that it reads (Scorer.wants)."""

    kind: str
    wants: frozenset[str]


class Progress:
    """The sample a worker is at and the time (s, CLOCK_MONOTONIC, the same in all processes) its clock started.

    Two aligned words of shared memory, each written by one store: struct.pack_into would not do, it clears first.
    """

    NUM_BYTES = 16

    def __init__(self, fd: int):
        self._map = mmap.mmap(fd, self.NUM_BYTES)
        whole = memoryview(self._map)
        self._index, self._started = whole[:8].cast("q"), whole[8:].cast("d")
        whole.release()

    def set(self, index: int, started: float) -> None:
        """Note that the worker is at sample `index` since `started`."""
        self._started[0] = math.inf  # never the new index with the old time
        self._index[0] = index
        self._started[0] = started

    @property
    def index(self) -> int:
        """Return the sample that the worker is at."""
        return self._index[0]

    @property
    def started(self) -> float:
        """Return when its clock started."""
        return self._started[0]

    def close(self) -> None:
        """Give the shared memory up."""
        self._index.release()
        self._started.release()
        self._map.close()


def main(connection_fd: int, progress_fd: int, parent_pid: int) -> None:
    """Serves until the pool closes the socket. Called by BOOTSTRAP only."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # the parent died before the line above
        sys.exit(1)
    connection = Connection(connection_fd)
    for fd in (connection_fd, progress_fd):
        os.set_inheritable(fd, False)  # no program that a scorer starts may hold them
    progress = Progress(progress_fd)
    try:
        setup = connection.recv()
        if setup.memory_bytes is not None:
            limit_address_space(setup.memory_bytes)
        try:
            scorer = load_scorer(setup.path, setup.name, setup.kwargs, setup.source)
        except RewardError as error:
            connection.send(str(error))
            return
        connection.send(Ready(scorer.kind, scorer.wants))
        if scorer.kind == ASYNC:
            asyncio.run(_AsyncWorker(scorer, setup, progress, connection).serve())
        while scorer.kind != ASYNC:
            chunk = connection.recv()
            if scorer.kind == BATCH:
                _score_batch(chunk, scorer, setup.timeout_s, progress, connection)
            else:
                _score_chunk(chunk, scorer, setup.path is None, progress, connection)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the pool is gone


def limit_address_space(num_bytes: int) -> None:
    """RLIMIT_AS of this process and its children, never above the limit it already has."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = num_bytes if hard == resource.RLIM_INFINITY else min(num_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _score_chunk(
    chunk: Sequence[tuple[int, ScoreRequest]],
    scorer: Scorer,
    built_in: bool,
    progress: Progress,
    connection: Connection,
) -> None:
    results: list[tuple[int, ScoreResult]] = []
    last_flush = time.monotonic()
    for index, request in chunk:
        if built_in:
            progress.set(index, time.monotonic() + LOAD_S)
            try:
                built_in_rule(request.data_source)  # imports it the first time
            except RewardError as error:
                results.append((index, ScoreResult(0.0, "error", str(error))))
                continue
        progress.set(index, time.monotonic())
        results.append((index, _score(request, scorer)))
        now = time.monotonic()
        if now - last_flush > FLUSH_S:
            progress.set(index, math.inf)  # this one is done: a pool slow to read must not make it late
            connection.send((results, False))
            results, last_flush = [], now
    progress.set(-1, math.inf)
    connection.send((results, True))


def _score_batch(
    chunk: Sequence[tuple[int, ScoreRequest]],
    scorer: Scorer,
    timeout_s: float,
    progress: Progress,
    connection: Connection,
) -> None:
    """All of `chunk` in one call, which has the time of all its answers together."""
    progress.set(chunk[0][0], time.monotonic() + timeout_s * (len(chunk) - 1))
    try:
        results = scorer.score_batch([request for _, request in chunk])
    except (Exception, SystemExit) as error:
        results = [_failed(error, request) for _, request in chunk]
    progress.set(-1, math.inf)
    connection.send(([(index, result) for (index, _), result in zip(chunk, results, strict=True)], True))


class _AsyncWorker:
    """Scores with coroutines: `async_concurrency` at once, each with a deadline of its own."""

    def __init__(self, scorer: Scorer, setup: Setup, progress: Progress, connection: Connection):
        self._scorer, self._setup, self._progress, self._connection = scorer, setup, progress, connection
        self._turns = asyncio.Semaphore(setup.async_concurrency)
        self._tasks: set[asyncio.Task] = set()
        self._closed = asyncio.Event()

    async def serve(self) -> None:
        """Take chunks as they come until the socket closes."""
        asyncio.get_running_loop().add_reader(self._connection.fileno(), self._take)
        await self._closed.wait()
        raise EOFError

    def _take(self) -> None:
        try:
            while self._connection.poll():
                for index, request in self._connection.recv():
                    task = asyncio.ensure_future(self._answer(index, request))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
        except (EOFError, ConnectionResetError):
            self._closed.set()

    async def _answer(self, index: int, request: ScoreRequest) -> None:
        async with self._turns:
            scoring = asyncio.ensure_future(_watched(self._score(request), index, self._progress))
            done, _ = await asyncio.wait({scoring}, timeout=self._setup.timeout_s)
        if done:
            result = _failed(asyncio.CancelledError("it was cancelled"), request)
            with suppress(asyncio.CancelledError):
                result = scoring.result()
        else:  # one that does not let itself be cancelled is left alone
            scoring.cancel()
            result = ScoreResult(0.0, "timeout", f"no score within {self._setup.timeout_s:g} s")
        try:
            self._connection.send(([(index, result)], True))
        except (BrokenPipeError, ConnectionResetError):
            self._closed.set()

    async def _score(self, request: ScoreRequest) -> ScoreResult:
        try:
            return await self._scorer.score_async(request)
        except (Exception, SystemExit) as error:
            return _failed(error, request)


@types.coroutine
def _watched(
    scoring: Coroutine[Any, Any, ScoreResult], index: int, progress: Progress
) -> Generator[Any, Any, ScoreResult]:
    """Awaits `scoring`, and notes the sample while its code runs: the pool kills a worker that one of them blocks."""
    go_on = partial(scoring.send, None)
    while True:
        progress.set(index, time.monotonic())
        try:
            waits_for = go_on()
        except StopIteration as end:
            return end.value
        finally:
            progress.set(-1, math.inf)
        try:
            go_on = partial(scoring.send, (yield waits_for))
        except BaseException as error:  # a cancellation, which is for the coroutine to take
            go_on = partial(scoring.throw, error)


def _score(request: ScoreRequest, scorer: Scorer) -> ScoreResult:
    try:
        return scorer.score(request)
    except (Exception, SystemExit) as error:  # a rule may raise anything: it is counted and shown by the pool
        return _failed(error, request)


def _failed(error: BaseException, request: ScoreRequest) -> ScoreResult:
    if isinstance(error, RewardError):
        return ScoreResult(0.0, "error", str(error))
    return ScoreResult(0.0, "error", f"{request.data_source}: {type(error).__name__}: {error}"[:2000])
