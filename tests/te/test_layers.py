"""Transformer Engine's layers against Megatron's local ones: gradients in every mode, and bfloat16.

That each kind agrees with transformers, at every layout, is shown by tests/model/test_parity.py run on it.
"""

from __future__ import annotations

import os

import pytest
import torch

from remax_megatron.types import Recompute
from tests.policy.test_exactness import recorded_rows, relative_difference
from tests.ranks import run_ranks
from tests.small_models import YARN, make_qwen2, make_qwen3

TE, LOCAL = "transformer_engine", "local"
MODES = {  # layers, recompute, weight gradients fused
    "local": (LOCAL, Recompute(), False),
    "plain": (TE, Recompute(), False),
    "fused": (TE, Recompute(), True),
    "selective": (TE, Recompute("selective", modules=("mlp",)), True),
    "full": (TE, Recompute("full"), True),
    "full, not fused": (TE, Recompute("full"), False),
}
CASES = {  # ranks -> (tp, pp, mode, shared prompts); sequence parallelism with TP
    1: [(1, 1, mode, False) for mode in MODES] + [(1, 1, "fused", True), (1, 1, "local", True)],
    2: [(tp, pp, mode, False) for tp, pp in ((1, 1), (2, 1), (1, 2)) for mode in ("fused", "full")],
}


def build(folder: str, device, tp: int, pp: int, mode: str, *, shared: bool = False):
    """A policy in float32, with several micro-batches for `recorded_rows`."""
    from tests.policy import test_exactness

    layers, recompute, fused = MODES[mode]
    how = (shared, False, 70, recompute)
    policy = test_exactness.build(folder, device, tp=tp, pp=pp, how=how, layers=layers)
    for module in (module for chunk in policy.chunks for module in chunk.modules()):
        if hasattr(module, "fuse_wgrad_accumulation"):
            # assert module.fuse_wgrad_accumulation, "Policy fuses them"
            module.fuse_wgrad_accumulation = fused
    return policy


def gradient_of_second_update(policy) -> dict[str, torch.Tensor]:
    """Of the second: in a model's very first backward pass a fused weight gradient is written, later ones are added."""
    from remax_megatron.algorithm.aggregation import weigh_rows
    from tests.policy.test_exactness import gradients

    for _ in range(2):
        rows = recorded_rows()
        weigh_rows(rows, "token-mean")
        assert policy.update(rows).num_microbatches > 1
    return gradients(policy)


def gradient_worker(payload):
    from megatron.core import parallel_state as mpu

    from remax_megatron.parallel.layout import init_distributed

    device = init_distributed("cpu", 120)
    found = []
    for tp, pp, mode, shared in CASES[payload["world"]]:
        policy = build(payload["folder"], device, tp, pp, mode, shared=shared)
        found.append(gradient_of_second_update(policy))
        mpu.destroy_model_parallel()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(make_qwen2(tmp_path_factory.mktemp("layers") / "model", tied=False, std=0.03))


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def gradient_folder(folder, request, tmp_path_factory) -> str:
    """A model whose gradients are compared: that of `folder`, and a Qwen3 with YaRN."""
    if request.param == "qwen2":
        return folder
    return str(make_qwen3(tmp_path_factory.mktemp("layers") / "qwen3", tied=False, std=0.03, heads=4, rope=YARN))


@pytest.fixture(scope="module")
def alone(gradient_folder) -> list[dict[str, torch.Tensor]]:
    return run_ranks("tests.te.test_layers:gradient_worker", 1, {"folder": gradient_folder, "world": 1})[0]


@pytest.mark.parametrize("world", CASES)
def test_gradients_are_those_of_the_local_layers(world, gradient_folder, alone):
    payload = {"folder": gradient_folder, "world": world}
    found = alone if world == 1 else run_ranks("tests.te.test_layers:gradient_worker", world, payload)[0]
    for case, gradient in zip(CASES[world], found, strict=True):
        difference = relative_difference(alone[0], gradient)
        assert difference <= 5e-6, (case, difference)


def forget_attention() -> None:
    """Megatron notes its first model's kind of attention, and refuses another one in the same process."""
    for name in ("FLASH", "FUSED", "UNFUSED"):
        os.environ.pop(f"NVTE_{name}_ATTN", None)


def bfloat16_worker(folder: str):
    """{kind of layers: (log-probabilities, gradient, calls of the fused attention forward and backward)}, and in
    float32 on local layers; then what is said of shared prompts."""
    from megatron.core import parallel_state as mpu
    from transformer_engine.pytorch.optimizers import FusedAdam

    from remax_megatron.algorithm.aggregation import weigh_rows
    from remax_megatron.config.schema import Actor
    from remax_megatron.errors import UserError
    from remax_megatron.model_facts import ModelFacts
    from remax_megatron.parallel.layout import init_distributed, init_model_parallel
    from remax_megatron.policy.policy import Policy
    from remax_megatron.policy.settings import PolicySettings
    from tests.policy.test_exactness import gradients
    from tests.stand_ins.te_cpu import compiled

    calls = []

    def counted(function):
        return lambda *args: calls.append(function.__name__) or function(*args)

    compiled.fused_attn_fwd, compiled.fused_attn_bwd = map(counted, (compiled.fused_attn_fwd, compiled.fused_attn_bwd))
    device = init_distributed("cpu", 120)
    facts = ModelFacts.from_folder(folder)

    def build(layers: str, dtype: str, attention: str, shared: bool = False) -> Policy:
        actor = Actor()
        actor.megatron.layers, actor.megatron.dtype, actor.megatron.attention_backend = layers, dtype, attention
        actor.ppo_max_token_len_per_gpu, actor.share_prompts = 160, shared
        actor.megatron.use_distributed_optimizer, actor.optim.clip_grad = False, 0.0
        layout = init_model_parallel(device, tp=1, pp=1, vpp=None, seed=1)
        forget_attention()
        return Policy(facts, layout, PolicySettings(actor), folder)

    found = {}
    for name, *how in (
        ("float32", LOCAL, "float32", "sdpa"),
        ("local", LOCAL, "bfloat16", "sdpa"),
        ("transformer_engine", TE, "bfloat16", "auto"),
    ):
        policy = build(*how)
        rows = recorded_rows()
        weigh_rows(rows, "token-mean")
        logprobs = torch.tensor([value for row in policy.logprobs(rows) for value in row])
        calls.clear()
        policy.update(rows)
        counts = calls.count("fused_attn_fwd"), calls.count("fused_attn_bwd"), len(policy.schedule(rows)[0])
        assert all(isinstance(one.optimizer, FusedAdam) for one in policy.optimizer.chained_optimizers)
        found[name] = logprobs, gradients(policy), counts
        mpu.destroy_model_parallel()
    said = []
    for attention in ("transformer_engine", "auto"):
        try:
            policy = build(TE, "bfloat16", attention, shared=True)
            said.append(type(policy.bare_chunks[0].decoder.layers[0].self_attention.core_attention).__name__)
        except UserError as error:
            said.append(str(error))
        mpu.destroy_model_parallel()
    return found, said


@pytest.fixture(scope="module")
def bfloat16(folder):
    return run_ranks("tests.te.test_layers:bfloat16_worker", 1, folder)[0]


def test_bfloat16_goes_through_the_fused_attention_and_is_as_near_to_float32_as_the_local_layers(bfloat16):
    found, _ = bfloat16
    logprobs, gradient, _ = found["float32"]
    far = {}
    for name in ("local", "transformer_engine"):
        mean = (found[name][0] - logprobs).abs().mean().item()
        far[name] = mean, relative_difference(gradient, found[name][1])
    assert far["transformer_engine"] <= (1e-2, 3e-2)
    for mine, local in zip(far["transformer_engine"], far["local"], strict=True):
        assert mine <= 1.2 * local, far
    assert found["local"][2][:2] == (0, 0)
    forward, backward, batches = found["transformer_engine"][2]
    assert forward == backward == 4 * batches > 4  # 4 layers


def test_shared_prompts_never_reach_attention_that_cannot_compute_them(bfloat16):
    refused, chosen = bfloat16[1]
    assert "attention_backend=transformer_engine cannot compute shared prompts" in refused
    assert chosen == "SdpaPerRow"
