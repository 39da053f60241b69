"""Memory runs out: which errors say so, what would help, and what a run says before it ends."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from remax_megatron import out_of_memory
from remax_megatron.config.load import load_config
from remax_megatron.model_facts import ModelFacts
from remax_megatron.out_of_memory import OutOfMemory, advice, exhausted, explained, record_history
from remax_megatron.plan.fitting import with_setting
from remax_megatron.plan.ledger import ledger
from tests.parallel.test_failure import overrides

QWEN_7B = ModelFacts(
    num_layers=28,
    hidden_size=3584,
    ffn_hidden_size=18944,
    num_attention_heads=28,
    num_key_value_heads=4,
    head_dim=128,
    vocab_size=152064,
    tied_embeddings=False,
    max_position_embeddings=32768,
)
MEGATRON = "actor_rollout_ref.actor.megatron"
ROLLOUT = "actor_rollout_ref.rollout"
NUM_GPUS = 8

REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return sum(map(ord, solution_str)) % 7 / 6
"""
# Python runs it at its start, in every process of the run; it changes the policy of rank 1 once that is imported.
FAILING_UPDATE = """
import importlib.abc, importlib.util, os, sys
class Hook(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "remax_megatron.policy.policy" or os.environ.get("RANK") != "1":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        def run_and_change(module):
            run(module)
            def update(self, *args, **kwargs):
                import torch
                raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
            module.Policy.update = update
        spec.loader.exec_module = run_and_change
        return spec
sys.meta_path.insert(0, Hook())
"""


def settings(*given: str):
    return load_config("qwen2_5_7b", list(given)).config


def keys(changes: list[str]) -> list[str]:
    return [change.partition("=")[0] for change in changes]


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "device"),
        (RuntimeError("CUDA Error: out of memory at csrc/cumem_allocator.cpp:62"), "device"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "device"),
        (MemoryError(), "host"),
        (raised_from(RuntimeError("EngineCore failed"), torch.OutOfMemoryError("CUDA out of memory")), "device"),
        (RuntimeError("shape '[2]' is invalid for input of size 3"), None),
        (ValueError("out of memory"), None),
    ],
)
def test_which_errors_say_that_memory_is_exhausted(error: Exception, kind: str | None) -> None:
    assert exhausted(error) == kind


def test_torch_says_so_of_host_memory_in_the_words_that_are_looked_for() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50, dtype=torch.uint8)
    assert exhausted(raised.value) == "host"


def test_recompute_and_shorter_micro_batches_help_an_update_most() -> None:
    granularity, tokens = f"{MEGATRON}.override_transformer_config.recompute_granularity", "ppo_max_token_len_per_gpu"
    config = settings("actor_rollout_ref.model.enable_gradient_checkpointing=False")
    first, second = advice("update", config, QWEN_7B, NUM_GPUS, on_cpu=False)
    assert {granularity, f"actor_rollout_ref.actor.{tokens}"} == set(keys([first, second]))
    # Where all of it is computed again already, another layout is the next.
    config = settings("actor_rollout_ref.model.enable_gradient_checkpointing=True")
    first, second = advice("update", config, QWEN_7B, NUM_GPUS, on_cpu=False)
    assert keys([first]) == [f"actor_rollout_ref.actor.{tokens}"]
    assert second.startswith(f"{MEGATRON}.tensor_model_parallel_size=4 (now 2) saves ")


def test_what_is_said_to_be_saved_is_the_difference_of_two_ledgers() -> None:
    share = f"{ROLLOUT}.gpu_memory_utilization"
    config = settings(f"{MEGATRON}.grad_offload=True", f"{MEGATRON}.optimizer_offload=True", f"{share}=0.6")
    first, _ = advice("rollout", config, QWEN_7B, NUM_GPUS, on_cpu=False, card=80 * 10**9)
    before, after = (
        ledger(changed, QWEN_7B, NUM_GPUS, card=80 * 10**9).peak("rollout")
        for changed in (config, with_setting(config, share, 0.5))
    )
    assert before - after == pytest.approx(0.1 * 80e9, rel=1e-6)
    assert first == f"{share}=0.5 (now 0.6) saves 8.0 GB"


def test_smaller_buckets_and_a_smaller_engine_help_a_sync() -> None:
    config = settings(
        f"{MEGATRON}.grad_offload=True", f"{MEGATRON}.optimizer_offload=True", f"{ROLLOUT}.sync_bucket_mb=2048"
    )
    assert keys(advice("sync", config, QWEN_7B, NUM_GPUS, on_cpu=False)) == [
        f"{ROLLOUT}.gpu_memory_utilization",
        f"{ROLLOUT}.sync_bucket_mb",
    ]


def test_ranks_that_hold_the_engine_alone_are_advised_on_what_they_hold() -> None:
    """Half of eight ranks; offloads would free nothing there."""
    config = settings("trainer.placement=split")
    assert keys(advice("engine's sync", config, QWEN_7B, NUM_GPUS, on_cpu=False)) == [
        f"{ROLLOUT}.gpu_memory_utilization",
        f"{ROLLOUT}.sync_bucket_mb",
    ]


def test_a_critic_may_wait_on_the_host() -> None:
    """Of 7.6e9 parameters at TP 2 its gradients take 4 bytes, its weights 2, and of Adam's 12 a rank has a quarter."""
    config = settings("algorithm.adv_estimator=gae", "actor_rollout_ref.model.enable_gradient_checkpointing=True")
    first, second = advice("rollout", config, QWEN_7B, NUM_GPUS, on_cpu=False)
    assert all("critic.megatron" in line or MEGATRON in line for line in (first, second)), (first, second)
    made = ledger(config, QWEN_7B, NUM_GPUS)
    assert made.phases["critic"]["critic's gradients"] == 2 * made.phases["critic"]["critic's weights"]
    assert not {"critic", "critic's optimizer"} & set(ledger(settings(), QWEN_7B, NUM_GPUS).phases)


def test_the_hosts_memory_is_another_matter() -> None:
    config = settings("trainer.async_save=True", f"{MEGATRON}.optimizer_offload=True")
    assert advice("save", config, QWEN_7B, NUM_GPUS, on_cpu=False, host_only=True) == [
        "trainer.async_save=False (now True)",
        f"{MEGATRON}.optimizer_offload=False (now True)",
    ]


def test_changes_that_the_rules_refuse_are_not_advised() -> None:
    one_gpu = settings(f"{MEGATRON}.tensor_model_parallel_size=1", "trainer.n_gpus_per_node=1", f"{ROLLOUT}.n=1")
    said = advice("update", one_gpu, QWEN_7B, 1, on_cpu=False)
    assert not any("tensor_model_parallel_size" in change for change in said)


def test_there_are_always_two_and_none_is_set_already() -> None:
    config = settings(f"{MEGATRON}.grad_offload=True", f"{MEGATRON}.optimizer_offload=True")
    for phase in ("start", "rollout", "reward", "score", "update", "sync", "save", "validation", "step"):
        for on_cpu in (False, True):
            said = advice(phase, config, QWEN_7B, NUM_GPUS, on_cpu=on_cpu)
            assert len(said) == 2 and not any("=True (now True)" in change for change in said)


def test_history_is_recorded_on_gpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **kwargs: asked.append(kwargs))
    record_history(torch.device("cpu"))
    record_history(torch.device("cuda"))
    assert asked == [{"stacks": "python", "max_entries": 50_000}]


def test_on_a_gpu_the_snapshot_and_the_allocator_are_named_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        out_of_memory, "whole_run", lambda: SimpleNamespace(rank=3, size=NUM_GPUS, is_engine_only=False)
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 70 * 10**9)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 75 * 10**9)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"snapshot"))
    config, file = settings(f"trainer.default_local_dir={tmp_path}/run"), tmp_path / "run" / "oom-rank-3.pickle"
    with pytest.raises(OutOfMemory) as raised, explained(config, QWEN_7B, torch.device("cuda"), lambda: "sync"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    first, *rest = str(raised.value).splitlines()
    assert first == "GPU memory ran out in phase sync. What would help most there:"
    assert [line.startswith("  actor_rollout_ref.") for line in rest] == [True, True, False, False, False]
    assert rest[2].startswith("counted for a rank of pipeline stage 0 (sync): weights ")
    assert "torch allocated 70.0 GB and reserved 75.0 GB" in rest[3] and "79.0 GB of 80.0 GB" in rest[3]
    assert str(file) in rest[4] and file.read_bytes() == b"snapshot"
    assert isinstance(raised.value.__cause__, torch.OutOfMemoryError)


def test_other_errors_pass_as_they_are() -> None:
    error = RuntimeError("a peer is gone")
    with pytest.raises(RuntimeError) as raised, explained(settings(), QWEN_7B, torch.device("cpu"), lambda: ""):
        raise error
    assert raised.value is error


def test_a_run_says_what_it_was_doing_what_lay_where_and_what_would_help(
    torchrun, demo_policy, tmp_path: Path, monkeypatch
) -> None:
    reward = tmp_path / "reward.py"
    reward.write_text(REWARD)
    (tmp_path / "sitecustomize.py").write_text(FAILING_UPDATE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    skip = "actor_rollout_ref.actor.skip_zero_advantage=False"
    finished = torchrun(2, [*overrides(demo_policy, tmp_path / "run"), f"custom_reward_function.path={reward}", skip])
    assert finished.code != 0
    assert "Tried to allocate 2.00 GiB" in finished.output  # where the code was
    said = finished.output[finished.output.index("OutOfMemory: host memory ran out in phase update") :]
    assert "  actor_rollout_ref.actor.ppo_max_token_len_per_gpu=2048 (now 4096) saves " in said
    assert re.search(r"counted for a rank of pipeline stage 0 \(update\): weights .* \+ .* = \d+\.\d MB", said)
    assert re.search(r"measured: this process .*B of host memory, .* available", said)
    assert "rank 0 stops because rank 1 (OutOfMemory: host memory ran out in phase update" in finished.output or (
        "rank      : 1" in finished.output
    )
