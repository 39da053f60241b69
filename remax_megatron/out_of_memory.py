"""What a run says when memory runs out: in which phase, what lay where, and which settings would help most there.

    with explained(config, facts, device, lambda: timer.failed_in):
        ...                     # an out-of-memory error leaves as OutOfMemory, with all of that in its message

On a GPU `record_history` lets torch keep who allocated what; the error then also leaves
`default_local_dir/oom-rank-R.pickle` for https://docs.pytorch.org/memory_viz. What lay where is counted by the doctor's
ledger, beside the few totals that can be measured; so is what a setting would save.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from remax_megatron.config.rules import validate
from remax_megatron.config.schema import (
    ACTOR,
    CRITIC_MEGATRON,
    MEGATRON,
    ROLLOUT,
    Config,
    ConfigError,
    has_critic,
    recompute_of,
)
from remax_megatron.config.setting import value_of
from remax_megatron.doctor.machine import host_memory
from remax_megatron.gauges import resident_bytes
from remax_megatron.model_facts import ModelFacts
from remax_megatron.parallel.whole_run import whole_run
from remax_megatron.plan.fitting import TP, with_setting
from remax_megatron.plan.ledger import ASSUMED_CARD, BESIDE_THE_UPDATE, OF_THE_ENGINE, Ledger, gb, ledger

HOST_TEXTS = ("DefaultCPUAllocator: can't allocate memory",)  # a RuntimeError, c10/core/impl/alloc_cpu.cpp, torch 2.13
# RuntimeErrors of CUDA, NCCL and vLLM's allocator, and of cuBLAS when its workspace does not fit.
DEVICE_TEXTS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
HISTORY_ENTRIES = 50_000  # allocations and frees that are remembered, some KB of host memory each
START = "start"  # outside of all phases: building, and the first sync
UNCOUNTED = ("trainer.async_save", "reward.num_workers", f"{ROLLOUT}.max_num_seqs")  # by the ledger
# The ledger's phases that a phase of the run goes through.
COUNTED_AS = {
    "update": ("update", "optimizer"),
    "critic": ("critic", "critic's optimizer"),
    "score": ("update",),
    "rollout": ("rollout",),
    "validation": ("rollout",),
    "sync": ("sync", "canary"),
}


class OutOfMemory(RuntimeError):
    """Memory ran out; the message says where, what lay there, and what would help."""


def record_history(device: torch.device) -> None:
    """On a GPU, let torch remember the last allocations with their Python stacks, 2 us each (torch.cuda.memory)."""
    if device.type == "cuda":
        torch.cuda.memory._record_memory_history(stacks="python", max_entries=HISTORY_ENTRIES)


@contextmanager
def explained(config: Config, facts: ModelFacts, device: torch.device, phase: Callable[[], str]) -> Iterator[None]:
    """An out-of-memory error of the block becomes `OutOfMemory`; `phase` is then asked where it happened."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        kind = exhausted(error)
        if kind is None:
            raise
        where = phase() or START
        raise OutOfMemory("\n".join(_lines(config, facts, device, where, kind))) from error


def exhausted(error: BaseException) -> str | None:
    """Which memory `error`, or what it was raised from, says is exhausted: "device", "host" or None."""
    if isinstance(error, torch.OutOfMemoryError):
        return "device"
    if isinstance(error, MemoryError) or any(text in str(error) for text in HOST_TEXTS):
        return "host"
    if isinstance(error, RuntimeError) and any(text in str(error) for text in DEVICE_TEXTS):
        return "device"
    return None if error.__cause__ is None else exhausted(error.__cause__)


def advice(
    phase: str,
    config: Config,
    facts: ModelFacts,
    world_size: int,
    *,
    on_cpu: bool,
    host_only: bool = False,
    card: int = ASSUMED_CARD,
) -> list[str]:
    """The two changes that save most in `phase`, as the ledger counts it. Another layout, which is slower, comes after
    all others that save, and what the ledger does not count comes last.

    config, facts  the run's settings and the sizes of its model
    world_size     ranks
    on_cpu         the ranks compute on the CPU
    host_only      they do on GPUs, and it was the host's memory
    card           bytes of a device
    """

    def need(changed: Config) -> int:
        return _counted(phase, ledger(changed, facts, world_size, card=card, on_cpu=on_cpu))[1]

    now = 0 if host_only else need(config)
    found: list[tuple[int, str, Any]] = []
    for key, value in (
        _host_changes(config) if host_only else _changes(phase.removeprefix(OF_THE_ENGINE), config, on_cpu)
    ):
        changed = with_setting(config, key, value)
        try:
            validate(changed, world_size, facts)
        except ConfigError:
            continue
        saved = 0 if host_only else now - need(changed)
        if saved > 0 or host_only or key in UNCOUNTED:
            found.append((saved, key, value))
    best = sorted(found, key=lambda change: (change[0] == 0, change[1] == TP, -change[0]))[:2]
    said = [
        f"{key}={value} (now {value_of(config, key)})" + (f" saves {gb(saved)}" if saved else "")
        for saved, key, value in best
    ]
    return said if len(said) == 2 else [*said, "more devices (trainer.nnodes, trainer.n_gpus_per_node)"]


def _changes(phase: str, config: Config, on_cpu: bool) -> Iterator[tuple[str, Any]]:
    """(key, value) of what may help in `phase`, where the ledger sees no difference the likeliest first."""
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    megatron = actor.megatron
    if phase in ("update", "critic", "score", "step"):
        granularity = recompute_of(config).granularity
        longest = config.data.max_prompt_length + config.data.max_response_length
        if granularity != "full" and phase != "score":
            key = f"{MEGATRON}.override_transformer_config.recompute_granularity"
            yield key, "selective" if granularity == "none" else "full"
        if actor.use_dynamic_bsz and actor.ppo_max_token_len_per_gpu > longest:
            yield f"{ACTOR}.ppo_max_token_len_per_gpu", max(longest, actor.ppo_max_token_len_per_gpu // 2)
        if not actor.use_dynamic_bsz and (actor.ppo_micro_batch_size_per_gpu or 1) > 1:
            yield f"{ACTOR}.ppo_micro_batch_size_per_gpu", (actor.ppo_micro_batch_size_per_gpu or 2) // 2
        if not megatron.sequence_parallel:
            yield f"{MEGATRON}.sequence_parallel", True
        if not megatron.use_distributed_optimizer:
            yield f"{MEGATRON}.use_distributed_optimizer", True
        yield TP, 2 * megatron.tensor_model_parallel_size
    else:
        if phase == "sync" and rollout.sync_bucket_mb > 1:
            yield f"{ROLLOUT}.sync_bucket_mb", rollout.sync_bucket_mb // 2
        if phase == "save" and config.trainer.async_save:
            yield "trainer.async_save", False
        if phase == "reward" and config.reward.num_workers > 1:
            yield "reward.num_workers", config.reward.num_workers // 2
        if on_cpu:
            yield f"{ROLLOUT}.kv_cache_gib", rollout.kv_cache_gib / 2
        elif rollout.gpu_memory_utilization > 0.15:
            yield f"{ROLLOUT}.gpu_memory_utilization", round(rollout.gpu_memory_utilization - 0.1, 2)
        if rollout.max_num_seqs > 1:
            yield f"{ROLLOUT}.max_num_seqs", rollout.max_num_seqs // 2
        if not on_cpu:
            yield from ((f"{MEGATRON}.{name}", True) for name in ("optimizer_offload", "grad_offload"))
    if not on_cpu:
        yield "actor_rollout_ref.ref.megatron.param_offload", True
        if has_critic(config):
            names = ("grad_offload", "optimizer_offload", "param_offload")
            yield from ((f"{CRITIC_MEGATRON}.{name}", True) for name in names)


def _host_changes(config: Config) -> Iterator[tuple[str, Any]]:
    """What lies in the memory of a host whose ranks compute on GPUs."""
    if config.trainer.async_save:
        yield "trainer.async_save", False
    if config.actor_rollout_ref.actor.megatron.optimizer_offload:
        yield f"{MEGATRON}.optimizer_offload", False
    if config.reward.num_workers > 1:
        yield "reward.num_workers", config.reward.num_workers // 2


def _counted(phase: str, made: Ledger) -> tuple[str, int]:
    """The ledger's phase that needs most of those that `phase` goes through, and its bytes."""
    plain = phase.removeprefix(OF_THE_ENGINE)
    of = phase.removesuffix(plain)
    name = max((of + counted for counted in COUNTED_AS.get(plain, BESIDE_THE_UPDATE)), key=made.peak)
    return name, made.peak(name)


def _lines(config: Config, facts: ModelFacts, device: torch.device, phase: str, kind: str) -> Iterator[str]:
    """The message, most important first: other ranks print only its beginning."""
    on_cpu, world_size = device.type == "cpu", whole_run().size
    phase = OF_THE_ENGINE + phase if whole_run().is_engine_only else phase
    card = ASSUMED_CARD if on_cpu else torch.cuda.mem_get_info(device)[1]
    host_only = kind == "host" and not on_cpu
    yield f"{'host' if on_cpu or host_only else 'GPU'} memory ran out in phase {phase}. What would help most there:"
    for change in advice(phase, config, facts, world_size, on_cpu=on_cpu, host_only=host_only, card=card):
        yield f"  {change}"
    if not host_only:
        made = ledger(config, facts, world_size, card=card, on_cpu=on_cpu)
        name, need = _counted(phase, made)
        terms = " + ".join(f"{term} {gb(size)}" for term, size in made.phases[name].items())
        yield f"counted for a rank of pipeline stage {made.stage} ({name}): {terms} = {gb(need)}"
    yield f"measured: {_measured(device)}"
    if not on_cpu:
        yield _snapshot(Path(config.trainer.default_local_dir) / f"oom-rank-{whole_run().rank}.pickle")


def _measured(device: torch.device) -> str:
    total, available = host_memory()
    host = f"this process {gb(resident_bytes('self'))} of host memory, {gb(available)} of {gb(total)} available"
    if device.type == "cpu":
        return host
    free, all_of_it = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    return (
        f"torch allocated {gb(allocated)} and reserved {gb(reserved)} (a sleeping engine's included), all processes "
        f"{gb(all_of_it - free)} of {gb(all_of_it)}; {host}"
    )


def _snapshot(path: Path) -> str:
    """Write who allocated what; returns the line that says where."""
    try:
        os.makedirs(path.parent, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
    except (OSError, RuntimeError) as error:
        return f"no memory snapshot: {error}"
    return f"memory snapshot: {path}, to be opened in https://docs.pytorch.org/memory_viz"
