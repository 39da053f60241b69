"""Shared fixtures: the demo's data and a barely warm-started policy, and the command that starts real runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from types import FunctionType

import pytest

from tests import ROOT

# Before torch is imported: tests share two cores with the ranks they start, and spinning threads would starve both.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what follows from what a test calls: ranks of its own; whole runs, which need vLLM's CPU engine."""
    for item in items:
        if "torchrun" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.vllm_cpu)
            item.add_marker(pytest.mark.e2e)
        elif isinstance(item, pytest.Function) and _starts_ranks(item):
            item.add_marker(pytest.mark.ranks)


def _starts_ranks(item: pytest.Function) -> bool:
    """Whether the test, a fixture of it, or a function of the tests that they name calls `run_ranks`."""
    fixtures = item._fixtureinfo.name2fixturedefs.values()
    left = [item.function, *(definition.func for definitions in fixtures for definition in definitions)]
    seen = set()
    while left:
        function = left.pop()
        if function in seen:
            continue
        seen.add(function)
        for name in function.__code__.co_names:
            if name == "run_ranks":
                return True
            named = function.__globals__.get(name)
            if isinstance(named, FunctionType) and named.__module__.startswith("tests."):
                left.append(named)
    return False


@pytest.fixture(scope="session")
def demo_policy(tmp_path_factory) -> str:
    """The demo's model and tokenizer after 20 steps of warm start: knows the words, hardly the sums."""
    from remax_megatron.demo.warm_start import ensure_policy

    return str(ensure_policy(tmp_path_factory.mktemp("inputs") / "policy", num_steps=20, progress=False))


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory) -> list[str]:
    """The demo's data files, as overrides of the demo preset."""
    from remax_megatron.demo.word_problems import ensure_data

    train, val = ensure_data(tmp_path_factory.mktemp("inputs") / "data")
    return [f"data.train_files={train}", f"data.val_files={val}"]


@pytest.fixture(scope="session")
def demo_inputs(demo_policy, demo_data) -> list[str]:
    """The data and the barely warm-started policy, as overrides of the demo preset."""
    return [*demo_data, f"actor_rollout_ref.model.path={demo_policy}"]


@dataclass
class Finished:
    """A run that ended: exit code and all it printed."""

    code: int
    output: str


@pytest.fixture(scope="session")
def torchrun(demo_data):
    """`torchrun(ranks, overrides, timeout_s=...)`: a real run of the trainer under torchrun, bounded in time."""

    def start(ranks: int, overrides: list[str]) -> subprocess.Popen:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        command += ["--nproc-per-node", str(ranks), "-m", "remax_megatron", f"trainer.n_gpus_per_node={ranks}"]
        return subprocess.Popen(
            [*command, *demo_data, *overrides],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(ranks: int, overrides: list[str], timeout_s: float = 240) -> Finished:
        process = start(ranks, overrides)
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"the run did not end in {timeout_s} s: {overrides}\n{error.stdout}") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return Finished(process.returncode, output)

    run.start = start
    return run
