"""Kill -9 of a random rank at random moments, again and again: does each run end, and go on as if nothing had been?

    python benchmarks/faults.py [--kills 20] [--ranks 2] [--tp 1] [--pp 1] [--steps 12] [--save-freq 2] [--seed 0]
                                [--async some] [--aims rollout update sync save] [--policy DIR] [--work DIR]
                                [--json FILE]

First one run of the demo preset (small batch, barely warm-started policy) is left in peace. Then the same run in
another folder is started, killed and started again with the same command, until all its steps are done; and so on with
further folders until --kills were made, the last one being left to finish. Every folder that is finished is compared
with the undisturbed run: weights of hf/ by digest, metrics.jsonl by value, all but timings. --async says which attempts
save in the background; with `some` chance decides for each.

The moments are aimed: each round goes through --aims in random order, with a random rank, a random step before the
second checkpoint from the one resumed from is whole, and a random part of the usual duration of the phase as delay,
or until it ends.
Phases are seen from outside: a save by its folder `.iter_N.partial`, the others by a file per rank. The run's reward
function, which each rank imports, wraps phases.PhaseTimer to write it, so the file also says where the rank was when
it died (`fell in`; `save`: a partial folder was left behind, with the phase when it was written in the background).

    kills        ranks killed
    hangs        attempts whose launcher had not ended 60 s after the kill, or whose processes had not 10 s after that;
                 and attempts that neither ended nor came to their moment in 300 s. All their processes are killed
    clean_exits  attempts that ended with exit code 0 after the kill
    lost_steps   over all kills the most steps that had been logged and were done again, beyond those that a kill may
                 cost: --save-freq, and twice that when saving in the background, as one save may then be under way
    mismatched   finished runs that differ from the undisturbed one, checkpoint folders that are not what their manifest
                 says after a kill, attempts that did not resume from the newest checkpoint, and attempts that failed
                 though no rank had been killed
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

from common import ROOT, finish, machine

from remax_megatron.checkpoint.folders import (
    check_files,
    file_record,
    iteration_folder,
    partial_folder,
    read_state,
    saved_steps,
)
from remax_megatron.errors import UserError
from remax_megatron.metrics import read_metrics

AIMS = ("rollout", "update", "sync", "save")
HANG_S = 60.0
LEFT_OVER_S = 10.0
ATTEMPT_S = 300.0
POLL_S = 0.001
SAVES_AHEAD = 2  # a kill comes before the second checkpoint of an attempt is whole, so that half of them get on
TIMINGS = ("time/", "throughput/", "perf/", "seconds", "gb_per_s", "memory/")
WATCH = "REMAX_FAULTS_WATCH"  # environment: the folder of the ranks' marks; finds all processes of an attempt, too

REWARD = '''
"""A reward that a policy which is never right has a gradient from; in a rank also the mark of its phase."""

import os
import sys
from contextlib import contextmanager


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return sum(map(ord, solution_str)) % 7 / 6


def mark_phases(path):
    """Keep "PID STEPS-BEGUN PHASE" in `path`, written by one call and always of the same length."""
    from remax_megatron.phases import PhaseTimer

    plain, file, phases, steps = PhaseTimer.phase, os.open(path, os.O_WRONLY | os.O_CREAT), ["none"], 0

    def mark():
        os.pwrite(file, f"{os.getpid()} {steps} {phases[-1]}".ljust(64).encode(), 0)

    @contextmanager
    def phase(timer, name, queued=False):
        nonlocal steps
        steps += name == "step"
        phases.append(name)
        mark()
        try:
            with plain(timer, name, queued):
                yield
        finally:
            phases.pop()
            mark()

    PhaseTimer.phase = phase


if "remax_megatron.run" in sys.modules:  # not a worker of the reward pool
    mark_phases(os.path.join(os.environ["REMAX_FAULTS_WATCH"], os.environ["RANK"]))
'''


@dataclass(frozen=True)
class Aim:
    """The moment of a kill: `delay_s` into `phase` of `step` (or later) on `rank`, or at the end of the phase."""

    phase: str
    rank: int
    step: int
    delay_s: float


@dataclass(frozen=True)
class Mark:
    """Where a rank is: steps begun by this process, and its phase."""

    pid: int
    steps: int
    phase: str


@dataclass
class Attempt:
    """One start of a run and how it ended. Steps: `resumed` as it said itself, `logged` and `saved` afterwards."""

    run: int
    background: bool
    aim: Aim | None
    resumed: int = 0
    killed: Mark | None = None
    fell_in: str = ""
    code: int | None = None  # of the launcher; None when it had to be killed
    seconds: float = 0.0  # from the kill, or else the start, to the end of the launcher
    hung: bool = False
    logged: int = 0
    saved: int = 0
    problems: list[str] = field(default_factory=list)

    def row(self) -> str:
        aimed = f"{self.aim.phase} {self.aim.step}, rank {self.aim.rank}" if self.aim else "-"
        saving = "async" if self.background else "sync"
        ended = "HUNG" if self.hung else f"{self.code}"
        return (
            f"{self.run:>3} {self.resumed:>7}  {saving:<6} {aimed:<18} {self.fell_in or '-':<18} {ended:>4} "
            f"{self.seconds:>7.1f} {self.logged:>6} {self.saved:>5}"
        )


HEADER = "run resumed  saving aimed at           fell in            exit seconds logged saved"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12, help="of a whole run")
    parser.add_argument("--save-freq", type=int, default=2, help="steps from one checkpoint to the next")
    parser.add_argument("--async", dest="background", choices=("never", "some", "always"), default="some")
    parser.add_argument("--aims", nargs="+", choices=AIMS, default=list(AIMS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policy", metavar="DIR", help="the policy to start from; made when left out")
    parser.add_argument("--work", metavar="DIR", help="an empty or new folder for the runs, which is kept")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    details: dict[str, object] = {"machine": machine(), "config": vars(options)}
    print(f"machine: {details['machine']}\nconfig: {details['config']}", flush=True)
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        work = Path(options.work or temporary).resolve()
        work.mkdir(parents=True, exist_ok=True)
        if any(work.iterdir()):
            parser.error(f"--work {work}: is not empty; name a new folder")
        result, details["attempts"] = measure(options, work)
    finish(result, details, options.json)


def measure(options: argparse.Namespace, work: Path) -> tuple[dict[str, float], list[dict]]:
    """The whole benchmark in folder `work`: the values of its RESULT line, and the attempts."""
    from remax_megatron.demo.warm_start import ensure_policy
    from remax_megatron.demo.word_problems import ensure_data

    if options.policy is None:
        options.policy = ensure_policy(work / "policy", num_steps=20, progress=False)
    ensure_data(work / "data")
    (work / "reward.py").write_text(REWARD)
    undisturbed = attempt(options, work, 0, done=0, background=False, aim=None)
    if undisturbed.code != 0:
        raise RuntimeError(f"the undisturbed run ended with {undisturbed.code}:\n{tail(work / 'run-0')}")
    print(f"undisturbed: {options.steps} steps in {undisturbed.seconds:.1f} s\n{HEADER}", flush=True)
    expected, durations = outcome(work / "run-0"), usual_durations(work / "run-0", options.save_freq)
    draw, left, run, done = random.Random(options.seed), list[str](), 1, 0
    attempts: list[Attempt] = []
    kills = mismatched = lost = 0
    while True:
        if len(attempts) > 3 * options.kills + 10:
            raise RuntimeError(f"{len(attempts)} attempts made only {kills} kills and finished {run - 1} runs")
        left = left or draw.sample(options.aims, len(options.aims))
        background = {"never": False, "some": draw.random() < 0.5, "always": True}[options.background]
        aim = None
        if kills < options.kills and done < options.steps:
            aim = draw_aim(draw, left.pop(), background, done, durations, options)
        now = attempt(options, work, run, done, background, aim)
        before = attempts[-1] if attempts and attempts[-1].run == run else None
        attempts.append(now)
        print(now.row(), flush=True)
        kills += now.killed is not None
        if aim and now.killed is None:
            left.append(aim.phase)
        if before and (now.killed or now.code == 0):
            may_cost = options.save_freq * (2 if before.background else 1)
            lost = max(lost, before.logged - now.resumed - may_cost)
            if now.resumed != before.saved:
                now.problems.append(f"resumed after step {now.resumed}, not after {before.saved}")
        ended = now.killed is None and not now.hung
        if ended and now.code == 0 and (differing := differences(outcome(work / f"run-{run}"), expected)):
            now.problems.append(f"finished, but not as the undisturbed run: {differing}")
        if ended and now.code != 0:
            now.problems.append(f"failed by itself:\n{tail(work / f'run-{run}')}")
        for problem in now.problems:
            print(f"    MISMATCHED: {problem}", flush=True)
        mismatched += len(now.problems)
        if ended and kills >= options.kills:
            break
        run, done = (run + 1, 0) if ended else (run, now.saved)
    fell_in = Counter(a.fell_in.split()[0] for a in attempts if a.killed)
    print(f"fell in: {', '.join(f'{phase} {count}' for phase, count in fell_in.most_common())}")
    exits = [a.seconds for a in attempts if a.killed]
    print(f"finished runs: {run}; seconds from a kill to the end of the launcher: at most {max(exits, default=0):.1f}")
    result: dict[str, float] = {
        "kills": kills,
        "hangs": sum(a.hung for a in attempts),
        "clean_exits": sum(a.killed is not None and a.code == 0 for a in attempts),
        "lost_steps": lost,
        "mismatched": mismatched,
    }
    return result, [asdict(a) for a in attempts]


def draw_aim(
    draw: random.Random,
    phase: str,
    background: bool,
    done: int,
    durations: dict[str, float],
    options: argparse.Namespace,
) -> Aim:
    left = range(done + 1, options.steps + 1)
    if phase == "save":
        steps = [step for step in left if step % options.save_freq == 0 or step == options.steps][:SAVES_AHEAD]
    else:
        steps = list(left)[: SAVES_AHEAD * options.save_freq]
    step, usual_s = draw.choice(steps), durations[phase]
    if phase == "save" and background and step < options.steps:
        usual_s += durations["step"]  # it is completed after the next step
    return Aim(phase, draw.randrange(options.ranks), step, draw.uniform(0.0, 0.8) * usual_s)


# -- one attempt ------------------------------------------------------------------------------------------------------


def attempt(options: argparse.Namespace, work: Path, run: int, done: int, background: bool, aim: Aim | None) -> Attempt:
    """Start the run in `work`/run-`run`, which has `done` steps; kill at `aim`; wait for its end, or make it end."""
    folder, watch = work / f"run-{run}", work / "watch"
    watch.mkdir(exist_ok=True)
    for old in watch.iterdir():
        old.unlink()
    now = Attempt(run, background, aim)
    with open(log_of(folder), "w") as log:
        process = start(options, work, folder, watch, background, log)
        began = time.monotonic()
        try:
            now.killed = strike(process, aim, done, watch, folder / "checkpoints")
            if now.killed is not None:
                began = time.monotonic()
            now.code = process.wait(HANG_S if now.killed else ATTEMPT_S)
            now.seconds = time.monotonic() - began
            end = time.monotonic() + LEFT_OVER_S
            while processes_of(watch) and time.monotonic() < end:
                time.sleep(0.05)
            now.hung = bool(processes_of(watch))
        except (subprocess.TimeoutExpired, TimeoutError):
            now.hung, now.seconds = True, time.monotonic() - began
        finally:
            while pids := processes_of(watch):
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                time.sleep(0.05)
            process.wait()
    if now.killed is not None:
        is_saving = any((folder / "checkpoints").glob(".iter_*.partial"))
        where = now.killed.phase
        now.fell_in = where if not is_saving else "save" if where == "save" else f"save in {where}"
    found = r"^(?:Resuming after step|The run is complete:) (\d+)"
    said = re.search(found, log_of(folder).read_text(errors="replace"), re.MULTILINE)
    now.resumed = int(said[1]) if said else 0
    now.logged, now.saved = last_logged(folder / "metrics.jsonl"), check_checkpoints(folder, now.problems)
    return now


def start(
    options: argparse.Namespace, work: Path, folder: Path, watch: Path, background: bool, log: TextIO
) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", str(options.ranks), "-m", "remax_megatron"]
    megatron = "actor_rollout_ref.actor.megatron"
    overrides = [
        f"trainer.n_gpus_per_node={options.ranks}",
        f"trainer.default_local_dir={folder}",
        f"trainer.total_training_steps={options.steps}",
        f"trainer.save_freq={options.save_freq}",
        f"trainer.async_save={background}",
        "trainer.test_freq=5",
        f"data.train_files={work}/data/train.parquet",
        f"data.val_files={work}/data/test.parquet",
        "data.train_batch_size=8",
        "data.val_max_samples=16",
        f"actor_rollout_ref.model.path={Path(options.policy).resolve()}",
        f"{megatron}.tensor_model_parallel_size={options.tp}",
        f"{megatron}.pipeline_model_parallel_size={options.pp}",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=512",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        f"custom_reward_function.path={work / 'reward.py'}",
    ]
    environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(
        [*command, *overrides],
        cwd=ROOT,
        env=environment | os.environ | {WATCH: str(watch)},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def strike(process: subprocess.Popen, aim: Aim | None, done: int, watch: Path, checkpoints: Path) -> Mark | None:
    """Wait for the moment of `aim` and kill its rank; its last mark. None when the run ended before, or without an aim.

    TimeoutError when neither happens in ATTEMPT_S.
    """
    deadline = time.monotonic() + ATTEMPT_S
    while aim is not None and process.poll() is None:
        mark = read_mark(watch, aim.rank)
        if mark is not None and is_at(aim, mark, done, checkpoints):
            end = time.monotonic() + aim.delay_s
            while time.monotonic() < end and is_at(aim, read_mark(watch, aim.rank), done, checkpoints):
                time.sleep(POLL_S)
            if not is_alive(mark.pid):
                return None
            os.kill(mark.pid, signal.SIGKILL)
            return read_mark(watch, aim.rank)
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(POLL_S)
    return None


def is_at(aim: Aim, mark: Mark | None, done: int, checkpoints: Path) -> bool:
    if mark is None or done + mark.steps < aim.step:
        return False
    return partial_folder(checkpoints, aim.step).exists() if aim.phase == "save" else mark.phase == aim.phase


def read_mark(watch: Path, rank: int) -> Mark | None:
    try:
        pid, steps, phase = (watch / str(rank)).read_text().split()
    except (FileNotFoundError, ValueError):  # not there yet, or still empty
        return None
    return Mark(int(pid), int(steps), phase)


def is_alive(pid: int) -> bool:
    """False also for a process that has ended and only waits to be asked for its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def processes_of(watch: Path) -> list[int]:
    """The processes, in whatever session, that inherited the environment of an attempt."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{WATCH}={watch}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return [pid for pid in found if is_alive(pid)]


# -- what a run left ---------------------------------------------------------------------------------------------------


def log_of(folder: Path) -> Path:
    """What the last attempt printed; beside the folder of the run, which is the run's own."""
    return folder.with_suffix(".log")


def tail(folder: Path) -> str:
    return log_of(folder).read_text(errors="replace")[-3000:]


def last_logged(metrics: Path) -> int:
    """The last step in a metrics.jsonl; a half-written line does not count."""
    lines = metrics.read_bytes().split(b"\n")[:-1] if metrics.exists() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


def check_checkpoints(folder: Path, problems: list[str]) -> int:
    """The step of the newest checkpoint that is what its manifest says, 0 without one; others go to `problems`."""
    root, sound = folder / "checkpoints", [0]
    for step in saved_steps(root):
        try:
            check_files(iteration_folder(root, step))
            read_state(iteration_folder(root, step))
            sound.append(step)
        except (UserError, OSError) as error:
            problems.append(f"broken checkpoint: {error}")
    return max(sound)


def outcome(folder: Path) -> dict[str, object]:
    """What must not depend on kills: the digest of the weights, and the record of each step without its timings."""
    records = read_metrics(folder / "metrics.jsonl")
    found: dict[str, object] = {"weights": file_record(folder / "hf" / "model.safetensors")["digest"]}
    found["steps"] = [record["step"] for record in records]
    for record in records:
        for name, value in record.items():
            if not any(timing in name for timing in TIMINGS):
                found[f"{name} of step {record['step']}"] = value
    return found


def differences(found: dict[str, object], expected: dict[str, object]) -> str:
    """The first few things that differ, in words; empty when none does."""
    names = [name for name in expected | found if found.get(name) != expected.get(name)]
    some = ", ".join(f"{name} is {found.get(name)}, not {expected.get(name)}" for name in names[:4])
    return f"{len(names)} values: {some}" if names else ""


def usual_durations(folder: Path, save_freq: int) -> dict[str, float]:
    """Median seconds of the phases and of a whole step. The time of a save is in the record of the step after it."""
    steps = read_metrics(folder / "metrics.jsonl")[1:]
    durations = {
        name: statistics.median(record[f"time/{name}_s"] for record in steps)
        for name in ("rollout", "update", "sync", "step")
    }
    saves = [record["time/save_s"] for record in steps[1:] if (record["step"] - 1) % save_freq == 0]
    return durations | {"save": statistics.median(saves or [0.2])}


if __name__ == "__main__":
    main()
