"""Micro-batches by a peer's own packing function, in a process of its own; benchmarks/schedule.py starts it.

    python schedule_peer.py {verl,trl} DIR < request.json > answer.json

DIR holds the packages of requirements-schedule.txt. Request: {"lengths": [...], "dp": D, "budget": tokens, "repeats"}.
Answer: {"schedule": [rank][micro-batch][row], "seconds": CPU seconds, median} or {"error": text}, exit code 0.

  verl 0.9.1   seqlen_balancing.get_seqlen_balanced_partitions, as its trainer calls it: once over the ranks with
               equal sizes, by workload; then on each rank, with the count that all agree on, raised until no
               micro-batch is over the budget (rearrange_micro_batches), cheapest at both ends. Time: the split over
               ranks and the slowest rank, as ranks work side by side. `import verl` needs ray, tensordict and more
               that these functions do not use, so the one file is loaded with empty modules in their place.
  trl 1.16.0   data_utils._pack_bfd (best-fit decreasing) on a table of tokens; it copies the tokens too. Its bins go
               to ranks in turn, as a distributed sampler would deal them.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
import time
import types
from pathlib import Path

Schedule = list[list[list[int]]]
SLOW_S = 2.0  # not repeated beyond


def verl_module(folder: Path) -> types.ModuleType:
    for name, attributes in {
        "verl": {},
        "verl.protocol": {"DataProto": None},
        "verl.utils": {"tensordict_utils": None},
        "verl.utils.device": {"get_device_name": None},
    }.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(attributes)
    spec = importlib.util.spec_from_file_location("seqlen_balancing", folder / "verl/utils/seqlen_balancing.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def verl(module: types.ModuleType, lengths: list[int], dp: int, budget: int) -> tuple[Schedule, float]:
    import torch

    started = time.process_time()
    work = module.calculate_workload(torch.tensor(lengths)).tolist()
    shards = module.get_seqlen_balanced_partitions(work, dp, equal_size=True)
    shared_s = time.process_time() - started
    seconds, count = [0.0] * dp, max(-(-sum(lengths[row] for row in shard) // budget) for shard in shards)
    while True:
        schedule: Schedule = []
        for rank, shard in enumerate(shards):
            started = time.process_time()
            parts = module.get_seqlen_balanced_partitions([work[row] for row in shard], count, equal_size=False)
            parts = [[shard[i] for i in part] for part in parts]
            parts.sort(key=lambda part: sum(work[row] for row in part), reverse=True)
            schedule.append(parts[::2][::-1] + parts[1::2])
            seconds[rank] += time.process_time() - started
        if all(sum(lengths[row] for row in part) <= budget for parts in schedule for part in parts):
            return schedule, shared_s + max(seconds)
        count += 1


def trl(module: types.ModuleType, lengths: list[int], dp: int, budget: int) -> tuple[Schedule, float]:
    import numpy as np
    import pyarrow as pa

    offsets = np.cumsum([0, *lengths])
    rows = pa.array(np.repeat(np.arange(len(lengths), dtype=np.int32), lengths))  # each token names its row
    table = pa.table({"input_ids": pa.LargeListArray.from_arrays(pa.array(offsets), rows)})
    started = time.process_time()
    packed = module._pack_bfd(table, budget)
    seconds = time.process_time() - started
    bins = [np.unique(tokens.values.to_numpy()).tolist() for tokens in packed["input_ids"]]
    bins += [[] for _ in range(-len(bins) % dp)]
    return [bins[rank::dp] for rank in range(dp)], seconds


def main() -> None:
    peer, folder = sys.argv[1], Path(sys.argv[2])
    request = json.load(sys.stdin)
    try:
        if peer == "verl":
            module, run = verl_module(folder), verl
        else:
            sys.path.insert(0, str(folder))
            import trl.data_utils as module

            run = globals()["trl"]
        times: list[float] = []
        while len(times) < request["repeats"] and sum(times) <= SLOW_S:
            schedule, seconds = run(module, request["lengths"], request["dp"], request["budget"])
            times.append(seconds)
        answer = {"schedule": schedule, "seconds": statistics.median(times)}
    except (ImportError, OSError, AssertionError, AttributeError, ValueError) as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
