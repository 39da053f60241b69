"""Values and gradients of the head in float32 on a CPU, bit for bit, against the same sums written without writes in
place: the order in which tiles are visited and numbers are added is part of what a resumed run relies on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from remax_megatron.algorithm import logprob
from remax_megatron.algorithm.logprob import head_full_kl, head_logprob
from tests.algorithm.test_logprob import inputs

# Tiles of 5 positions and 128 tokens: 37 positions end in a tile of 2, 1000 tokens in one of 104, of 1024 rows.
NUM, HIDDEN, ROWS, VOCAB, HEIGHT, WIDTH = 37, 48, 1024, 1000, 5, 128
LOWEST = torch.finfo(torch.float32).min
POSITIONS = [slice(i, min(i + HEIGHT, NUM)) for i in range(0, NUM, HEIGHT)]
TOKENS = [slice(i, min(i + WIDTH, VOCAB)) for i in range(0, VOCAB, WIDTH)]


def tile(hidden: Tensor, weight: Tensor, rows: slice, tokens: slice, temperature: float) -> Tensor:
    logits = hidden[rows] @ weight[tokens].T
    return logits if temperature == 1.0 else logits / temperature


def gradients(grad_of, hidden: Tensor, weight: Tensor) -> list[Tensor]:
    """Those of hidden states and head, from the gradient of the logits of each tile, which `grad_of` gives."""
    grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
    for tokens in TOKENS:
        for rows in POSITIONS:
            grad = grad_of(rows, tokens)
            grad_hidden[rows] = grad_hidden[rows] + grad @ weight[tokens]
            grad_weight[tokens] = grad_weight[tokens] + grad.T @ hidden[rows]
    return [grad_hidden, grad_weight]


def expected_logprob(hidden, weight, target, grad_logprob, grad_entropy, temperature) -> list[Tensor]:
    """Log-probabilities, entropies, and the gradients of their sums weighted by `grad_logprob` and `grad_entropy`."""
    peak, z, weighted, picked = torch.full((NUM,), LOWEST), *torch.zeros(3, NUM)
    for tokens in TOKENS:
        for rows in POSITIONS:
            logits = tile(hidden, weight, rows, tokens, temperature)
            for i, token in enumerate(target[rows].tolist()):
                if tokens.start <= token < tokens.stop:
                    picked[rows.start + i] = logits[i, token - tokens.start]
            higher = torch.maximum(peak[rows], logits.amax(dim=-1))
            fall = peak[rows] - higher
            z[rows] = z[rows] * fall.exp()
            weighted[rows] = weighted[rows] * fall.exp() + fall * z[rows]
            below = logits - higher.unsqueeze(1)
            z[rows] = z[rows] + below.exp().sum(dim=-1)
            weighted[rows] = weighted[rows] + (below * below.exp()).sum(dim=-1)
            peak[rows] = higher
    entropy = z.log() - weighted / z
    log_z, hit, slope = peak + z.log(), grad_logprob / temperature, -grad_entropy / temperature

    def grad_of(rows: slice, tokens: slice) -> Tensor:
        log_p = tile(hidden, weight, rows, tokens, temperature) - log_z[rows].unsqueeze(1)
        offset = slope[rows] * entropy[rows] - hit[rows]
        grad = log_p.exp() * (log_p * slope[rows].unsqueeze(1) + offset.unsqueeze(1))
        for i, token in enumerate(target[rows].tolist()):
            if tokens.start <= token < tokens.stop:
                grad[i, token - tokens.start] += hit[rows][i]
        return grad

    return [picked - peak - z.log(), entropy, *gradients(grad_of, hidden, weight)]


def expected_kl(hidden, weight, ref_hidden, ref_weight, grad_kl, temperature) -> list[Tensor]:
    """The KL at each position, and the gradients of its sum weighted by `grad_kl`."""
    peak, z, weighted = torch.full((2, NUM), LOWEST), torch.zeros(2, NUM), torch.zeros(NUM)

    def two_tiles(rows: slice, tokens: slice) -> tuple[Tensor, Tensor]:
        return (
            tile(hidden, weight, rows, tokens, temperature),
            tile(ref_hidden, ref_weight, rows, tokens, temperature),
        )

    for tokens in TOKENS:
        for rows in POSITIONS:
            both = two_tiles(rows, tokens)
            higher = torch.maximum(peak[:, rows], torch.stack([logits.amax(dim=-1) for logits in both]))
            fall = (peak[:, rows] - higher).exp()
            exps = [(logits - high.unsqueeze(1)).exp() for logits, high in zip(both, higher, strict=True)]
            z[:, rows] = z[:, rows] * fall + torch.stack([exp.sum(dim=-1) for exp in exps])
            weighted[rows] = weighted[rows] * fall[0] + ((both[0] - both[1]) * exps[0]).sum(dim=-1)
            peak[:, rows] = higher
    kl = weighted / z[0] + (peak[1] - peak[0]) + (z[1].log() - z[0].log())
    log_z = peak + z.log()

    def grad_of(rows: slice, tokens: slice) -> Tensor:
        logits, ref_logits = two_tiles(rows, tokens)
        factor = (logits - ref_logits) + (log_z[1] - log_z[0] - kl)[rows].unsqueeze(1)
        p = (logits - log_z[0, rows].unsqueeze(1)).exp()
        return p * factor * (grad_kl[rows] / temperature).unsqueeze(1)

    return [kl, *gradients(grad_of, hidden, weight)]


@pytest.mark.parametrize("temperature", [1.0, 0.9])
def test_bits(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprob, "_TILE_BYTES_CPU", 1024 * WIDTH * 4)
    hidden_RH, weight_VH, target_R, *coefficients = inputs(NUM, HIDDEN, ROWS, VOCAB)
    ref_hidden_RH, ref_weight_VH, *_ = inputs(NUM, HIDDEN // 2, ROWS, VOCAB, seed=1)
    leaves = [hidden_RH.clone().requires_grad_(), weight_VH.clone().requires_grad_()]
    options = {"vocab_size": VOCAB, "temperature": temperature, "chunk_size": HEIGHT}

    values = head_logprob(*leaves, target_R, **options)
    kl_R = head_full_kl(*leaves, ref_hidden_RH, ref_weight_VH, **options)
    found = [*values, *torch.autograd.grad(values, leaves, coefficients)]
    found += [kl_R, *torch.autograd.grad(kl_R, leaves, coefficients[0])]
    expected = expected_logprob(hidden_RH, weight_VH, target_R, *coefficients, temperature)
    expected += expected_kl(hidden_RH, weight_VH, ref_hidden_RH, ref_weight_VH, coefficients[0], temperature)
    for name, mine, reference in zip(
        ("logprob", "entropy", "d hidden", "d head", "KL", "d KL / d hidden", "d KL / d head"),
        found,
        expected,
        strict=True,
    ):
        assert torch.equal(mine, reference), f"{name}: {(mine - reference).abs().max()}"
