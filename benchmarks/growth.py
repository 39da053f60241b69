"""Does a run grow? Memory, file descriptors and threads of every rank over the steps of one long run.

    python benchmarks/growth.py [--steps 200] [--async-save] [--model FOLDER] [--json FILE] [key=value ...]

The demo preset on two ranks under torchrun, with batches of 8 prompts: rollouts, rewards, updates, weight syncs, a
checkpoint every 10 steps and a validation every 50. The rewards are a checksum of the answer, 0 or 1, so that half of
all answers have a gradient and the length of answers has no reason to drift; a learning rate of 1e-6 keeps the work
of step 200 that of step 20. `key=value` are further settings of the run. Without --model the demo's policy is made by
20 steps of warm start.

Read from the outside, in /proc, when metrics.jsonl shows the steps 20, 50, 100, 150 and 200: READINGS times within
two seconds, and of these the median for memory (buffers come and go within a step), the least for descriptors and
threads (a checkpoint's files and its thread come and go as well; a leak raises the least). Pss counts what processes
share once; it moves when they share less, so Rss is the one that is judged.

    rss_growth     Rss after the last step over that after step 20, less 1; of the rank where it is largest
    fd_growth      descriptors more than after step 20, likewise
    thread_growth  threads more than after step 20, likewise
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from common import ROOT, finish, machine

from remax_megatron.demo.warm_start import ensure_policy
from remax_megatron.demo.word_problems import ensure_data
from remax_megatron.gauges import descendants, num_open_files, num_threads
from remax_megatron.metrics import read_metrics

RANKS = 2
FIRST, TAIL = 20, 20  # the step that is compared with; steps after the last reading, so that it is one of a running run
READINGS, WINDOW_S = 20, 2.0
REWARD = """import zlib


def compute_score(data_source, solution_str, ground_truth, extra_info):
    return float(zlib.crc32(f"{ground_truth} {solution_str}".encode()) % 2)
"""


@dataclass
class Reading:
    """One rank: MiB of memory, numbers of descriptors and threads."""

    rss: float
    pss: float
    anonymous: float
    files: int
    threads: int


def read_rank(pid: int) -> Reading:
    kib = dict(re.findall(r"^(\w+): +(\d+) kB$", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE))
    rss, pss, anonymous = (int(kib[name]) / 1024 for name in ("Rss", "Pss", "Anonymous"))
    return Reading(rss, pss, anonymous, num_open_files(pid), num_threads(pid))


def read_ranks(pids: list[int]) -> list[Reading]:
    """One reading per rank, from several within a window."""
    readings = []
    for _ in range(READINGS):
        readings.append([read_rank(pid) for pid in pids])
        time.sleep(WINDOW_S / READINGS)
    result = []
    for rank in zip(*readings, strict=True):
        memory = [statistics.median(getattr(r, name) for r in rank) for name in ("rss", "pss", "anonymous")]
        result.append(Reading(*memory, min(r.files for r in rank), min(r.threads for r in rank)))
    return result


def find_ranks(launcher: int) -> list[int]:
    """Process numbers of the ranks, rank 0 first."""
    ranks = {}
    for pid in map(int, Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()):
        if found := re.search(rb"(?:^|\0)RANK=(\d+)\0", Path(f"/proc/{pid}/environ").read_bytes()):
            ranks[int(found[1])] = pid
    assert sorted(ranks) == list(range(RANKS)), f"ranks {sorted(ranks)} of {RANKS}"
    return [ranks[rank] for rank in range(RANKS)]


def command(model: str, work: Path, steps: int, async_save: bool, settings: list[str]) -> list[str]:
    (work / "reward.py").write_text(REWARD)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    return [
        *launcher,
        *("--nproc-per-node", str(RANKS), "-m", "remax_megatron"),
        f"actor_rollout_ref.model.path={model}",
        "actor_rollout_ref.actor.optim.lr=1e-6",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=512",
        f"data.train_files={work}/data/train.parquet",
        f"data.val_files={work}/data/test.parquet",
        "data.train_batch_size=8",
        "data.val_max_samples=32",
        f"custom_reward_function.path={work}/reward.py",
        f"trainer.total_training_steps={steps + TAIL}",
        "trainer.total_epochs=100",
        "trainer.test_freq=50",
        "trainer.save_freq=10",
        f"trainer.async_save={async_save}",
        f"trainer.default_local_dir={work}/run",
        *settings,
    ]


def last_step(metrics: Path) -> int:
    lines = metrics.read_bytes().rpartition(b"\n")[0].splitlines() if metrics.exists() else []
    found = re.match(rb'\{"step": (\d+),', lines[-1]) if lines else None
    return int(found[1]) if found else -1


def watch(run: list[str], metrics: Path, steps: list[int], log: Path) -> dict[int, list[Reading]]:
    """Start the run and read its ranks at `steps`. RuntimeError with its output when it fails."""
    readings: dict[int, list[Reading]] = {}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            run, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        for step in steps:
            while process.poll() is None and last_step(metrics) < step:
                time.sleep(0.01)
            if process.poll() is not None:
                break
            try:
                pids = find_ranks(process.pid)
                readings[step] = read_ranks(pids)
            except (FileNotFoundError, ProcessLookupError):  # a rank has ended; the output says why
                break
            children = [len(descendants(pid)) for pid in pids]
            for rank, reading in enumerate(readings[step]):
                print_row(step, rank, reading, children[rank])
        code = process.wait(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code != 0 or len(readings) < len(steps):
        raise RuntimeError(f"exit code {code}: {' '.join(run)}\n{log.read_text()[-4000:]}")
    return readings


def print_row(step: int, rank: int, r: Reading, children: int) -> None:
    sizes = f"{r.rss:10.1f}{r.pss:10.1f}{r.anonymous:11.1f}"
    print(f"{step:5}{rank:6}{sizes}{r.files:13}{r.threads:9}{children:10}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="the last step that is read")
    parser.add_argument("--async-save", action="store_true", help="checkpoints are written beside the training")
    parser.add_argument("--model", metavar="FOLDER", help="the policy; default: the demo's, barely warm-started")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    options = parser.parse_args()
    if options.steps <= FIRST:
        parser.error(f"--steps {options.steps} must be more than {FIRST}")
    details: dict[str, object] = {"machine": machine(), "config": vars(options)}
    print(f"machine: {details['machine']}\nconfig: {details['config']}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        model = options.model or str(ensure_policy(work / "policy", num_steps=20, progress=False))
        ensure_data(work / "data")
        run = command(model, work, options.steps, options.async_save, options.settings)
        steps = [FIRST, *range(50, options.steps, 50), options.steps]
        print(" step  rank   Rss MiB   Pss MiB  Anon. MiB  descriptors  threads  children")
        readings = watch(run, work / "run/metrics.jsonl", steps, work / "log")
        records = [record for record in read_metrics(work / "run/metrics.jsonl") if record["step"] > 0]
    seconds = statistics.median(record["time/step_s"] for record in records)
    trained = sum(record["actor/grad_norm"] > 0 for record in records)
    tokens = [statistics.mean(r["response/mean_tokens"] for r in part) for part in (records[:40], records[-40:])]
    print(
        f"{len(records)} steps of {seconds:.2f} s (median), {trained} of them with a gradient; tokens per answer "
        f"{tokens[0]:.1f} in the first 40 steps, {tokens[1]:.1f} in the last 40"
    )
    pairs = list(zip(readings[FIRST], readings[options.steps], strict=True))
    details["readings"] = {step: [asdict(reading) for reading in ranks] for step, ranks in readings.items()}
    result = {
        "rss_growth": max(last.rss / first.rss - 1 for first, last in pairs),
        "fd_growth": max(last.files - first.files for first, last in pairs),
        "thread_growth": max(last.threads - first.threads for first, last in pairs),
    }
    finish(result, details, options.json)


if __name__ == "__main__":
    main()
