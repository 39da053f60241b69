"""One process per rank, forked from one that has imported what a rank needs, so that a rank starts in milliseconds.

    report = play_each([Job(config, facts, rank=3, world_size=8, act=my_steps)])[0]

There are two kinds of parent: with Transformer Engine's Python half in place before Megatron is imported, and without
it. This module imports neither torch nor Megatron, and neither should what defines `act`.
"""

from __future__ import annotations

import functools
import importlib
import logging
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

from remax_megatron.config.schema import Config
from remax_megatron.model_facts import ModelFacts

if TYPE_CHECKING:
    from tests.stand_ins.fake_cuda.rank import Rank
    from tests.stand_ins.fake_cuda.recorder import Collective, Phase

_NEEDED = (
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.models.mimo",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "remax_megatron.algorithm.logprob_triton",
    "torch._subclasses.schema_check_mode",
    "torch.nn.attention.varlen",
    "torch.testing._internal.distributed.fake_pg",
    "tests.stand_ins.fake_cuda.learned",
    "tests.stand_ins.fake_cuda.rank",
)
_fork = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Job:
    """A rank to be played. `act` gets the built rank; what it returns comes back in the report. `lengths` are the
    (prompt, response) tokens of the answers of a rollout batch, repeated over it."""

    config: Config
    facts: ModelFacts
    rank: int
    world_size: int
    act: Callable[[Rank], Any]
    lengths: Sequence[tuple[int, int]] = ((16, 16),)


@dataclass
class Report:
    """What a rank did: counts by phase, all collectives in order, the result of `act`, or the traceback that ended
    it."""

    rank: int
    phases: dict[str, Phase] = field(default_factory=dict)
    collectives: list[Collective] = field(default_factory=list)
    result: Any = None
    error: str | None = None


def play_each(
    jobs: Sequence[Job], *, transformer_engine: bool = False, at_once: int | None = None, timeout_s: float = 300
) -> list[Report]:
    """Play `jobs`, each in a process of its own, `at_once` (None: as many as there are cores) at a time.

    RuntimeError with the traceback of a rank that failed; TimeoutError when all together take over `timeout_s`.
    """
    count = at_once or len(os.sched_getaffinity(0))
    parent = _parent(transformer_engine)
    reports = parent.submit(_in_parent, list(jobs), count, timeout_s).result(timeout_s + 60)
    for report in reports:
        if report.error is not None:
            raise RuntimeError(f"rank {report.rank} of {jobs[0].world_size}\n{report.error}")
    return reports


@functools.cache
def _parent(transformer_engine: bool) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, _fork, _import_all, (transformer_engine,))


def _import_all(transformer_engine: bool) -> None:
    warnings.simplefilter("ignore")  # about optional packages that are not there
    logging.disable(logging.WARNING)

    from tests.stand_ins.fake_cuda import kernels

    kernels.replace_compilers()
    if transformer_engine:
        from tests.stand_ins.fake_cuda import te

        te.install()
    for name in _NEEDED:
        importlib.import_module(name)


def _in_parent(jobs: list[Job], at_once: int, timeout_s: float) -> list[Report]:
    """Reports in the order of `jobs`. Each rank knows the shapes that those before it have learned."""
    reports: dict[int, Report] = {}
    left = list(enumerate(jobs))[::-1]
    running: dict[Connection, tuple[int, BaseProcess]] = {}
    end = time.monotonic() + timeout_s
    try:
        while left or running:
            while left and len(running) < at_once:
                number, job = left.pop()
                receiver, sender = _fork.Pipe(duplex=False)
                process = _fork.Process(target=_play_into, args=(sender, job))
                process.start()
                sender.close()
                running[receiver] = number, process
            for receiver in (ready := wait(list(running), end - time.monotonic())):
                assert isinstance(receiver, Connection)
                number, process = running.pop(receiver)
                reports[number] = _received(receiver, jobs[number].rank)
                process.join()
            if not ready:
                raise TimeoutError(f"ranks {[jobs[number].rank for number, _ in running.values()]} still run")
    finally:
        for _, process in running.values():
            process.kill()
    return [reports[number] for number in range(len(jobs))]


def _play_into(sender: Connection, job: Job) -> None:
    from tests.stand_ins.fake_cuda import learned
    from tests.stand_ins.fake_cuda.rank import play

    before = learned.known()
    sender.send((play(job), learned.pack(before)))


def _received(receiver: Connection, rank: int) -> Report:
    from tests.stand_ins.fake_cuda import learned

    try:
        report, packed = receiver.recv()
    except EOFError:
        return Report(rank, error="its process ended")
    learned.unpack(packed)
    return report
