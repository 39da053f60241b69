"""The attention backends and the head on a GPU, forward and backward, against plain float32."""

from __future__ import annotations

import pytest
import torch

from remax_megatron.algorithm.logprob import head_logprob
from remax_megatron.model.attention import core_attention, packed_rows

pytestmark = pytest.mark.gpu
ROWS = [(130, []), (1, []), (77, []), (300, []), (64, [])]
SHARED = [(50, [70, 33]), (40, []), (129, [64, 64, 1])]
HEADS, KV_HEADS, HEAD_DIM = 12, 2, 128  # those of Qwen2.5-1.5B
ROUNDING = 1e-2  # relative error of results and gradients in bfloat16, whose unit is 2^-8 = 4e-3


def pack(segments):
    lengths = [prompt + sum(answers) for prompt, answers in segments]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).cuda()
    shares = any(answers for _, answers in segments)
    return packed_rows(segments, cu_seqlens, max(lengths), shares_prompts=shares, fused_rotation=False)


def visible(segments) -> torch.Tensor:
    """[T, T]: which token (row) sees which (column), written out."""
    blocks = []
    for prompt, answers in segments:
        total = prompt + sum(answers)
        block = torch.ones(total, total, dtype=torch.bool).tril()
        start = prompt
        for answer in answers:
            block[start + answer :, start : start + answer] = False
            start += answer
        blocks.append(block)
    return torch.block_diag(*blocks).bool().cuda()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()


def inputs(segments):
    """Query, key, value [T, heads, head_dim] in bfloat16, and a gradient of the result."""
    torch.manual_seed(0)
    total = sum(prompt + sum(answers) for prompt, answers in segments)
    q, k, v = (torch.randn(total, n, HEAD_DIM, device="cuda").bfloat16() for n in (HEADS, KV_HEADS, KV_HEADS))
    up = torch.randn(total, HEADS * HEAD_DIM, device="cuda").bfloat16()
    return [x.requires_grad_() for x in (q, k, v)], up


def expected(qkv, up, segments):
    """The result and the gradients of query, key and value in float32."""
    q, k, v = wide = [x.detach().float().requires_grad_() for x in qkv]
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / HEAD_DIM**0.5
    weights = scores.masked_fill(~visible(segments), -torch.inf).softmax(-1)
    out = torch.einsum("hqk,khd->qhd", weights, v).flatten(1)
    return out, *torch.autograd.grad(out, wide, up.float())


def check(out, qkv, up, segments):
    gradients = torch.autograd.grad(out, qkv, up)
    for found, true in zip((out, *gradients), expected(qkv, up, segments), strict=True):
        assert relative(found, true) < ROUNDING


@pytest.mark.parametrize(
    ("backend", "segments"),
    [("sdpa", ROWS), ("varlen", ROWS), ("flex", ROWS), ("sdpa", SHARED), ("flex", SHARED)],
    ids=["sdpa", "varlen", "flex", "sdpa shared", "flex shared"],
)
def test_a_backend_computes_attention_and_its_gradients(backend, segments):
    qkv, up = inputs(segments)
    attend = core_attention(backend)(None, 1, None, "self")
    check(attend(*qkv, None, packed_seq_params=pack(segments)), qkv, up, segments)


def test_varlen_takes_fewer_heads_of_keys_than_of_queries():
    """torch hands keys and values on to its flash kernel unchecked: they need not be expanded first."""
    from torch.nn.attention.varlen import varlen_attn

    qkv, up = inputs(ROWS)
    packed = pack(ROWS)
    rows, longest = packed.row_cu_seqlens, packed.max_seqlen_q
    out = varlen_attn(*qkv, rows, rows, longest, longest, window_size=(-1, 0))
    check(out.flatten(1), qkv, up, ROWS)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_head_on_a_gpu_is_the_head_on_a_cpu(temperature):
    """From the same bfloat16 numbers; the CPU takes them in float32."""
    torch.manual_seed(0)
    hidden = torch.randn(3000, 896).mul(0.5).bfloat16()
    weight = torch.randn(32768, 896).mul(0.05).bfloat16()
    target = torch.randint(0, 32000, (3000,))
    up = torch.randn(2, 3000)
    results = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        h, w = (x.to(device, dtype).requires_grad_() for x in (hidden, weight))
        logprob, entropy = head_logprob(h, w, target.to(device), vocab_size=32000, temperature=temperature)
        gradients = torch.autograd.grad([logprob, entropy], [h, w], list(up.to(device)))
        results.append([x.detach().cpu() for x in (logprob, entropy, *gradients)])
    (logprob, entropy, *gradients), (on_gpu, entropy_on_gpu, *gradients_on_gpu) = results
    assert (logprob - on_gpu).abs().max() < 1e-3
    assert (entropy - entropy_on_gpu).abs().max() < 1e-3
    for found, true in zip(gradients_on_gpu, gradients, strict=True):
        assert relative(found, true) < ROUNDING
