"""Between the ranks: who is there, whether collectives connect them, whether all nodes see one folder.

Ranks talk through the launcher's store, which works where their collectives do not. Rank 0 collects and prints.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import astuple
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from remax_megatron.doctor.findings import OK, PROBLEM, WARNING, Finding, said, show, some
from remax_megatron.doctor.machine import Run, existing_parent

if TYPE_CHECKING:
    from torch.distributed import Store

WAIT_S = COLLECTIVE_WAIT_S = 60.0  # for a rank to show up; for a collective
FILE_WAIT_S = 5.0  # for a file of another node; network file systems show new files late
MESSAGE_BYTES = 16 * 2**20  # what each rank sends in the timed all_gather; less from 64 ranks on, to hold 1 GiB
SLOW_NCCL = 1e9  # bytes/s; plain sockets instead of InfiniBand or NVLink are below
FIX = (
    "look whether all nodes run and are let through (firewall, /etc/hosts: gloo announces the address of its name);"
    " with several networks set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the one between the nodes (`ip -br addr`)"
)


def meet(run: Run, findings: list[Finding], headline: str) -> NoReturn:
    """Check what is between the ranks, print what all found on rank 0, exit. Every rank calls."""
    import torch.distributed as dist

    rank = int(os.environ.get("RANK", "0"))
    endpoint = f"MASTER_ADDR:MASTER_PORT={os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    code = 1
    try:
        code = _talk(_open_store(rank, run.world_size), run, rank, findings, headline, endpoint)
    except (dist.DistError, KeyError, ValueError) as error:  # the last two: no MASTER_ADDR, no port
        fact = f"rank {rank} on {_host()} cannot reach {endpoint}, or lost it ({said(error)})"
        show({"": [*findings, Finding("reachability", PROBLEM, fact, FIX)]}, headline)
    os._exit(code)  # a process group with a lost peer does not end by itself


def _talk(store: Store, run: Run, rank: int, findings: list[Finding], headline: str, endpoint: str) -> int:
    """Exchange the `findings` of `run` through `store`, which is at `endpoint`, and show them under `headline`; returns
    the exit code. Keys: host/RANK, then rank 0's `plan`, findings/RANK, rank 0's `code`, left/RANK."""
    import torch.distributed as dist

    store.set(f"host/{rank}", _host())
    with ExitStack() as stack:
        if rank == 0:
            until = time.monotonic() + WAIT_S
            names = [_get(store, f"host/{peer}", until) for peer in range(run.world_size)]
            file = ""
            with suppress(OSError):  # the check of the disk has found it
                folder = existing_parent(run.config)
                file = stack.enter_context(tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-")).name
            store.set("plan", json.dumps([names, Path(file).name]))
        names, file = json.loads(store.get("plan"))
        hosts = list(dict.fromkeys(filter(None, names)))
        missing = [f"rank {peer}" for peer, name in enumerate(names) if not name]
        if missing:
            fact = f"{some(missing)} did not show up at {endpoint} within {WAIT_S:.0f} s; here are {some(hosts)}"
            findings.append(Finding("reachability", PROBLEM, fact, FIX))
        else:
            findings.append(collectives(run, store, rank, hosts))
        if rank and file and os.environ.get("LOCAL_RANK", "0") == "0":
            findings.append(same_folder(run, file))
        store.set(f"findings/{rank}", json.dumps([astuple(finding) for finding in findings]))
        if rank == 0:
            reports, until = {}, time.monotonic() + 2 * WAIT_S
            lost = json.dumps([("reachability", PROBLEM, "came, then stopped answering", "look at its log")])
            for peer, name in enumerate(names):
                if name:
                    found = json.loads(_get(store, f"findings/{peer}", until) or lost)
                    reports[f"rank {peer} on {name.split()[0]}"] = [Finding(*fields) for fields in found]
            store.set("code", str(show(reports, headline)))
    code = int(store.get("code"))  # none leaves before rank 0 has printed: a launcher ends all with the first failure
    store.set(f"left/{rank}", "yes")
    if rank == 0:  # the store may live here
        with suppress(dist.DistStoreError):
            store.wait([f"left/{peer}" for peer, name in enumerate(names) if name], timedelta(seconds=5))
    return code


def collectives(run: Run, store: Store, rank: int, hosts: list[str]) -> Finding:
    """A timed all_gather as the trainer's ranks do it. Every rank calls."""
    import torch

    backend = "nccl" if not run.on_cpu and torch.cuda.is_available() else "gloo"
    began = time.monotonic()
    threads = ThreadPoolExecutor(1)  # a hanging NCCL cannot be interrupted; the process leaves with os._exit
    try:  # gloo gives up by itself at COLLECTIVE_WAIT_S
        rate = threads.submit(_all_gather, store, rank, run.world_size, backend).result(1.5 * COLLECTIVE_WAIT_S)
    except (RuntimeError, TimeoutError) as error:
        after = f"{said(error)}, after {time.monotonic() - began:.0f} s"
        return Finding("reachability", PROBLEM, f"the ranks met, but {backend} does not connect them: {after}", FIX)
    fact = f"{backend} connects {run.world_size} ranks on {some(hosts)}: {rate / 1e9:.2f} GB/s each"
    fix = "NCCL_DEBUG=INFO shows the transport; set NCCL_SOCKET_IFNAME / NCCL_IB_HCA to the fast network"
    return Finding("reachability", WARNING if backend == "nccl" and rate < SLOW_NCCL else OK, fact, fix)


def _all_gather(store: Store, rank: int, world_size: int, backend: str) -> float:
    """Bytes/s that a rank receives, after a warm-up. RuntimeError when the ranks do not connect."""
    import torch
    import torch.distributed as dist

    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    # gloo raises at its timeout; NCCL's watchdog would abort the process, so its is longer than anybody waits here.
    timeout = timedelta(seconds=COLLECTIVE_WAIT_S * (1 if backend == "gloo" else 10))
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    mine = torch.full((min(MESSAGE_BYTES, 2**30 // world_size),), rank % 128, dtype=torch.uint8, device=device)
    theirs = [torch.empty_like(mine) for _ in range(world_size)]
    for _ in range(2):  # the first opens connections
        dist.barrier()
        start = time.perf_counter()
        dist.all_gather(theirs, mine)
        last = [int(got[-1]) for got in theirs]  # waits for the device
        seconds = time.perf_counter() - start
    if last != [peer % 128 for peer in range(world_size)]:
        raise RuntimeError(f"an all_gather of the rank numbers brings {last}")
    dist.barrier()
    return mine.numel() * (world_size - 1) / seconds


def same_folder(run: Run, name: str) -> Finding:
    """Whether the file that rank 0 wrote beside its run folder is seen from here."""
    folder, until = existing_parent(run.config), time.monotonic() + FILE_WAIT_S
    while name not in os.listdir(folder):  # listing makes NFS look again
        if time.monotonic() > until:
            level = PROBLEM if run.config.trainer.save_freq > 0 else WARNING  # checkpoints would be torn apart
            fix = "set trainer.default_local_dir to a folder on a file system that all nodes share"
            return Finding("shared folder", level, f"{folder} is not the folder that rank 0 writes to", fix)
        time.sleep(0.1)
    return Finding("shared folder", OK, f"all nodes see {folder}")


def _open_store(rank: int, world_size: int) -> Store:
    """The launcher's store, or one that rank 0 opens where the launcher has none; keys of this start alone."""
    import torch.distributed as dist

    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size,
        is_master=rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        timeout=timedelta(seconds=WAIT_S),
        wait_for_workers=False,
    )
    store.set_timeout(timedelta(seconds=4 * WAIT_S))  # of a `get`: rank 0 waits for others meanwhile
    return dist.PrefixStore(f"doctor/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _get(store: Store, key: str, until: float) -> str:
    """The value of `key`; empty when it is not there at the monotonic time `until`."""
    import torch.distributed as dist

    with suppress(dist.DistStoreError):
        store.wait([key], timedelta(seconds=max(until - time.monotonic(), 0.01)))
        return store.get(key).decode()
    return ""


def _host() -> str:
    """This host and the address of its name, which is what gloo announces."""
    name = socket.gethostname()
    with suppress(OSError):
        return f"{name} ({socket.gethostbyname(name)})"
    return f"{name} (name does not resolve)"
