"""One worker of the reward pool (pool.py): a process of its own that scores what comes over a socket, one by one.

Started as `python -c BOOTSTRAP SYS_PATH CONNECTION_FD PROGRESS_FD PARENT_PID`, so nothing of the trainer (CUDA, vLLM,
gloo, threads) is inherited. It scores in its main thread, dies with its parent, and keeps no deadline itself: it notes
in 16 shared bytes which sample it is at and since when, and the pool kills it when that is too long ago.

Messages in: once (path, name, memory_bytes); then lists of (index, ScoreRequest) to score, until the socket closes.
Messages out: once None or the text of why the scorer cannot be loaded; then (list of (index, ScoreResult), done).
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from remax_megatron.rewards.scoring import RewardError, Scorer, built_in_rule, load_scorer

BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from remax_megatron.rewards.worker import main; main(*map(int, sys.argv[2:5]))"
)
FLUSH_S = 0.02  # finished results are sent at least this often, so that a kill loses no more work than this
LOAD_S = 120.0  # what importing a rule may take (sympy on a cold network file system), beside the sample's deadline
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class ScoreRequest:
    """One answer to score; the four fields are the arguments of a scorer (scoring.py)."""

    data_source: str
    solution_str: str
    ground_truth: str
    extra_info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoreResult:
    """`outcome` is "ok", or why there is no score and `score` is 0: "error" (the scorer raised), "timeout" (killed at
    the deadline) or "crash" (the worker died); `message` then says what happened. `extra` holds the scorer's other
    numbers, such as `flexible` of GSM8K."""

    score: float
    outcome: str = "ok"
    message: str = ""
    extra: dict[str, float] = field(default_factory=dict)


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
        path, name, memory_bytes = connection.recv()
        if memory_bytes is not None:
            limit_address_space(memory_bytes)
        try:
            scorer = load_scorer(path, name)
        except RewardError as error:
            connection.send(str(error))
            return
        connection.send(None)
        while True:
            _score_chunk(connection.recv(), scorer, path is None, progress, connection)
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


def _score(request: ScoreRequest, scorer: Scorer) -> ScoreResult:
    try:
        score, extra = scorer(request.data_source, request.solution_str, request.ground_truth, request.extra_info)
    except RewardError as error:
        return ScoreResult(0.0, "error", str(error))
    except (Exception, SystemExit) as error:  # a rule may raise anything: it is counted and shown by the pool
        return ScoreResult(0.0, "error", f"{request.data_source}: {type(error).__name__}: {error}"[:2000])
    return ScoreResult(score, extra=extra)
