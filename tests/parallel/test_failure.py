"""A run that fails ends on all ranks within seconds, with a non-zero exit, and names the rank that failed first."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.ranks import run_ranks

ENDS_WITHIN_S = 30

FAILING_REWARD = """
import os
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    if os.environ["RANK"] == "1":
        raise ValueError("no reward from here")
    return 0.0
"""


def overrides(policy: str, run_dir: Path) -> list[str]:
    return [
        f"actor_rollout_ref.model.path={policy}",
        "data.train_batch_size=8",
        "data.val_files=null",
        "trainer.test_freq=-1",
        "trainer.val_before_train=False",
        f"trainer.default_local_dir={run_dir}",
    ]


def test_an_error_on_one_rank_ends_all_and_is_named(torchrun, demo_policy, tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text(FAILING_REWARD)
    finished = torchrun(2, [*overrides(demo_policy, tmp_path / "run"), f"custom_reward_function.path={reward}"])
    assert finished.code != 0
    assert "no reward from here" in finished.output
    assert "rank 0 stops because rank 1" in finished.output or "rank      : 1" in finished.output
    assert not (tmp_path / "run" / "hf").exists()


def test_a_failing_canary_stops_the_run_and_keeps_the_policy(torchrun, demo_policy, tmp_path):
    threshold = "actor_rollout_ref.rollout.canary_threshold=1e-12"  # less than any rounding
    finished = torchrun(2, [*overrides(demo_policy, tmp_path / "run"), threshold])
    assert finished.code != 0
    assert "does not compute with the policy's weights" in finished.output
    assert (tmp_path / "run" / "hf" / "model.safetensors").exists()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""  # no rollout was spent


def disagreeing_worker(_payload) -> str:
    """Two ranks whose settings differ in the seed: what each is told."""
    import torch.distributed as dist

    from remax_megatron.config.load import load_config
    from remax_megatron.config.schema import ConfigError
    from remax_megatron.data.dataset import PromptDataset
    from remax_megatron.inputs import Inputs, check_ranks_agree
    from remax_megatron.parallel.layout import init_distributed
    from remax_megatron.types import Prompt

    init_distributed("cpu", 60)
    prompts = PromptDataset([Prompt(0, (5, 6), "word_problems", "1")], num_rows=1)
    inputs = Inputs("", None, [1], prompts, None)
    check_ranks_agree(load_config("demo", ["trainer.seed=7"]).config, inputs)  # the same on both: passes
    try:
        check_ranks_agree(load_config("demo", [f"trainer.seed={dist.get_rank()}"]).config, inputs)
    except ConfigError as error:
        return str(error)
    return "no error"


def test_ranks_that_read_other_settings_are_refused_on_every_rank():
    said = run_ranks("tests.parallel.test_failure:disagreeing_worker", 2, None, timeout_s=100)
    assert said[0] == said[1]
    assert "ranks [1] read other settings or data than rank 0" in said[0]


def started(process: subprocess.Popen) -> str:
    """What the run printed until its first step was logged."""
    seen = ""
    for line in process.stdout:
        seen += line
        if "Actor Loss" in line:
            return seen
    raise AssertionError(f"the run ended before its first step:\n{seen}")


def ranks_of(process: subprocess.Popen) -> list[int]:
    """Process ids of the ranks, in rank order."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            stat = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            if int(stat[1]) == process.pid:
                environment = (entry / "environ").read_bytes().split(b"\0")
                rank = next((int(e[5:]) for e in environment if e.startswith(b"RANK=")), None)
                if rank is not None:
                    found[rank] = int(entry.name)
    return [found[rank] for rank in sorted(found)]


@pytest.mark.parametrize("how", ["interrupt", "kill rank 1"])
def test_interrupt_and_a_killed_rank_end_the_run(torchrun, demo_policy, tmp_path, how):
    process = torchrun.start(2, overrides(demo_policy, tmp_path / "run"))
    try:
        started(process)
        ranks = ranks_of(process)
        assert len(ranks) == 2
        if how == "interrupt":
            process.send_signal(signal.SIGINT)
        else:
            os.kill(ranks[1], signal.SIGKILL)
        begin = time.monotonic()
        output, _ = process.communicate(timeout=ENDS_WITHIN_S)
        assert time.monotonic() - begin < ENDS_WITHIN_S
        assert process.returncode != 0
        if how == "kill rank 1":
            assert "rank      : 1" in output, output  # torchrun's root cause
        for pid in ranks:
            assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
