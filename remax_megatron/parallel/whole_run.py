"""All ranks of a run, where the default process group has a part of them: in a split run (`trainer.placement`) each
side has a default group of its own, since Megatron and vLLM both take that group for all the ranks there are.

The policy's ranks come first, the engine's last. What concerns the run as a whole, its failures and its heartbeats,
goes through the store that all ranks share. Elsewhere "the world" are the ranks of the default group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class WholeRun:
    """This rank's number among the `size` ranks of the run, of which the last `num_engine_ranks` hold the engine and
    nothing else (0: every rank holds both), and the `store` that all of them share."""

    rank: int
    size: int
    num_engine_ranks: int
    store: dist.Store

    @property
    def num_policy_ranks(self) -> int:
        """Count the ranks that train."""
        return self.size - self.num_engine_ranks

    @property
    def is_engine_only(self) -> bool:
        """Whether this rank answers and does not train."""
        return self.rank >= self.num_policy_ranks


def wait_for_all() -> None:
    """Return when every rank of the run has called; at its end, and once."""
    whole = whole_run()
    if not whole.num_engine_ranks:
        dist.barrier()
        return
    if whole.store.add("remax/done", 1) == whole.size:
        whole.store.set("remax/all-done", "")
    whole.store.wait(["remax/all-done"])


_joined: WholeRun | None = None


def join(whole: WholeRun) -> None:
    """Note what this process has become a part of; once, before the default process group exists."""
    global _joined
    _joined = whole


def whole_run() -> WholeRun:
    """The run that this process has joined; the default process group alone where nothing else was noted."""
    if _joined is not None:
        return _joined
    return WholeRun(dist.get_rank(), dist.get_world_size(), 0, dist.distributed_c10d._get_default_store())
