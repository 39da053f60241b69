"""A rank that hangs, dies or is cut off ends the run, and every rank prints where it was.

`start()` once per rank, after torch.distributed is up and inside failure.py's `ends_all_ranks`; `stop()` after the
run's last barrier. In between the main thread says where it is, at the cost of microseconds:

    with watchdog.phase("update"):               # phases.PhaseTimer(around=(watchdog.phase,)) does it for a step's
        watchdog.beat("micro-batch 3 of 7")

All of these do nothing while no watchdog runs. Two threads per rank: *talk* exchanges heartbeats through a connection
of its own to the rendezvous store, and may block there for ever, since a store behind a cut link answers nothing and
refuses nothing. *watch* touches no network, and ends this process with code 1 when
  - a rank has reported a failure (failure.py),
  - this rank's main thread has not beaten for `progress_timeout_s`: it is stuck, or waits for one that is (an engine's
    rank of a split run that is `idle` may be so for ever),
  - another rank's heartbeat has stood still for `dead_after_s`: killed, frozen, or its host unreachable,
  - the store has not answered for `dead_after_s`.
Deadlines run on a clock of this rank that stands still while the process is frozen; only for the question which of
several silent ranks was the first are wall clocks of different hosts compared.

A main thread that holds the interpreter's lock for `dead_after_s` looks frozen to all, its own watch thread included:
faulthandler's timer, which needs no lock, then prints the stacks and ends the process. While the run starts, when
libraries are loaded from slow disks under that lock, this and the heartbeats are given `START_PATIENCE` times as long.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from remax_megatron.parallel import failure
from remax_megatron.parallel.whole_run import whole_run

START, BETWEEN = "start", "between phases"  # before the first named phase; after it, outside of all
IDLE = "idle"  # with nothing to do until another rank calls, for as long as that takes
START_PATIENCE = 2.5
_THREADS = "watchdog"
_EXCHANGES = (
    "torch.distributed.distributed_c10d",
    "megatron.core.pipeline_parallel.p2p_",
    "vllm.distributed",
    "remax_megatron.parallel.link",
)
_STDERR = 2  # written to directly: a stuck main thread may hold the lock of sys.stderr


class Place(NamedTuple):
    """Where a main thread is, in its own words, and since when: on the watch's clock, and on the wall's."""

    phase: str
    detail: str
    since_s: float
    wall_s: float

    def __str__(self) -> str:
        return f"phase {self.phase}" + (f", {self.detail}" if self.detail else "")


class Heartbeat(NamedTuple):
    """What a rank publishes. `number` moves with every heartbeat; `where` names its host; `waits` when its main thread
    is in a call that other ranks have to answer; `done` after the orderly end."""

    number: int
    place: Place
    where: str
    waits: bool
    done: bool

    def encode(self) -> str:
        """Write the heartbeat as the text that the store keeps."""
        return json.dumps(self)

    @staticmethod
    def decode(text: bytes) -> Heartbeat:
        """Read what `encode` wrote."""
        number, place, *rest = json.loads(text)
        return Heartbeat(number, Place(*place), *rest)


class _Peer(NamedTuple):
    """Another rank's last heartbeat, and when this rank saw it change."""

    heartbeat: Heartbeat
    moved_s: float


class Watchdog:
    """The two threads of one rank. The constructor is collective: it returns when all ranks are there.

    The `world_size` ranks meet in the `store`. `progress_timeout_s` is the longest a main thread may be without a beat,
    `dead_after_s` the longest a process may be without a heartbeat, `poll_s` how often the threads look. `cleanup` runs
    before the process is ended, for a few seconds at most.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        progress_timeout_s: float,
        *,
        cleanup: Callable[[], None],
        dead_after_s: float,
        poll_s: float,
    ) -> None:
        self._store = store.clone()  # type: ignore[attr-defined]
        self._rank, self._cleanup = rank, cleanup
        self._progress_timeout_s, self._dead_after_s, self._poll_s = progress_timeout_s, dead_after_s, poll_s
        self._where = f"node {os.environ.get('GROUP_RANK', 0)} ({socket.gethostname()})"
        self._clock_s = 0.0
        self._count = 0
        self._stop, self._wake, self._first_known = threading.Event(), threading.Event(), threading.Event()
        self._verdict = ""  # for the talk thread to write
        self._first = ""  # the first failure of the run, as the store has it
        self._peers: dict[int, _Peer] = {}  # replaced whole by the talk thread
        self._answered_s, self._store_error = 0.0, "no answer"
        self.beat(START)

        self._keys = [f"{failure.KEYS}/heartbeat/{r}" for r in range(world_size)]
        self._store.compare_set(failure.FIRST_FAILURE, "", "")  # exists now: reading a missing key would block
        self._publish()
        self._store.wait(self._keys, datetime.timedelta(seconds=START_PATIENCE * dead_after_s))
        self._threads = [
            threading.Thread(target=self._talk, name=f"{_THREADS}-talk", daemon=True),
            threading.Thread(target=self._watch, name=f"{_THREADS}-watch", daemon=True),
        ]
        self._arm(self._patience_s(self._place))
        for thread in self._threads:
            thread.start()

    # -- the main thread -------------------------------------------------------------------------------------------

    def beat(self, phase: str, detail: str = "") -> None:
        """Note that the main thread is at `detail` of `phase` now."""
        self._place = Place(phase, detail, self._clock_s, time.time())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Beats on entering, and on leaving, back in the phase around. After an exception the place is left to see."""
        outer = self._place
        self.beat(name)
        if outer.phase == START:
            self._wake.set()  # the others shall know at once that there is no need for patience any more
        yield
        self.beat(*((BETWEEN, "") if outer.phase == START else (outer.phase, outer.detail)))

    def beat_detail(self, detail: str) -> None:
        """Note that the main thread is at `detail` of the phase it is in."""
        self.beat(self._place.phase, detail)

    def stop(self) -> None:
        """The orderly end: the others will not take this rank's silence for death. Waits a few seconds at most."""
        self._stop.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(failure.CLEANUP_S)

    # -- the talk thread -------------------------------------------------------------------------------------------

    def _talk(self) -> None:
        last = False
        while not last:
            last = self._stop.is_set()
            try:
                self._publish()
                self._read()
                self._answered_s = self._clock_s
            except RuntimeError as error:  # torch.distributed's errors: refused, reset, timed out
                self._store_error = " ".join(str(error).split())[:200]
            if not last:
                self._wake.wait(self._poll_s)
                self._wake.clear()

    def _publish(self) -> None:
        self._count += 1
        self._store.set(self._keys[self._rank], self._heartbeat().encode())

    def _heartbeat(self) -> Heartbeat:
        return Heartbeat(self._count, self._place, self._where, _main_thread_waits(), self._stop.is_set())

    def _read(self) -> None:
        if self._verdict:
            failure.write_first_failure(self._store, self._verdict)
        first, *heartbeats = self._store.multi_get([failure.FIRST_FAILURE, *self._keys])
        peers = {}
        for rank, text in enumerate(heartbeats):
            heartbeat, old = Heartbeat.decode(text), self._peers.get(rank)
            unmoved = old is not None and old.heartbeat.number == heartbeat.number
            peers[rank] = _Peer(heartbeat, old.moved_s if old is not None and unmoved else self._clock_s)
        self._peers = peers
        if first:
            self._first = first.decode()
            self._first_known.set()

    # -- the watch thread ------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        tick_s = min(0.5, self._poll_s / 2)
        last = time.monotonic()
        while not self._stop.wait(tick_s):
            now = time.monotonic()
            self._clock_s += min(now - last, 4 * tick_s)  # not the time this process was frozen
            last = now
            self._arm(self._patience_s(self._place))
            verdict = self._judge()
            if verdict and failure.claims_ending():
                self._end(verdict)
        faulthandler.cancel_dump_traceback_later()

    @staticmethod
    def _arm(seconds: float) -> None:
        """Unless called again before, the process prints its stacks and ends, even under a lock that is never freed."""
        faulthandler.dump_traceback_later(seconds, exit=True, file=_STDERR)

    def _patience_s(self, place: Place) -> float:
        return self._dead_after_s * (START_PATIENCE if place.phase == START else 1)

    def _judge(self) -> str:
        """The failure that ends this rank, named by the rank that failed first; empty when all is well."""
        if self._first:
            return self._first
        unanswered_s = self._clock_s - self._answered_s
        if unanswered_s > self._dead_after_s:
            far = [r for r, peer in self._peers.items() if peer.heartbeat.where != self._where]
            return (
                f"the rendezvous store at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} (not heard "
                f"of for {unanswered_s:.0f} s, {self._store_error}: its host is down, cut off, or its launcher ended; "
                f"on other hosts: {self._list(far) or 'no rank'})"
            )
        silent = {
            rank: self._answered_s - peer.moved_s
            for rank, peer in self._peers.items()
            if not peer.heartbeat.done and self._answered_s - peer.moved_s > self._patience_s(peer.heartbeat.place)
        }
        if silent:
            first = max(silent, key=lambda rank: silent[rank])
            others = self._list([rank for rank in silent if rank != first])
            return (
                f"{self._name(first)} (no sign of life for {silent[first]:.0f} s: dead, frozen or cut off"
                f"{f'; so are {others}' if others else ''})"
            )
        if self._place.phase != IDLE and self._clock_s - self._place.since_s > self._progress_timeout_s:
            beats = {r: peer.heartbeat for r, peer in self._peers.items() if not peer.heartbeat.done}
            beats[self._rank] = self._heartbeat()
            beats = {rank: beat for rank, beat in beats.items() if beat.place.phase != IDLE}
            # Who waits for others is not to blame, if it can be seen; NCCL's waits cannot, then it is who beat first.
            first = min(beats, key=lambda rank: (beats[rank].waits, beats[rank].place.wall_s))
            return f"{self._name(first)} (no progress for {time.time() - beats[first].place.wall_s:.0f} s)"
        return ""

    def _name(self, rank: int) -> str:
        place, where = self._place, self._where
        if rank != self._rank:
            place, where = self._peers[rank].heartbeat.place, self._peers[rank].heartbeat.where
        return f"rank {rank} on {where} in {place}"

    def _list(self, ranks: list[int]) -> str:
        names = [self._name(rank) for rank in ranks[:8]]
        return "; ".join(names + ([f"and {len(ranks) - 8} more"] if len(ranks) > 8 else []))

    def _end(self, verdict: str) -> None:
        """Tell the other ranks, print where this one is, clean up, and leave when the others had time to do so too."""
        self._arm(4 * failure.CLEANUP_S)  # should any of this hang
        began = time.monotonic()
        self._verdict = verdict
        self._wake.set()
        if self._first_known.wait(min(self._poll_s, failure.CLEANUP_S)):
            verdict = self._first
        failure.within(failure.CLEANUP_S, lambda: self._print(verdict))
        failure.within(failure.CLEANUP_S, self._cleanup)
        time.sleep(max(0.0, began + failure.LINGER_S - time.monotonic()))
        os._exit(1)

    def _print(self, verdict: str) -> None:
        place, for_s = self._place, self._clock_s - self._place.since_s
        lines = [f"watchdog: this rank ends because of {verdict}, the first to fail"]
        lines.append(f"watchdog: here {place}, for {for_s:.1f} s, on {self._where}")
        if "KeyboardInterrupt" not in verdict:
            lines += _stacks()
        os.write(_STDERR, "".join(f"[rank {self._rank}] {line}\n" for line in lines).encode())
        if verdict.startswith(f"rank {self._rank} "):
            get_error_handler().record_exception(RuntimeError(verdict))  # torchrun's root cause


def _main_thread_waits() -> bool:
    """True when the main thread's innermost Python function is one that exchanges data with other ranks."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return frame is not None and frame.f_globals.get("__name__", "").startswith(_EXCHANGES)


def _stacks() -> list[str]:
    """The Python stack of each thread, the main one first, innermost call last. Reads no file: a disk may hang too."""
    frames = sys._current_frames()
    main = threading.main_thread()
    lines = []
    for thread in sorted(threading.enumerate(), key=lambda thread: thread is not main):
        frame = frames.get(thread.ident or 0)
        if frame is None or thread.name.startswith(_THREADS) or thread is threading.current_thread():
            continue
        stack = []
        while frame is not None:
            code = frame.f_code
            stack.append(f'    File "{code.co_filename}", line {frame.f_lineno}, in {code.co_qualname}')
            frame = frame.f_back
        lines += [f"  thread {thread.name}:", *reversed(stack)]
    return lines


# -- the watchdog of this process ------------------------------------------------------------------------------------

_current: Watchdog | None = None


def start(
    progress_timeout_s: float,
    cleanup: Callable[[], None] = lambda: None,
    *,
    dead_after_s: float = 20.0,
    poll_s: float = 2.0,
) -> None:
    """Start this rank's watchdog over all ranks of the run; the arguments are Watchdog's. Collective: every rank
    calls."""
    global _current
    assert _current is None, "a watchdog runs already"
    whole = whole_run()
    _current = Watchdog(
        whole.store,
        whole.rank,
        whole.size,
        progress_timeout_s,
        cleanup=cleanup,
        dead_after_s=dead_after_s,
        poll_s=poll_s,
    )


def stop() -> None:
    """Stop it, if it runs: every rank calls, after the run's last collective."""
    global _current
    if _current is not None:
        _current.stop()
    _current = None


def beat(detail: str) -> None:
    """The main thread is at `detail` of its phase, such as "micro-batch 3 of 7"."""
    if _current is not None:
        _current.beat_detail(detail)


def idle() -> contextlib.AbstractContextManager[None]:
    """The main thread has nothing to do within the block until another rank calls, and may be there for ever."""
    return phase(IDLE)


def phase(name: str) -> contextlib.AbstractContextManager[None]:
    """The main thread is in this phase within the block; phases nest."""
    return contextlib.nullcontext() if _current is None else _current.phase(name)
