"""What a run holds: each number against something this process just took, and a run that takes no more and more."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading

import pytest

from remax_megatron.gauges import descendants, num_open_files, num_threads, process_gauges, resident_bytes
from remax_megatron.metrics import read_metrics
from tests.ranks import run_ranks
from tests.run.test_end_to_end import overrides

NUM_BYTES = 64 * 2**20


def test_an_opened_file_a_thread_and_touched_memory_are_counted():
    files, threads, memory = num_open_files("self"), num_threads("self"), resident_bytes("self")
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait)
    with open(os.devnull):
        thread.start()
        block = mmap.mmap(-1, NUM_BYTES)  # fresh pages, whatever the allocator keeps
        for page in range(0, NUM_BYTES, mmap.PAGESIZE):
            block[page] = 1
        assert (num_open_files("self"), num_threads("self")) == (files + 1, threads + 1)
        assert resident_bytes("self") - memory == pytest.approx(NUM_BYTES, rel=0.3)
        ended.set()
        thread.join()
    assert num_open_files("self") == files


def test_descendants_are_children_and_their_children_while_they_run():
    code = "import subprocess, sys; print(subprocess.Popen(['sleep', '60']).pid, flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdin is not None
        grandchild = int(child.stdout.readline())
        assert {child.pid, grandchild} <= set(descendants(os.getpid()))
        os.kill(grandchild, 9)
        child.stdin.close()
    assert child.pid not in descendants(os.getpid())
    assert resident_bytes(child.pid) == 0


def gauges_worker(payload):
    from remax_megatron.parallel.layout import init_distributed

    device = init_distributed("cpu", 60)
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(100 * int(os.environ["RANK"]))]
    return process_gauges(device, {"memory/mine": float(os.environ["RANK"])}), num_open_files("self"), len(held)


def test_gauges_are_the_largest_of_all_ranks():
    (first, files_0, _), (second, files_1, held) = run_ranks("tests.run.test_gauges:gauges_worker", 2, preload=())
    assert first == second and held == 100
    assert first["memory/open_files_max"] == files_1 > files_0
    assert first["memory/mine"] == 1.0
    assert first["memory/threads_max"] >= 1 and first["memory/rss_max_gib"] > 0.05


@pytest.mark.slow
def test_descriptors_and_threads_do_not_grow_with_the_steps(torchrun, demo_policy, tmp_path):
    """The long form, with memory, is benchmarks/growth.py."""
    length = ["trainer.total_training_steps=25", "trainer.save_freq=5", "trainer.test_freq=10"]
    plain = [key for key in overrides(demo_policy, tmp_path / "run", 2, 1, 1) if "total_training_steps" not in key]
    finished = torchrun(2, [*plain, *length])
    assert finished.code == 0, finished.output
    records = [record for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if record["step"] >= 5]
    assert len(records) == 21
    held = {(record["memory/open_files_max"], record["memory/threads_max"]) for record in records}
    assert len(held) == 1, held
