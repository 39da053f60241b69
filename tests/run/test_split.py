"""The engine on ranks of its own: the same run as colocated; answers one step ahead; stopped, gone on with, killed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from remax_megatron.checkpoint.folders import iteration_folder, saved_steps
from remax_megatron.checkpoint.pending import PENDING
from tests.checkpoint.test_resume import measured
from tests.run.small_run import small_run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
STEPS = 4
MEGATRON, ROLLOUT = "actor_rollout_ref.actor.megatron", "actor_rollout_ref.rollout"
AHEAD = (f"{ROLLOUT}.ahead=1",)
OF_A_SPLIT_RUN = ("rollout/staleness", "timeline/", "sync/engine_pause_s")


def split(engine_ranks: int = 1) -> list[str]:
    return ["trainer.placement=split", f"{ROLLOUT}.num_ranks={engine_ranks}"]


@pytest.fixture(scope="module")
def settings(demo_policy, tmp_path_factory) -> list[str]:
    return [
        *small_run(demo_policy, tmp_path_factory.mktemp("settings")),
        f"{MEGATRON}.tensor_model_parallel_size=1",
        "data.val_max_samples=16",
        "algorithm.rollout_correction.rollout_is=token",
        f"trainer.total_training_steps={STEPS}",
        "trainer.test_freq=2",
        "trainer.val_before_train=True",
        "trainer.save_freq=2",
    ]


@pytest.fixture(scope="module")
def run(torchrun, settings, tmp_path_factory):
    """`run(ranks, overrides)`: the folder of a finished run, made once."""
    made: dict[tuple, Path] = {}

    def start(ranks: int, overrides: list[str]) -> Path:
        key = (ranks, *overrides)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("run") / "run"
            finished = torchrun(ranks, [*settings, *overrides, f"trainer.default_local_dir={made[key]}"])
            assert finished.code == 0, finished.output
        return made[key]

    return start


def compared(run_dir: Path) -> list[dict]:
    """The metrics that placement does not name or time."""
    return [
        {key: value for key, value in record.items() if not key.startswith(OF_A_SPLIT_RUN)}
        for record in measured(run_dir)
    ]


def same(one: Path, other: Path) -> None:
    assert [record["step"] for record in compared(one)] == list(range(STEPS + 1))
    for mine, theirs in zip(compared(one), compared(other), strict=True):
        assert mine == theirs
    assert (one / "hf/model.safetensors").read_bytes() == (other / "hf/model.safetensors").read_bytes()


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_without_writing_ahead_a_split_run_is_the_colocated_one(run):
    """Same prompts, seeds and engines: every metric and every weight, bit for bit."""
    same(run(2, split()), run(1, []))


@pytest.mark.slow
def test_two_and_two_ranks_are_the_colocated_two(run):
    same(run(4, split(2)), run(2, []))


def test_answers_written_ahead_are_one_version_old(run):
    steps = records(run(2, [*split(), *AHEAD]))[1:]
    assert [step["rollout/staleness"] for step in steps] == [0] + [1] * (STEPS - 1)
    for step in steps[
        :-1
    ]:  # the answers of the next step were begun before this one's update, and ended before the sync
        assert step["timeline/update_begin_s"] <= step["timeline/update_end_s"]
        assert 0 <= step["timeline/ahead_begin_s"] < step["timeline/update_end_s"]
        assert step["timeline/ahead_end_s"] <= step["time/step_s"]
    assert not any(name.startswith("timeline/") for name in steps[-1])  # nothing is written after the last step
    assert all(0 < step["sync/engine_pause_s"] <= step["sync/seconds"] for step in steps)
    assert compared(run(2, [*split(), *AHEAD])) != compared(run(2, split()))


@pytest.mark.slow
def test_where_weights_stand_still_writing_ahead_changes_nothing(run):
    still = ["actor_rollout_ref.actor.optim.lr=1e-30"]  # 0 is refused; no float32 weight feels this
    same(run(2, [*split(), *AHEAD, *still]), run(2, [*split(), *still]))


def test_a_stopped_run_goes_on_with_the_answers_it_had(run, torchrun, settings, tmp_path):
    """Bit for bit: they are in the checkpoint, for the weights that wrote them are gone."""
    whole = run(2, [*split(), *AHEAD])
    assert saved_steps(whole / "checkpoints") == [4, 2]
    kept = [(iteration_folder(whole / "checkpoints", step) / PENDING).exists() for step in (2, 4)]
    assert kept == [True, False]
    run_dir = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(run_dir / "hf")
    shutil.rmtree(iteration_folder(run_dir / "checkpoints", 4))
    command = [*settings, *split(), *AHEAD, f"trainer.default_local_dir={run_dir}"]
    finished = torchrun(2, command)
    assert finished.code == 0 and "Resuming after step 2" in finished.output, finished.output
    same(run_dir, whole)
    again = torchrun(2, command)
    assert again.code == 0 and "The run is complete" in again.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "engine", "overrides"),
    [
        (2, 1, []),
        (1, 2, [f"{ROLLOUT}.tensor_model_parallel_size=2"]),
        (2, 1, [f"{MEGATRON}.tensor_model_parallel_size=2"]),
        (2, 1, [f"{MEGATRON}.pipeline_model_parallel_size=2"]),
    ],
)
def test_layouts_of_both_sides(policy, engine, overrides, run):
    steps = records(run(policy + engine, [*split(engine), *AHEAD, *overrides, "trainer.total_training_steps=2"]))
    assert [step["rollout/staleness"] for step in steps[1:]] == [0, 1]
    assert steps[-1]["weight_version"] == 2 and steps[-1]["sync/canary_max_abs_diff"] < 1e-4


def ranks_of(pid: int) -> dict[int, int]:
    """rank -> process of the run that the launcher `pid` has started."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # gone since
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            found |= {int(one[5:]): int(child) for one in variables if one.startswith(b"RANK=")}
    return found


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_dead_rank_of_either_side_ends_the_run(rank, torchrun, settings, tmp_path):
    run_dir = tmp_path / "run"
    process = torchrun.start(2, [*settings, *split(), *AHEAD, f"trainer.default_local_dir={run_dir}"])
    try:
        wait_for_step(run_dir, 1)
        os.kill(ranks_of(process.pid)[rank], signal.SIGKILL)
        killed = time.monotonic()
        output, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode != 0 and time.monotonic() - killed < 60
    first = output.rpartition("Root Cause")[2]
    assert re.search(rf"rank +: {rank} \(local_rank: {rank}\)", first) and "SIGKILL" in first


def wait_for_step(run_dir: Path, step: int, timeout_s: float = 180) -> None:
    deadline = time.monotonic() + timeout_s
    file = run_dir / "metrics.jsonl"
    while not file.exists() or len(file.read_text().splitlines()) <= step:
        assert time.monotonic() < deadline, f"no step {step} in {timeout_s} s"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_that_is_killed_at_random_moments_goes_on_bit_for_bit(run, torchrun, settings, tmp_path):
    """Ten times kill -9 of the launcher and all ranks, at moments that a seed draws."""
    whole, draw = run(2, [*split(), *AHEAD, "trainer.save_freq=1"]), random.Random(15)
    for number in range(10):
        run_dir = tmp_path / f"run-{number}"
        command = [*settings, *split(), *AHEAD, "trainer.save_freq=1", f"trainer.default_local_dir={run_dir}"]
        process = torchrun.start(2, command)
        wait_for_step(run_dir, 0)
        time.sleep(draw.uniform(0, 4))
        for pid in (process.pid, *ranks_of(process.pid).values()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=60)
        finished = torchrun(2, command)
        assert finished.code == 0, finished.output
        same(run_dir, whole)
