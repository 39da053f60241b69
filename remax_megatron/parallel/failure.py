"""How a run ends badly: one rank fails, all end within seconds, and everybody knows which was the first.

The first rank to fail writes its name into the rendezvous store; the others read it there: in their watchdog
(watchdog.py) while they are busy, or here, when their own collectives break a moment later. Every rank leaves with
`os._exit`, because destructors of engines and process groups wait for dead peers.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from remax_megatron.errors import UserError
from remax_megatron.parallel.whole_run import whole_run

INTERRUPTED = 128 + signal.SIGINT
# Keys in the rendezvous store. It outlives the ranks when torchrun starts them anew.
KEYS = f"remax/attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
FIRST_FAILURE = f"{KEYS}/first_failure"
LINGER_S = 3.0  # a failed rank stays this long: when it leaves, its launcher ends the others, and maybe the store
CLEANUP_S = 5.0  # what cleaning up, or a store behind a broken link, may take
# What gloo (torch 2.11, 2.13) and NCCL say when a peer's process has ended.
_PEER_IS_GONE = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
_ending = threading.Lock()


@contextmanager
def ends_all_ranks(cleanup: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Around everything after torch.distributed is up. An exception prints who failed first and ends the process."""
    try:
        yield
    except BaseException as error:
        began = time.monotonic()
        code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
        try:
            if not claims_ending():
                time.sleep(60)  # the watchdog is about to end this process
            rank = int(os.environ.get("RANK", 0))
            first = _first_failure(f"rank {rank} ({type(error).__name__}: {error})"[:500])
            if not first.startswith(f"rank {rank} "):
                print(f"rank {rank} stops because {first} failed first", file=sys.stderr, flush=True)
            elif isinstance(error, UserError):
                code = 2
                print(error.lines(), file=sys.stderr, flush=True)
            else:
                traceback.print_exc()
                print(f"first to fail: {first}", file=sys.stderr, flush=True)
                # torchrun takes the first record for the root cause; a rank that was killed leaves none, and the ranks
                # that lose it must not be quicker.
                if isinstance(error, Exception) and not any(words in str(error) for words in _PEER_IS_GONE):
                    get_error_handler().record_exception(error)
            within(CLEANUP_S, cleanup)
            sys.stdout.flush()
            if dist.is_initialized() and whole_run().size > 1 and code != INTERRUPTED:
                time.sleep(max(0.0, began + LINGER_S - time.monotonic()))
        finally:
            os._exit(code)


def claims_ending() -> bool:
    """True for the first caller in this process: that thread prints why it ends and ends it, no other does."""
    return _ending.acquire(blocking=False)


def within(seconds: float, function: Callable[[], object]) -> bool:
    """Call `function` in a thread of its own and wait for it no longer than `seconds`; False when it is not done."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def write_first_failure(store: dist.Store, mine: str) -> str:
    """The first failure any rank reported, which is `mine` when nobody did before."""
    return store.compare_set(FIRST_FAILURE, "", mine).decode()


def _first_failure(mine: str) -> str:
    """As `write_first_failure`; `mine` as well when the store cannot be reached."""
    if not dist.is_initialized():
        return mine
    said: list[str] = []

    def ask() -> None:
        try:
            said.append(write_first_failure(whole_run().store, mine))
        except (RuntimeError, ValueError):  # the store's host is gone; the group is
            said.append(mine)

    within(CLEANUP_S, ask)
    return said[0] if said else mine
