"""head_logprob and head_full_kl against the plain formulas: values in float64, gradients by autograd, and a head cut
over two ranks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from remax_megatron.algorithm import logprob
from remax_megatron.algorithm.kl import full_kl
from remax_megatron.algorithm.logprob import head_full_kl, head_logprob
from tests.ranks import run_ranks

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(num: int, hidden: int, rows: int, vocab: int, seed: int = 0, scale: float = 1.0) -> Inputs:
    """hidden_RH, weight_VH, target_R, and random coefficients of logprobs and entropies."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    target_R = torch.randint(0, vocab, (num,), generator=generator)
    return scale * normal(num, hidden), normal(rows, hidden), target_R, normal(num), normal(num)


def plain(hidden: Tensor, weight: Tensor, target: Tensor, vocab: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The definition: all logits at once, padding rows left out, in the dtype of the inputs."""
    log_p = torch.log_softmax(hidden @ weight[:vocab].T / temperature, dim=-1)
    return log_p.gather(1, target.unsqueeze(1)).squeeze(1), -(log_p.exp() * log_p).sum(dim=-1)


def gradients(score, hidden: Tensor, weight: Tensor, coef_logprob: Tensor, coef_entropy: Tensor) -> list[Tensor]:
    """d / d(hidden, weight) of a linear combination of the logprobs and entropies that `score` returns."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logprob, entropy = score(hidden, weight)
    total = (coef_logprob * logprob).sum() + (coef_entropy * entropy).sum()
    return list(torch.autograd.grad(total, (hidden, weight)))


def assert_relative(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Largest difference, relative to the largest element."""
    assert actual.shape == expected.shape
    difference = (actual - expected).abs().max().item()
    limit = tolerance * expected.abs().max().item()
    assert difference <= limit, f"{difference} > {limit}"


def test_by_hand() -> None:
    # Logits 0, ln 2, ln 5: p = 1/8, 2/8, 5/8. Entropy = ln 8 - (2 ln 2 + 5 ln 5) / 8.
    weight_VH = torch.tensor([[0.0], [math.log(2)], [math.log(5)]])
    hidden_RH = torch.ones(3, 1)
    logprob_R, entropy_R = head_logprob(hidden_RH, weight_VH, torch.tensor([0, 1, 2]), vocab_size=3)
    assert logprob_R.dtype == entropy_R.dtype == torch.float32
    torch.testing.assert_close(logprob_R, torch.tensor([1 / 8, 2 / 8, 5 / 8]).log())
    torch.testing.assert_close(entropy_R, torch.full((3,), math.log(8) - (2 * math.log(2) + 5 * math.log(5)) / 8))
    # At temperature 1/2 the logits double: p = 1/30, 4/30, 25/30.
    logprob_R, _ = head_logprob(hidden_RH, weight_VH, torch.tensor([0, 1, 2]), vocab_size=3, temperature=0.5)
    torch.testing.assert_close(logprob_R, torch.tensor([1 / 30, 4 / 30, 25 / 30]).log())


@settings(max_examples=60, deadline=None)
@given(
    num=st.integers(1, 17),
    hidden=st.integers(1, 16),
    vocab=st.integers(1, 90),
    padding=st.integers(0, 40),
    chunk_size=st.integers(1, 20),
    temperature=st.sampled_from([0.5, 1.0, 1.3]),
    seed=st.integers(0, 2**31),
)
def test_values_and_gradients(num, hidden, vocab, padding, chunk_size, temperature, seed) -> None:
    hidden_RH, weight_VH, target_R, *coefficients = inputs(num, hidden, vocab + padding, vocab, seed, scale=0.5)

    def ours(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return head_logprob(h, w, target_R, vocab_size=vocab, temperature=temperature, chunk_size=chunk_size)

    exact = plain(hidden_RH.double(), weight_VH.double(), target_R, vocab, temperature)
    largest = (hidden_RH @ weight_VH.T / temperature).abs().max().item()
    for actual, expected in zip(ours(hidden_RH, weight_VH), exact, strict=True):
        # 1e-6 while logits are at most 1; float32 rounds larger ones in proportion.
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-6 * max(1.0, largest))
    actual = gradients(ours, hidden_RH, weight_VH, *coefficients)
    expected = gradients(
        lambda h, w: plain(h, w, target_R, vocab, temperature),
        hidden_RH.double(),
        weight_VH.double(),
        *(c.double() for c in coefficients),
    )
    scale = max(1.0, *(c.abs().max().item() for c in coefficients))
    for mine, reference in zip(actual, expected, strict=True):
        # With one token in the vocabulary the gradient is 0: compare against the size of what cancels.
        torch.testing.assert_close(mine.double(), reference, rtol=1e-5, atol=1e-5 * scale)
    assert not actual[1][vocab:].any()


def test_values_and_gradients_of_a_larger_head() -> None:
    """float64 values within 1e-6, float32 gradients within 1e-5 of the largest, any chunk size the same."""
    vocab = 1000
    hidden_RH, weight_VH, target_R, *coefficients = inputs(37, 64, 1024, vocab, scale=0.03)
    exact = plain(hidden_RH.double(), weight_VH.double(), target_R, vocab, 0.9)
    reference = gradients(
        lambda h, w: plain(h, w, target_R, vocab, 0.9), hidden_RH, weight_VH, *coefficients
    )  # autograd of the plain formula in float32
    for chunk_size in (1, 5, 36, 37, 1024):

        def ours(h: Tensor, w: Tensor, size: int = chunk_size) -> tuple[Tensor, Tensor]:
            return head_logprob(h, w, target_R, vocab_size=vocab, temperature=0.9, chunk_size=size)

        for actual, expected in zip(ours(hidden_RH, weight_VH), exact, strict=True):
            assert (actual.double() - expected).abs().max() < 1e-6
        for mine, expected in zip(gradients(ours, hidden_RH, weight_VH, *coefficients), reference, strict=True):
            assert_relative(mine, expected)


def test_padding_rows_get_no_probability_and_no_gradient() -> None:
    hidden_RH, weight_VH, target_R, *coefficients = inputs(6, 8, 12, 7)
    weight_VH[7:] = 1e4  # would take all the probability

    def ours(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return head_logprob(h, w, target_R, vocab_size=7)

    for padded, bare in zip(
        ours(hidden_RH, weight_VH), head_logprob(hidden_RH, weight_VH[:7], target_R, vocab_size=7), strict=True
    ):
        torch.testing.assert_close(padded, bare)
    grad_hidden, grad_weight = gradients(ours, hidden_RH, weight_VH, *coefficients)
    assert torch.isfinite(grad_hidden).all() and grad_weight[:7].abs().min() > 0
    assert torch.equal(grad_weight[7:], torch.zeros(5, 8))


def test_large_logits_do_not_overflow() -> None:
    # Logits 0 and 1000: p = 0 and 1 in float32, entropy 0; all finite, gradient 0 where nothing can move.
    weight_VH = torch.tensor([[0.0], [1000.0]])
    hidden_RH = torch.ones(2, 1, requires_grad=True)
    logprob_R, entropy_R = head_logprob(hidden_RH, weight_VH, torch.tensor([0, 1]), vocab_size=2)
    assert logprob_R.tolist() == [-1000.0, 0.0] and entropy_R.tolist() == [0.0, 0.0]
    (logprob_R.sum() + entropy_R.sum()).backward()
    assert hidden_RH.grad is not None and hidden_RH.grad.flatten().tolist() == [-1000.0, 0.0]


def test_zero_scored_positions() -> None:
    hidden_RH, weight_VH, target_R, *coefficients = inputs(0, 8, 12, 7)

    def ours(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return head_logprob(h, w, target_R, vocab_size=7)

    assert [tuple(values.shape) for values in ours(hidden_RH, weight_VH)] == [(0,), (0,)]
    grad_hidden, grad_weight = gradients(ours, hidden_RH, weight_VH, *coefficients)
    assert grad_hidden.shape == (0, 8) and torch.equal(grad_weight, torch.zeros(12, 8))


def test_bfloat16_inputs_give_float32_values_and_bfloat16_gradients() -> None:
    hidden_RH, weight_VH, target_R, *coefficients = inputs(9, 16, 40, 40, scale=0.2)
    low = (hidden_RH.bfloat16(), weight_VH.bfloat16())

    def ours(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return head_logprob(h, w, target_R, vocab_size=40)

    logprob_R, entropy_R = ours(*low)
    assert logprob_R.dtype == entropy_R.dtype == torch.float32
    exact = plain(low[0].double(), low[1].double(), target_R, 40, 1.0)
    torch.testing.assert_close(logprob_R.double(), exact[0], rtol=0, atol=2e-2)  # logits of about 1 are cut at 2^-8
    torch.testing.assert_close(entropy_R.double(), exact[1], rtol=0, atol=2e-2)
    reference = gradients(lambda h, w: plain(h, w, target_R, 40, 1.0), low[0].float(), low[1].float(), *coefficients)
    for mine, expected in zip(gradients(ours, *low, *coefficients), reference, strict=True):
        assert mine.dtype == torch.bfloat16
        assert_relative(mine.float(), expected, 3e-2)


def test_bfloat16_gradients_do_not_suffer_from_large_logits() -> None:
    """Logits up to 22, which bfloat16 cuts to +-0.06: values as float32 has them, gradients as bfloat16 has them."""
    hidden_RH, weight_VH, _, *coefficients = inputs(64, 256, 3000, 3000)
    low = (hidden_RH.bfloat16(), (0.28 * weight_VH).bfloat16())
    p_RV = torch.softmax(low[0].float() @ low[1].float().T, dim=-1)
    target_R = torch.multinomial(p_RV, 1, generator=torch.Generator().manual_seed(0)).squeeze(1)

    def ours(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return head_logprob(h, w, target_R, vocab_size=3000, temperature=0.9, chunk_size=32)

    exact = plain(low[0].double(), low[1].double(), target_R, 3000, 0.9)
    for actual, expected in zip(ours(*low), exact, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-5)
    reference = gradients(
        lambda h, w: plain(h, w, target_R, 3000, 0.9),
        low[0].double(),
        low[1].double(),
        *(c.double() for c in coefficients),
    )
    for mine, expected in zip(gradients(ours, *low, *coefficients), reference, strict=True):
        error = (mine.double() - expected).norm() / expected.norm()
        assert error < 5e-3, error  # bfloat16's unit roundoff is 2^-8 = 3.9e-3; logits cut to bfloat16 give 1.5e-2
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"  # as it was


def test_many_tiles_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # 1024 x 128 x 4 bytes: tiles of 128 columns, of which 1000 tokens fill 7 and the last in part.
    hidden_RH, weight_VH, target_R, *coefficients = inputs(37, 16, 1024, 1000)

    def ours(h: Tensor, w: Tensor, size: int = 5) -> tuple[Tensor, Tensor]:
        return head_logprob(h, w, target_R, vocab_size=1000, chunk_size=size)

    whole = [*ours(hidden_RH, weight_VH, 64), *gradients(ours, hidden_RH, weight_VH, *coefficients)]
    monkeypatch.setattr(logprob, "_TILE_BYTES_CPU", 1024 * 128 * 4)
    parts = [*ours(hidden_RH, weight_VH), *gradients(ours, hidden_RH, weight_VH, *coefficients)]
    for mine, expected in zip(parts, whole, strict=True):
        assert_relative(mine, expected)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
@pytest.mark.parametrize("what", ["logprob", "entropy"])
def test_gradient_when_one_input_is_frozen(frozen: str, what: str) -> None:
    hidden_RH, weight_VH, target_R, coefficient, _ = inputs(5, 8, 12, 10)
    found = []
    for score in (lambda h, w: head_logprob(h, w, target_R, vocab_size=10), None):
        hidden = hidden_RH.clone().requires_grad_(frozen != "hidden")
        weight = weight_VH.clone().requires_grad_(frozen != "weight")
        values = score(hidden, weight) if score else plain(hidden, weight, target_R, 10, 1.0)
        (coefficient * values[what == "entropy"]).sum().backward()
        found.append(hidden.grad if frozen == "weight" else weight.grad)
    assert_relative(*found)


def plain_kl(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, vocab: int, temp: float) -> Tensor:
    return full_kl(
        torch.log_softmax(hidden @ weight[:vocab].T / temp, dim=-1),
        torch.log_softmax(ref_hidden @ ref_weight[:vocab].T / temp, dim=-1),
    )


def test_full_kl_by_hand() -> None:
    # p = 1/8, 2/8, 5/8 against the uniform q: sum p ln p - ln(1/3); at temperature 1/2 p = 1/30, 4/30, 25/30.
    weight_VH = torch.tensor([[0.0], [math.log(2)], [math.log(5)]])
    for temperature, p in ((1.0, (1 / 8, 2 / 8, 5 / 8)), (0.5, (1 / 30, 4 / 30, 25 / 30))):
        found = head_full_kl(
            torch.ones(1, 1), weight_VH, torch.zeros(1, 2), torch.ones(3, 2), vocab_size=3, temperature=temperature
        )
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(sum(x * math.log(x) for x in p) + math.log(3), abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 1.3])
@pytest.mark.parametrize("tile_bytes", [1024 * 128 * 4, 8 << 20])
def test_full_kl_and_its_gradients(temperature: float, tile_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprob, "_TILE_BYTES_CPU", tile_bytes)
    hidden_RH, weight_VH, _, coefficient_R, _ = inputs(37, 16, 512, 500, scale=0.5)
    ref_hidden_RH, ref_weight_VH, *_ = inputs(37, 24, 512, 500, seed=1, scale=0.5)
    weight_VH[500:] = ref_weight_VH[500:] = 1e4  # padding, which would take all the probability
    leaves = [x.clone().requires_grad_() for x in (hidden_RH, weight_VH, ref_hidden_RH, ref_weight_VH)]
    kl_R = head_full_kl(*leaves, vocab_size=500, temperature=temperature, chunk_size=10)
    (coefficient_R * kl_R).sum().backward()
    double = [x.double().requires_grad_() for x in (hidden_RH, weight_VH)]
    log_p_RV, log_q_RV = (
        torch.log_softmax(h @ w[:500].T / temperature, dim=-1)
        for h, w in (double, (ref_hidden_RH.double(), ref_weight_VH.double()))
    )
    expected_R = (log_p_RV.exp() * (log_p_RV - log_q_RV)).sum(dim=-1)
    torch.testing.assert_close(kl_R.double(), expected_R, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        kl_R, plain_kl(hidden_RH, weight_VH, ref_hidden_RH, ref_weight_VH, 500, temperature), rtol=1e-5, atol=1e-5
    )
    (coefficient_R.double() * expected_R).sum().backward()
    for mine, reference in zip(leaves[:2], double, strict=True):
        assert_relative(mine.grad.double(), reference.grad)
    assert not leaves[1].grad[500:].any() and leaves[2].grad is None and leaves[3].grad is None


def test_full_kl_of_the_reference_itself_is_zero() -> None:
    hidden_RH, weight_VH, *_ = inputs(5, 16, 40, 33)
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight = (x.to(dtype).clone().requires_grad_() for x in (hidden_RH, weight_VH))
        kl_R = head_full_kl(hidden, weight, hidden.detach(), weight.detach(), vocab_size=33, chunk_size=2)
        assert kl_R.tolist() == [0.0] * 5
        kl_R.sum().backward()
        assert not hidden.grad.any() and not weight.grad.any() and hidden.grad.dtype == dtype
    assert head_full_kl(hidden[:0], weight, hidden[:0], weight, vocab_size=33).shape == (0,)


def worker(payload: tuple[Inputs, int, float, int]) -> list[Tensor]:
    """One rank: its rows of the head; its logprobs, entropies, part of the hidden gradient, weight gradient; then the
    KL to a reference with half the hidden states and the head upside down, and its gradients."""
    import torch.distributed as dist

    (hidden_RH, weight_VH, target_R, *coefficients), vocab, temperature, chunk_size = payload
    dist.init_process_group("gloo")
    mine = weight_VH.chunk(dist.get_world_size())[dist.get_rank()].contiguous()

    def ours(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return head_logprob(
            h, w, target_R, vocab_size=vocab, temperature=temperature, chunk_size=chunk_size, group=dist.group.WORLD
        )

    results = [*ours(hidden_RH, mine), *gradients(ours, hidden_RH, mine, *coefficients)]
    ref_mine = weight_VH.flip(1).chunk(dist.get_world_size())[dist.get_rank()].contiguous()
    leaves = [hidden_RH.clone().requires_grad_(), mine.clone().requires_grad_()]
    kl_R = head_full_kl(
        *leaves,
        hidden_RH / 2,
        ref_mine,
        vocab_size=vocab,
        temperature=temperature,
        chunk_size=chunk_size,
        group=dist.group.WORLD,
    )
    results += [kl_R.detach(), *torch.autograd.grad((coefficients[0] * kl_R).sum(), leaves)]
    dist.barrier()
    return results


def two_rank_worker(payloads: list) -> list[list[Tensor]]:
    """All cases in one start of the ranks."""
    import torch.distributed as dist

    results = []
    for payload in payloads:
        results.append(worker(payload))
        dist.destroy_process_group()
    return results


def test_vocabulary_cut_over_two_ranks() -> None:
    # 256 rows: 211 tokens leave rank 1 with 83 real rows, 100 tokens leave it with padding only; and no position.
    cases = [(inputs(11, 16, 256, vocab, seed=vocab), vocab) for vocab in (211, 100)]
    cases.append((inputs(0, 16, 256, 211), 211))
    ranks = run_ranks(
        "tests.algorithm.test_logprob:two_rank_worker",
        2,
        [(case, vocab, 1.3, 4) for case, vocab in cases],
        timeout_s=60,
    )
    for i, ((hidden_RH, weight_VH, target_R, *coefficients), vocab) in enumerate(cases):

        def uncut(h: Tensor, w: Tensor, target=target_R, size=vocab) -> tuple[Tensor, Tensor]:
            return head_logprob(h, w, target, vocab_size=size, temperature=1.3, chunk_size=4)

        logprob_R, entropy_R = uncut(hidden_RH, weight_VH)
        grad_hidden, grad_weight = gradients(uncut, hidden_RH, weight_VH, *coefficients)
        first, second = ranks[0][i], ranks[1][i]
        for rank in (first, second):
            torch.testing.assert_close(rank[0], logprob_R, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(rank[1], entropy_R, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(first[2] + second[2], grad_hidden, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.cat([first[3], second[3]]), grad_weight, rtol=1e-5, atol=1e-5)
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])  # bitwise, as ranks must agree
        leaves = [hidden_RH.clone().requires_grad_(), weight_VH.clone().requires_grad_()]
        kl_R = plain_kl(*leaves, hidden_RH / 2, weight_VH.flip(1), vocab, 1.3)
        grad_hidden, grad_weight = torch.autograd.grad((coefficients[0] * kl_R).sum(), leaves)
        torch.testing.assert_close(first[4], kl_R.detach(), rtol=1e-5, atol=1e-5)
        assert torch.equal(first[4], second[4])
        torch.testing.assert_close(first[5] + second[5], grad_hidden, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.cat([first[6], second[6]]), grad_weight, rtol=1e-5, atol=1e-5)
