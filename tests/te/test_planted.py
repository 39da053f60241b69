"""Bugs planted on purpose: each of them is seen by a check of this folder, by far.

The checks are those of the other files: logits against transformers (limit 1e-4), the gradient of a second update
against local layers (limit 5e-6 of its norm), the weights that are streamed under overlapped gathering against those
without (equal bits), and what the fused attention demands. `PLANTS` says which check has to see which bug.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from tests.policy.test_exactness import recorded_rows, relative_difference
from tests.ranks import run_ranks
from tests.small_models import make_qwen2

LOGITS, GRADIENT, STREAM, ATTENTION = "logits", "gradient", "stream", "attention"
LIMITS = {LOGITS: 1e-4, GRADIENT: 5e-6, STREAM: 0.0}


# -- the bugs ----------------------------------------------------------------------------------------------------------


@contextmanager
def norms_swapped() -> Iterator[None]:
    from remax_megatron.weights.weight_table import TE_NAMES

    with mock.patch.dict(TE_NAMES, zip(TE_NAMES, reversed(TE_NAMES.values()), strict=True)):
        yield


@contextmanager
def key_and_value_swapped() -> Iterator[None]:
    from remax_megatron.model import live_weights

    real = live_weights.to_megatron

    def swapped(entry, tensors, *rest):
        names = list(tensors)
        if entry.kind == "qkv":
            tensors = {names[0]: tensors[names[0]], names[1]: tensors[names[2]], names[2]: tensors[names[1]]}
        return real(entry, tensors, *rest)

    with mock.patch.object(live_weights, "to_megatron", swapped):
        yield


@contextmanager
def accumulation_lost() -> Iterator[None]:
    """Each micro-batch overwrites the weight gradients of those before it."""
    from tests.stand_ins.te_cpu import compiled

    real = compiled.generic_gemm

    def overwriting(*args, **kwargs):
        return real(*args[:14], False, *args[15:], **kwargs | {"beta": None})

    with mock.patch.object(compiled, "generic_gemm", overwriting):
        yield


@contextmanager
def sequence_parallel_mark_lost() -> Iterator[None]:
    """The gradients of the fused norms are then not summed over the tensor-parallel ranks."""
    from remax_megatron.policy import trained_model

    real = trained_model.fuse_weight_gradients

    def losing(chunks):
        for name, parameter in (named for chunk in chunks for named in chunk.named_parameters()):
            if name.endswith("layer_norm_weight"):
                parameter.sequence_parallel = False
        real(chunks)

    with mock.patch.object(trained_model, "fuse_weight_gradients", losing):
        yield


@contextmanager
def gradients_not_zeroed() -> Iterator[None]:
    """Fused weight gradients are added to those of the update before."""
    from megatron.core.distributed import DistributedDataParallel

    with mock.patch.object(DistributedDataParallel, "zero_grad_buffer", lambda self: None):
        yield


@contextmanager
def max_seqlen_short() -> Iterator[None]:
    from remax_megatron.policy import packed_model

    real = packed_model.packed_rows

    def short(segments, cu_seqlens, max_seqlen, **kwargs):
        packed = real(segments, cu_seqlens, max_seqlen, **kwargs)
        packed.max_seqlen_q = max_seqlen - 1  # the rotation takes the larger one of the two
        return packed

    with mock.patch.object(packed_model, "packed_rows", short):
        yield


@contextmanager
def weights_not_gathered_for_the_stream() -> Iterator[None]:
    from remax_megatron.policy.policy import Policy

    with mock.patch.object(Policy, "gather_weights", lambda self: None):
        yield


@contextmanager
def head_not_waited_for() -> Iterator[None]:
    from remax_megatron.policy.language_model import LanguageModel
    from remax_megatron.policy.policy import Policy

    with mock.patch.object(Policy, "_head", LanguageModel._head):
        yield


PLANTS: dict[str, tuple[Callable, set[str]]] = {  # name -> (how it is planted, the checks that have to see it)
    "norms swapped": (norms_swapped, {LOGITS, GRADIENT}),
    "key and value swapped": (key_and_value_swapped, {LOGITS, GRADIENT}),
    "accumulation lost": (accumulation_lost, {GRADIENT}),
    "sequence_parallel mark lost": (sequence_parallel_mark_lost, {GRADIENT}),
    "gradients not zeroed": (gradients_not_zeroed, {GRADIENT}),
    "max_seqlen short": (max_seqlen_short, {ATTENTION}),
    "weights not gathered for the stream": (weights_not_gathered_for_the_stream, {STREAM}),
    "head not waited for": (head_not_waited_for, {STREAM}),
}


# -- the checks --------------------------------------------------------------------------------------------------------


def worker(payload) -> dict[str, dict[str, float | str]]:
    """{bug, or "none": {check: how far off, or what it said}}. TP 2 with sequence parallelism; DP 2 for the stream."""
    from megatron.core import parallel_state as mpu

    from remax_megatron.config.schema import Actor
    from remax_megatron.model_facts import ModelFacts
    from remax_megatron.parallel.layout import init_distributed, init_model_parallel
    from remax_megatron.policy.policy import Policy
    from remax_megatron.policy.settings import PolicySettings
    from tests.model.test_parity import logits_of
    from tests.te import test_layers, test_overlap

    device, folder, rows = init_distributed("cpu", 120), payload["folder"], recorded_rows()

    def gradient(mode: str):
        policy = test_layers.build(folder, device, 2, 1, mode)
        logits = logits_of(policy, rows)
        found = logits, test_layers.gradient_of_second_update(policy)
        mpu.destroy_model_parallel()
        return found

    def streamed(overlap: str):
        policy = test_overlap.build(folder, device, 1, overlap)
        found: dict[str, torch.Tensor] = {}
        for step in range(2):
            test_overlap.take_update(policy, rows)
            stream = policy.weight_stream(torch.float32, 10_000)
            found |= {f"{name}, update {step}": tensor.clone() for name, tensor in stream}
        mpu.destroy_model_parallel()
        return found

    def attention() -> str:
        actor = Actor()
        actor.megatron.layers, actor.megatron.attention_backend = test_layers.TE, "transformer_engine"
        actor.ppo_max_token_len_per_gpu, actor.share_prompts = 160, False
        layout, facts = init_model_parallel(device, tp=1, pp=1, vpp=None, seed=1), ModelFacts.from_folder(folder)
        test_layers.forget_attention()
        policy = Policy(facts, layout, PolicySettings(actor), folder)
        policy.logprobs(rows)
        mpu.destroy_model_parallel()
        test_layers.forget_attention()
        return ""

    _, expected_gradient = gradient("local")
    expected_stream = streamed("none")
    found = {}
    for name in ("none", *PLANTS):
        plant, seen_by = PLANTS.get(name, (mock.MagicMock, set(LIMITS) | {ATTENTION}))
        with plant():
            result = found[name] = {}
            if seen_by & {LOGITS, GRADIENT}:
                logits, after = gradient("fused")
                result[LOGITS] = max((a - b).abs().max().item() for a, b in zip(logits, payload["logits"], strict=True))
                result[GRADIENT] = relative_difference(expected_gradient, after)
            for check, call in ((STREAM, functools.partial(streamed, "reduce and gather")), (ATTENTION, attention)):
                if check in seen_by:
                    try:
                        answer = call()
                    except AssertionError as error:
                        mpu.destroy_model_parallel()
                        answer = str(error) or "refused by Megatron"
                    result[check] = answer if isinstance(answer, str) else relative_difference(expected_stream, answer)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict[str, float | str]]:
    from transformers import AutoModelForCausalLM

    folder = str(make_qwen2(tmp_path_factory.mktemp("planted") / "model", tied=False, layers=2, std=0.03))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        ids = [torch.tensor([[*row.prompt_ids, *row.response_ids]]) for row in recorded_rows()]
        payload = {"folder": folder, "logits": [model(one).logits[0] for one in ids]}
    ranks = run_ranks("tests.te.test_planted:worker", 2, payload, preload=("remax_megatron.policy.policy",))
    return ranks[0]


def test_without_a_bug_every_check_passes(found):
    assert set(found["none"]) == {*LIMITS, ATTENTION}
    for check, limit in LIMITS.items():
        assert found["none"][check] <= limit, (check, found["none"])
    assert found["none"][ATTENTION] == ""


@pytest.mark.parametrize("name", PLANTS)
def test_the_bug_is_seen(name, found):
    for check in PLANTS[name][1]:
        answer = found[name][check]
        if isinstance(answer, str):
            assert answer, f"{check} has said nothing"
        else:
            assert answer > 20 * max(LIMITS[check], 1e-6), (check, answer)
    if name == "max_seqlen short":
        assert "but a row has" in found[name][ATTENTION]
