"""Optimizer state that is moved to the host between updates: nothing of the training changes."""

from __future__ import annotations

import torch

from remax_megatron.policy.offload import HostOffload, optimizer_tensors
from tests.model.test_parity import make_rows
from tests.ranks import run_ranks
from tests.small_models import make_qwen2


def test_tensors_come_back_as_they_were_and_their_memory_is_given_up():
    first, second = torch.arange(6.0).view(2, 3), torch.ones(4, dtype=torch.bfloat16)
    offload = HostOffload()
    for values in (1.0, 2.0):  # the host copy is used again, with the new values
        first.mul_(values)
        expected = first.clone()
        offload.release([first, second])
        assert first.untyped_storage().nbytes() == second.untyped_storage().nbytes() == 0
        assert torch.equal(offload.current(first), expected)
        offload.restore()
        assert torch.equal(first, expected) and torch.equal(second, torch.ones(4, dtype=torch.bfloat16))
        assert offload.current(first) is first


def test_the_step_count_and_the_models_own_weights_stay():
    weight = torch.nn.Parameter(torch.ones(3))
    adam = torch.optim.AdamW([weight])
    weight.grad = torch.ones(3)
    adam.step()
    assert len(optimizer_tensors(adam, masters=False)) == 2  # the two moments
    assert len(optimizer_tensors(adam, masters=True)) == 3
    assert all(tensor is not adam.state[weight]["step"] for tensor in optimizer_tensors(adam, masters=True))


CASES = (("bfloat16", True), ("float32", True), ("float32", False))  # dtype, use_distributed_optimizer


def offload_worker(folder: str) -> list[list]:
    """Per case, without and with offload: gradient norms of three updates, and the checkpoint's blocks before each."""
    from remax_megatron.algorithm.aggregation import weigh_rows
    from remax_megatron.config.schema import Actor
    from remax_megatron.model_facts import ModelFacts
    from remax_megatron.parallel.layout import init_distributed, init_model_parallel
    from remax_megatron.policy.policy import Policy
    from remax_megatron.policy.settings import PolicySettings
    from remax_megatron.policy.training_state import TrainingState

    layout = init_model_parallel(init_distributed("cpu", 120), tp=1, pp=1, vpp=None, seed=1)
    rows, results = make_rows(), []
    weigh_rows(rows, "token-mean")
    for dtype, distributed in CASES:
        ways = []
        for away in (False, True):
            actor = Actor(ppo_max_token_len_per_gpu=120)
            actor.megatron.dtype, actor.megatron.use_distributed_optimizer = dtype, distributed
            actor.optim.lr = 1e-2
            policy = Policy(ModelFacts.from_folder(folder), layout, PolicySettings(actor), folder)
            seen: list = []
            for _ in range(3):
                if away:
                    policy.offload_optimizer()
                for name, block in TrainingState(policy).sharded().items():
                    if isinstance(block.data, torch.Tensor):
                        seen.append((name, block.data.clone().float().numpy().tobytes()))
                seen.append(policy.update(rows).grad_norm)
            ways.append(seen)
        results.append(ways)
    return results


def test_updates_and_checkpoints_are_the_same_with_the_state_away(tmp_path):
    folder = str(make_qwen2(tmp_path / "model", tied=True))
    for of_rank in run_ranks("tests.policy.test_offload:offload_worker", 2, folder):
        for case, (stays, away) in zip(CASES, of_rank, strict=True):
            assert stays == away, case
