"""Attention over packs: every backend that runs on a CPU against a plain masked softmax, rows and shared prompts."""

from __future__ import annotations

import pytest
import torch

from remax_megatron.errors import UserError
from remax_megatron.model.attention import choose_backend, core_attention, packed_rows

SEGMENTS = [(5, [3, 1, 4]), (7, []), (1, [2, 2]), (3, [])]  # (prompt tokens, [tokens of each answer])
CPU = torch.device("cpu")


def seen(segments) -> torch.Tensor:
    """[T, T] bool, written out token by token."""
    labels = [
        (number, part)
        for number, (prompt, answers) in enumerate(segments)
        for part, size in enumerate([prompt, *answers])
        for _ in range(size)
    ]
    return torch.tensor(
        [
            [
                kv <= q and labels[kv][0] == labels[q][0] and labels[kv][1] in (0, labels[q][1])
                for kv in range(len(labels))
            ]
            for q in range(len(labels))
        ]
    )


def params(segments):
    lengths = [prompt + sum(answers) for prompt, answers in segments]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    shares = any(answers for _, answers in segments)
    return packed_rows(segments, cu_seqlens, max(lengths), shares_prompts=shares, fused_rotation=False)


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("segments", [SEGMENTS, [(4, []), (9, []), (1, [])], [(6, [])]])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_a_token_sees_the_prompt_and_its_own_answer(backend, segments, kv_heads):
    total = sum(prompt + sum(answers) for prompt, answers in segments)
    torch.manual_seed(0)
    trains = backend == "sdpa"  # flex has no backward pass on a CPU
    q, k, v = (torch.randn(total, heads, 32, requires_grad=trains) for heads in (4, kv_heads, kv_heads))
    module = core_attention(backend)(None, 1, None, "self")
    out = module(q, k, v, None, packed_seq_params=params(segments))
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(4 // kv_heads, 1)) / 32**0.5
    weights = scores.masked_fill(~seen(segments), -torch.inf).softmax(-1)
    expected = torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(4 // kv_heads, 1)).reshape(total, -1)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    if trains:
        upstream = torch.randn_like(out)
        mine = torch.autograd.grad(out, (q, k, v), upstream)
        others = torch.autograd.grad(expected, (q, k, v), upstream)
        for one, other in zip(mine, others, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_choice_of_a_backend():
    assert choose_backend("auto", CPU, torch.float32) == "sdpa"
    assert choose_backend("auto", CPU, torch.float32, share_prompts=True) == "sdpa"
    with pytest.raises(UserError, match="varlen cannot compute shared prompts; set .*share_prompts=False, or .*flex"):
        choose_backend("varlen", CPU, torch.bfloat16, share_prompts=True)
    with pytest.raises(UserError, match="attention_backend=flex cannot run here on cpu"):
        choose_backend("flex", CPU, torch.float32)
