"""A run over two hosts: network namespaces with an address of their own each, joined by one link that can be cut.

Needs root and `ip netns`; skips where there is none. Both hosts see the same files, as on a cluster.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT

pytestmark = pytest.mark.e2e

ADDRESSES = ("10.77.0.1", "10.77.0.2")
LINK = "link0"
ENDS_WITHIN_S = 60
NUM_STEPS = 8


def ip(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=20)


class Hosts:
    """Two network namespaces, each with one end of a veth pair and its own loopback."""

    def __init__(self) -> None:
        self.names = [f"remax-{os.getpid()}-{host}" for host in (0, 1)]

    def up(self) -> None:
        """Skips the test where namespaces cannot be had."""
        if shutil.which("ip") is None:
            pytest.skip("two hosts: the command ip (iproute2) is not installed")
        for name in self.names:
            if (made := ip("netns", "add", name)).returncode != 0:
                pytest.skip(f"two hosts: ip netns add needs root on a system with namespaces: {made.stderr.strip()}")
        pair = ("link", "add", LINK, "netns", self.names[0], "type", "veth", "peer", "name", LINK)
        if (made := ip(*pair, "netns", self.names[1])).returncode != 0:
            pytest.skip(f"two hosts: no veth pair can be made: {made.stderr.strip()}")
        for name, address in zip(self.names, ADDRESSES, strict=True):
            for arguments in (
                ("addr", "add", f"{address}/24", "dev", LINK),
                ("link", "set", LINK, "up"),
                ("link", "set", "lo", "up"),
            ):
                done = ip("-netns", name, *arguments)
                assert done.returncode == 0, done.stderr

    def cut(self) -> None:
        """From now on each host sends to an address that nobody has: no packet arrives, and no error comes back."""
        for name, other in zip(self.names, reversed(ADDRESSES), strict=True):
            nobody = ("lladdr", "02:00:00:00:00:01", "dev", LINK, "nud", "permanent")
            done = ip("-netns", name, "neigh", "replace", other, *nobody)
            assert done.returncode == 0, done.stderr

    def repair(self) -> None:
        for name, other in zip(self.names, reversed(ADDRESSES), strict=True):
            done = ip("-netns", name, "neigh", "del", other, "dev", LINK)
            assert done.returncode == 0, done.stderr

    def kill(self) -> None:
        """End whatever runs on the two."""
        for name in self.names:
            for pid in ip("netns", "pids", name).stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)

    def down(self) -> None:
        self.kill()
        for name in self.names:
            ip("netns", "del", name)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    two = Hosts()
    try:
        two.up()
        yield two
    finally:
        two.down()


class Run:
    """One rank on each host, started by a torchrun of its own there."""

    def __init__(self, hosts: Hosts, folder: Path, overrides: list[str]):
        folder.mkdir()
        self.logs = [folder / f"host-{host}" for host in (0, 1)]
        self.processes = []
        for host, (name, address) in enumerate(zip(hosts.names, ADDRESSES, strict=True)):
            command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"]
            command += ["--nnodes", "2", "--node-rank", str(host), "--nproc-per-node", "1"]
            command += ["--master-addr", ADDRESSES[0], "--master-port", "29500", "--local-addr", address]
            command += ["-m", "remax_megatron", "trainer.nnodes=2", "trainer.n_gpus_per_node=1", *overrides]
            network = {"GLOO_SOCKET_IFNAME": LINK, "VLLM_HOST_IP": address}
            with self.logs[host].open("w") as log:
                self.processes.append(
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env=os.environ | network,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )

    def output(self, host: int) -> str:
        return self.logs[host].read_text(errors="replace")

    def wait_for(self, text: str, timeout_s: float = 180) -> None:
        """Until host 0, where rank 0 is, has printed `text`."""
        deadline = time.monotonic() + timeout_s
        while text not in self.output(0):
            assert time.monotonic() < deadline and all(process.poll() is None for process in self.processes), (
                f"{text!r} was not printed:\n{self.output(0)[-4000:]}\n--- host 1:\n{self.output(1)[-4000:]}"
            )
            time.sleep(0.02)

    def codes(self, timeout_s: float) -> list[int]:
        """The exit codes of both launchers, which have to end in time."""
        deadline = time.monotonic() + timeout_s
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            outputs = f"{self.output(0)[-4000:]}\n--- host 1:\n{self.output(1)[-4000:]}"
            raise AssertionError(f"no end within {timeout_s} s:\n{outputs}") from None


@pytest.mark.slow
@pytest.mark.vllm_cpu
@pytest.mark.timeout(600)  # two starts of two engines, and the deadline
def test_a_cut_link_ends_both_hosts_and_the_run_resumes(hosts, demo_policy, demo_data, tmp_path):
    overrides = [
        *demo_data,
        f"actor_rollout_ref.model.path={demo_policy}",
        "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=1",
        "data.train_batch_size=8",
        "data.val_files=null",
        "trainer.test_freq=-1",
        "trainer.val_before_train=False",
        f"trainer.total_training_steps={NUM_STEPS}",
        "trainer.save_freq=1",
        f"trainer.default_local_dir={tmp_path / 'run'}",
    ]
    run = Run(hosts, tmp_path / "cut", overrides)
    run.wait_for("Epoch 1, Step 2:")
    hosts.cut()
    assert all(code != 0 for code in run.codes(ENDS_WITHIN_S))
    with_store, without = run.output(0), run.output(1)
    assert re.search(r"ends because of rank 1 on node 1 .* in phase .* \(no sign of life", with_store), with_store
    assert f"the rendezvous store at {ADDRESSES[0]}:29500 (not heard of for" in without, without
    assert "on other hosts: rank 0 on node 0" in without
    for output in (with_store, without):
        assert "watchdog: here phase" in output and "thread MainThread" in output

    hosts.repair()
    run = Run(hosts, tmp_path / "repaired", overrides)
    assert run.codes(240) == [0, 0], run.output(0) + run.output(1)
    assert "Resuming after step" in run.output(0)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(NUM_STEPS + 1))
