"""How a run ends badly: one rank fails, all end within seconds, and everybody knows which was the first.

The first rank to fail writes its name into the rendezvous store; the others, whose collectives break a moment later,
read it. Every rank leaves with `os._exit`, because destructors of engines and process groups wait for dead peers.
torchrun ends ranks that are too busy to notice.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from remax_megatron.errors import UserError

INTERRUPTED = 128 + signal.SIGINT


@contextmanager
def ends_all_ranks(cleanup: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Around everything after torch.distributed is up. An exception prints who failed first and ends the process."""
    try:
        yield
    except BaseException as error:
        rank = int(os.environ.get("RANK", 0))
        first = _first_failure(f"rank {rank} ({type(error).__name__}: {error})"[:500])
        code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
        if not first.startswith(f"rank {rank} "):
            print(f"rank {rank} stops because {first} failed first", file=sys.stderr, flush=True)
        elif isinstance(error, UserError):
            code = 2
            print("error:", " ".join(str(error).split()), file=sys.stderr, flush=True)
        else:
            traceback.print_exc()
            print(f"first to fail: {first}", file=sys.stderr, flush=True)
            if isinstance(error, Exception):
                get_error_handler().record_exception(error)
        cleanup()
        sys.stdout.flush()
        os._exit(code)


def _first_failure(mine: str) -> str:
    """The first failure any rank reported; `mine` when nobody did before, or when the store cannot be reached."""
    if not dist.is_initialized():
        return mine
    try:
        store = dist.distributed_c10d._get_default_store()
        return store.compare_set("remax/first_failure", "", mine).decode()
    except (RuntimeError, ValueError):
        return mine
