"""The batch scripts of slurm/ on a real Slurm: two nodes on this machine, with 8 GPUs each that are none.

Slurm is started by the tools in ../shared where they are, else the tests that need it are skipped. What job.sh does
with exit codes and signals is shown with a stand-in for Python, which takes no time; three jobs train the demo's model.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from remax_megatron.config.load import load_config
from remax_megatron.metrics import read_metrics
from tests import ROOT

TOOLS = ROOT.parent / "shared" / "tools" / "slurm"
SIZES = ("3b", "7b", "14b", "32b", "32b_split")
SCRIPTS = {size: ROOT / "slurm" / f"remax_{size}.sh" for size in SIZES}
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
STEPS = 24
SMALL = ("--gpus-per-node=1", "--cpus-per-task=2", "--mem=1G")

# Stands in for Python: settings are right, and the run is a script of the test.
STAND_IN = """#!/bin/bash
[ "$2" = remax_megatron.config.cli ] && exit 0
for argument; do case $argument in trainer.stop_file=*) stop_file=${argument#*=} ;; esac; done
stop_file=${stop_file//\\'/}
"""
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return len(solution_str) % 7 / 7
"""
FAILING_REWARD = """
import os
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    if os.environ["RANK"] == "1":
        raise ValueError("no reward from here")
    return 0.0
"""


# -- Slurm ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slurm:
    """A running Slurm: `environment` is what its clients need."""

    environment: dict[str, str]

    def call(self, *command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
        """Standard output and error of a client that succeeds."""
        done = subprocess.run(
            list(map(str, command)),
            cwd=cwd,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}"
        return done.stdout

    def submit(self, script: Path, folder: Path, arguments: Sequence[str], *options: str, **environment: str) -> Job:
        """`sbatch OPTIONS script ARGUMENTS` in `folder`, with this Python and repository unless told otherwise."""
        defaults = {"REMAX_HOME": str(ROOT), "REMAX_PYTHON": sys.executable}
        sbatch = ("sbatch", "--parsable", *options, script, *arguments)
        return Job(int(self.call(*sbatch, cwd=folder, **(defaults | environment))), folder, self)


@dataclass(frozen=True)
class Job:
    id: int
    folder: Path
    slurm: Slurm

    def show(self) -> dict[str, str]:
        """JobState, ExitCode, Restarts, ... as Slurm has them."""
        return dict(re.findall(r"(\w+)=(\S*)", self.slurm.call("scontrol", "-o", "show", "job", str(self.id))))

    def log(self) -> str:
        """Everything that the job wrote, over its restarts."""
        return "".join(path.read_text() for path in self.folder.glob(f"*-{self.id}.log"))

    def wait_for(self, what: str, reached: Callable[[], bool], timeout_s: float) -> None:
        """Until `reached()`; it fails when the job ends before, or after `timeout_s`."""
        end = time.monotonic() + timeout_s
        while True:
            job = self.show()
            if reached():
                return
            over = job["JobState"] in OVER
            assert not over and time.monotonic() < end, f"job {self.id}: no {what}: {job}\n{self.log()}"
            time.sleep(0.1)

    def ended(self, timeout_s: float = 200) -> dict[str, str]:
        """What `show` says at the end of the job."""
        self.wait_for("end", lambda: self.show()["JobState"] in OVER, timeout_s)
        return self.show()


def free_ports(number: int) -> int:
    """The first of `number` ports in a row that nobody listens on."""
    for first in range(16817, 20000, number):
        with contextlib.ExitStack() as probes:
            try:
                for port in range(first, first + number):
                    probes.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise AssertionError("no free ports")


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    """Slurm with nodes node1 and node2, partitions main and (preempting the other) urgent; ended after the module."""
    if not (TOOLS / "start_slurm.sh").is_file():
        pytest.skip(f"no Slurm: {TOOLS} is not there")
    if os.geteuid() != 0:
        pytest.skip("no Slurm: its daemons need root here")
    folder = tempfile.mkdtemp(prefix="slurm-")  # a short path: munge's socket lies in it
    ours = os.environ | {"SLURM_TEST_DIR": folder, "SLURM_TEST_PORT": str(free_ports(3))}
    try:
        try:
            start = [str(TOOLS / "start_slurm.sh"), "--env"]
            started = subprocess.run(start, env=ours, capture_output=True, text=True, timeout=240)
        except subprocess.TimeoutExpired:
            pytest.skip("no Slurm: it did not start in 240 s")
        if started.returncode != 0:
            pytest.skip(f"no Slurm: {started.stderr.strip().splitlines()[-1:]}")
        environment = {k: v for k, v in ours.items() if not k.startswith(("SLURM_", "SBATCH_", "REMAX_"))}
        yield Slurm(environment | {"SLURM_CONF": started.stdout.strip().removeprefix("export SLURM_CONF=")})
    finally:
        subprocess.run([str(TOOLS / "stop_slurm.sh"), "--purge"], env=ours, stdout=subprocess.DEVNULL, timeout=120)


# -- the scripts as they are ------------------------------------------------------------------------------------------


def test_scripts_are_sound_bash():
    files = sorted((ROOT / "slurm").glob("*.sh"))
    assert len(files) == len(SIZES) + 2
    for file in files:
        subprocess.run(["bash", "-n", file], check=True, timeout=30)
    assert (ROOT / "slurm" / "job.sh").read_text().count("\n    srun ") == 1
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-x", *files], check=True, cwd=ROOT, timeout=60)


@pytest.mark.parametrize("size", SIZES)
def test_headers_ask_for_what_the_preset_needs(size):
    text = SCRIPTS[size].read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.MULTILINE))
    trainer = load_config(f"qwen2_5_{size}").config.trainer
    assert (int(asked["nodes"]), int(asked["gpus-per-node"])) == (trainer.nnodes, trainer.n_gpus_per_node)
    assert {"ntasks-per-node", "cpus-per-task", "mem", "time", "output", "job-name"} <= asked.keys()
    assert (asked["signal"], asked["open-mode"]) == ("B:USR1@600", "append")
    assert "\n#SBATCH --requeue\n" in text and f'job.sh" qwen2_5_{size} ' in text


@pytest.mark.parametrize("size", SIZES)
def test_slurm_takes_the_scripts(slurm, size):
    nodes = load_config(f"qwen2_5_{size}").config.trainer.nnodes
    for options in [["--nodes=2"], *([[]] if nodes <= 2 else [])]:
        said = slurm.call("sbatch", "--test-only", *options, SCRIPTS[size], "trainer.total_epochs=3")
        assert "to start at" in said and ("node[1-2]" in said) == (bool(options) or nodes == 2)


# -- what a job does, with a stand-in for Python ----------------------------------------------------------------------


def stand_in(path: Path, run: str) -> str:
    """Make `path` a program that takes Python's place; its run of the trainer is the script `run`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(STAND_IN + run)
    path.chmod(0o755)
    return str(path)


def test_settings_layout_and_site_reach_torchrun(slurm, tmp_path):
    """In a repository of its own, where sbatch is called, with a .venv and a site.sh of its own."""
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    (tmp_path / "remax_megatron").symlink_to(ROOT / "remax_megatron")
    stand_in(tmp_path / ".venv" / "bin" / "python", 'printf "%s\\n" "$@" >args.$SLURM_NODEID; env >env.$SLURM_NODEID\n')
    with (tmp_path / "slurm" / "site.sh").open("a") as site:
        site.write(': "$NOT_SET"\nSRUN_ARGS=(--mpi=none)\nLAUNCH=(env "LAUNCHED=by env")\nexport NCCL_IB_HCA=mlx5\n')
    overrides = ["trainer.experiment_name=two words", "trainer.n_gpus_per_node=4"]
    options = ["--nodes=2", "--export=ALL,OMP_NUM_THREADS="]
    script = tmp_path / "slurm" / "remax_14b.sh"
    job = slurm.submit(script, tmp_path, overrides, *options, REMAX_HOME="", REMAX_PYTHON="")
    assert job.ended()["JobState"] == "COMPLETED", job.log()
    stop_file = tmp_path / "runs" / "slurm" / f"{job.id}.stop"
    for node in (0, 1):
        assert (tmp_path / f"args.{node}").read_text().splitlines() == [
            *("-m", "torch.distributed.run", "--node-rank", str(node), "--nnodes", "2", "--nproc-per-node", "4"),
            *("--master-addr", "node1", "--master-port", str(20000 + job.id % 10000), "-m", "remax_megatron"),
            *("--config-name", "qwen2_5_14b", "trainer.nnodes=2", "trainer.n_gpus_per_node=4"),
            *(f"trainer.stop_file='{stop_file}'", "trainer.experiment_name=two words", "trainer.n_gpus_per_node=4"),
        ]
        environment = set((tmp_path / f"env.{node}").read_text().splitlines())
        assert {"OMP_NUM_THREADS=8", "SLURM_CPUS_PER_TASK=96", f"PYTHONPATH={tmp_path}"} <= environment
        assert {"LAUNCHED=by env", "NCCL_IB_HCA=mlx5"} <= environment
    assert list(stop_file.parent.iterdir()) == []


def test_which_jobs_are_requeued(slurm, tmp_path):
    """Five jobs side by side, since each restart takes Slurm some seconds."""
    stopped = 'until [ -e "$stop_file" ]; do sleep 0.1; done'
    runs = {
        # saves when asked to, removes the stop file, and is complete after the restart
        "saves": f'[ $SLURM_RESTART_COUNT ] && exit; {stopped}; rm "$stop_file"',
        "is complete": stopped,  # its last step was done when it was asked to save
        "breaks": f"{stopped}; exit 3",
        "fails": "exit 1",
        "is wrong": "exit 2",
    }
    jobs = {}
    for name, run in runs.items():
        folder = tmp_path / name.replace(" ", "_")
        python = stand_in(folder / "python", f"echo begun; {run}\n")
        allowed = "0" if name == "breaks" else "1"
        jobs[name] = slurm.submit(SCRIPTS["14b"], folder, [], *SMALL, REMAX_PYTHON=python, REMAX_RESTARTS=allowed)
    for name in ("saves", "is complete", "breaks"):
        jobs[name].wait_for("run", lambda name=name: "begun" in jobs[name].log(), 60)
        slurm.call("scancel", "--batch", "--signal=USR1", str(jobs[name].id))
    ended = {name: job.ended() for name, job in jobs.items()}
    logs = {name: job.log() for name, job in jobs.items()}
    assert {name: (job["JobState"], job["ExitCode"], job["Restarts"]) for name, job in ended.items()} == {
        "saves": ("COMPLETED", "0:0", "1"),
        "is complete": ("COMPLETED", "0:0", "0"),
        "breaks": ("FAILED", "3:0", "0"),
        "fails": ("FAILED", "1:0", "1"),
        "is wrong": ("FAILED", "2:0", "0"),
    }, logs
    for name, log in logs.items():
        assert log.count("begun\n") == 1 + int(ended[name]["Restarts"])  # the log is appended to
        assert list((jobs[name].folder / "runs" / "slurm").iterdir()) == []
    assert "failed with exit code 1, restart 1 of 1; back into the queue" in logs["fails"]


def test_what_the_user_got_wrong_is_said_and_not_tried_again(slurm, tmp_path):
    cases = {
        "unknown key": (["trainer.total_epoch=3"], {}, "trainer.total_epochs"),
        "stop file": (["trainer.stop_file=/tmp/stop"], {}, "trainer.stop_file is the job's own"),
        "no GPUs": (["trainer.n_gpus_per_node=0"], {}, "'0' ranks per node"),
        "no repository": ([], {"REMAX_HOME": ""}, "is not the repository of remax-megatron; call sbatch from its root"),
    }
    jobs = {
        name: slurm.submit(SCRIPTS["3b"], tmp_path, arguments, *SMALL, REMAX_RESTARTS="3", **environment)
        for name, (arguments, environment, _) in cases.items()
    }
    for name, job in jobs.items():
        ended = job.ended()
        assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0"), job.log()
        assert job.log().count("error: ") == 1 and cases[name][2] in job.log()


# -- real training ----------------------------------------------------------------------------------------------------


def training(inputs: list[str], run_dir: Path, ranks_per_node: int, reward: str = REWARD) -> list[str]:
    """The tiny model on two CPU ranks, whatever preset the script names: the last --config-name holds."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    scorer = run_dir.parent / "reward.py"
    scorer.write_text(reward)
    return [
        "--config-name",
        "demo",
        f"trainer.n_gpus_per_node={ranks_per_node}",
        *inputs,
        "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=1",
        f"custom_reward_function.path={scorer}",
        "data.train_batch_size=8",
        "data.val_files=null",
        "trainer.test_freq=-1",
        "trainer.val_before_train=False",
        f"trainer.total_training_steps={STEPS}",
        "trainer.save_freq=4",
        "trainer.collective_timeout_s=60",
        f"trainer.default_local_dir={run_dir}",
    ]


def measured(run_dir: Path) -> list[dict]:
    """Every step's metrics but the timings."""
    timings = ("time/", "throughput/", "perf/", "seconds", "gb_per_s", "memory/")
    records = read_metrics(run_dir / "metrics.jsonl")
    return [{k: v for k, v in record.items() if not any(t in k for t in timings)} for record in records]


@pytest.fixture(scope="module")
def undisturbed(slurm, demo_inputs, tmp_path_factory) -> list[dict]:
    """The metrics of a job on one node, two ranks, that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = slurm.submit(SCRIPTS["14b"], folder, training(demo_inputs, folder / "run", ranks_per_node=2))
    ended = job.ended()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), job.log()
    metrics = measured(folder / "run")
    assert [record["step"] for record in metrics] == list(range(STEPS + 1))
    return metrics


@pytest.mark.vllm_cpu
@pytest.mark.timeout(900)
def test_signal_preemption_and_a_lost_node_leave_no_trace_in_the_metrics(slurm, undisturbed, demo_inputs, tmp_path):
    run_dir, nodes = tmp_path / "run", "--nodes=2"
    job = slurm.submit(SCRIPTS["14b"], tmp_path, training(demo_inputs, run_dir, ranks_per_node=1), nodes)

    def steps() -> int:
        return (run_dir / "metrics.jsonl").read_bytes().count(b"\n") if (run_dir / "metrics.jsonl").exists() else 0

    def restarts() -> int:
        return int(job.show()["Restarts"])

    def has_gone_on(number: int, at_least: int) -> bool:
        return restarts() == number and job.log().count("Actor Loss") > at_least

    # 1. the signal before the time limit: saves and requeues itself
    job.wait_for("second step", lambda: steps() > 2, 200)
    slurm.call("scancel", "--batch", "--signal=USR1", str(job.id))
    job.wait_for("restart after USR1", lambda: restarts() == 1, 100)
    first_leg = job.log().count("Actor Loss")
    assert 1 < first_leg < STEPS // 2
    assert "saved; back into the queue" in job.log()
    job.wait_for("step after USR1", lambda: has_gone_on(1, first_leg), 200)

    # 2. preemption by a higher partition: the same signal comes from Slurm
    rival = slurm.call("sbatch", "--parsable", "--partition=urgent", nodes, "--gpus-per-node=8", "--wrap=sleep 1")
    job.wait_for("preemption", lambda: restarts() == 2, 100)
    second_leg = job.log().count("Actor Loss")
    assert second_leg < STEPS
    job.wait_for("step after preemption", lambda: has_gone_on(2, second_leg), 200)
    assert Job(int(rival), tmp_path, slurm).show()["JobState"] == "COMPLETED"

    # 3. a node is lost: no signal, Slurm requeues
    slurm.call("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    try:
        job.wait_for("restart after the lost node", lambda: restarts() == 3, 100)
    finally:
        resume = "scontrol update nodename=node2 state=resume || true"  # it may have reported back by itself
        slurm.call("bash", "-c", resume)
    ended = job.ended()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "3"), job.log()
    assert job.log().count("USR1, so") == job.log().count("back into the queue") == 2
    assert measured(run_dir) == undisturbed


@pytest.mark.vllm_cpu
@pytest.mark.timeout(600)
def test_a_failing_rank_fails_the_job(slurm, demo_inputs, tmp_path):
    arguments = training(demo_inputs, tmp_path / "run", 1, FAILING_REWARD)
    job = slurm.submit(SCRIPTS["14b"], tmp_path, arguments, "--nodes=2")
    ended = job.ended()
    assert ended["JobState"] == "FAILED" and ended["ExitCode"] != "0:0" and ended["Restarts"] == "0"
    assert "no reward from here" in job.log()
    assert not (tmp_path / "run" / "hf").exists()
