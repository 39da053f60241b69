"""The ranks of one run: torch.distributed, Megatron's groups, and where this rank stands in them."""

from __future__ import annotations

import datetime
import math
import os
import socket
from dataclasses import dataclass

import torch
import torch.distributed as dist

from remax_megatron.parallel import cpu_platform
from remax_megatron.parallel.whole_run import WholeRun, join


@dataclass(frozen=True)
class Layout:
    """Sizes and this rank's coordinates. `vpp` is the number of model chunks per pipeline rank (1: none)."""

    rank: int
    world_size: int
    device: torch.device
    tp: int
    pp: int
    vpp: int
    dp: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank's stage computes the head."""
        return self.pp_rank == self.pp - 1

    @property
    def reports_for_replica(self) -> bool:
        """True on the one rank per data-parallel replica whose last-stage results are counted."""
        return self.is_last_stage and self.tp_rank == 0


def init_distributed(device: str, timeout_s: int, num_engine_ranks: int = 0) -> torch.device:
    """Join torchrun's ranks. Every rank calls; returns this rank's device.

    The default process group (gloo on CPU, NCCL on GPUs) is of all ranks, or, where the last `num_engine_ranks` hold
    the engine alone, of those of this rank's side.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        local = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(local)
    else:
        local = torch.device("cpu")
        cpu_platform.prepare()
    if "RANK" not in os.environ:
        os.environ |= _alone()
    backend, timeout = "nccl" if device == "cuda" else "gloo", datetime.timedelta(seconds=timeout_s)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if num_engine_ranks:
        _join_side(backend, rank, world_size, num_engine_ranks, timeout)
    else:
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout)
    return local


def _join_side(backend: str, rank: int, world_size: int, num_engine_ranks: int, timeout: datetime.timedelta) -> None:
    """Make the default process group of this rank's side. The arguments are those of the whole run."""
    store, *_ = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    whole = WholeRun(rank, world_size, num_engine_ranks, store)
    join(whole)
    side = "engine" if whole.is_engine_only else "policy"
    first, size = (whole.num_policy_ranks, num_engine_ranks) if side == "engine" else (0, whole.num_policy_ranks)
    dist.init_process_group(
        backend, store=dist.PrefixStore(side, store), rank=rank - first, world_size=size, timeout=timeout
    )


def _alone() -> dict[str, str]:
    """What torchrun would set for a single rank; vLLM reads it too."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    one_rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return one_rank | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def init_model_parallel(
    device: torch.device, *, tp: int, pp: int, vpp: int | None, seed: int, timeout_s: int = 1800
) -> Layout:
    """Create Megatron's groups (every rank calls, same arguments) and seed its RNG tracker.

    device     of this rank
    tp, pp     tensor- and pipeline-parallel sizes; their product divides the ranks
    vpp        model chunks per pipeline rank, None: one
    seed       of the tracker
    timeout_s  seconds that a collective may take, rounded up to minutes
    """
    from megatron.core import parallel_state as mpu
    from megatron.core import tensor_parallel

    mpu.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=math.ceil(timeout_s / 60),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return Layout(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=device,
        tp=tp,
        pp=pp,
        vpp=vpp or 1,
        dp=mpu.get_data_parallel_world_size(),
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        pp_rank=mpu.get_pipeline_model_parallel_rank(),
        dp_rank=mpu.get_data_parallel_rank(),
        tp_group=mpu.get_tensor_model_parallel_group(),
        pp_group=mpu.get_pipeline_model_parallel_group(),
        dp_group=mpu.get_data_parallel_group(),
    )
