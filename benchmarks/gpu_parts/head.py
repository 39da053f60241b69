"""Our head against Megatron-Core's vocabulary-parallel cross entropy on full logits: memory, time, values, gradients.

One rank. Ours returns log-probabilities and entropies and takes the gradient of both; the peer makes logits in the
model's dtype, as Megatron does, and returns log-probabilities alone. Memory is what a forward and backward pass takes
above its inputs; time is the median of calls. `error` is that of log-probabilities against float64, on some positions.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from logprob import peak_bytes

from gpu_parts.part import Numbers, Part
from remax_megatron.algorithm.logprob import head_logprob

SIZES = {"hidden 1536": (16384, 1536, 152064), "hidden 3584": (16384, 3584, 152064)}  # tokens, hidden, vocabulary
TINY_SIZES = {"tiny": (1024, 64, 8192)}
REPEATS, CHECKED = 5, 64
Score = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]


def run(part: Part) -> None:
    part.layout()
    for name, sizes in (TINY_SIZES if part.tiny else SIZES).items():
        for who, score in {"ours": _ours, "megatron": _megatron}.items():
            part.case(f"{name} {who}", lambda score=score, sizes=sizes: _measure(part, score, *sizes))


def _ours(hidden_RH, weight_VH, target_R):
    return head_logprob(hidden_RH, weight_VH, target_R, vocab_size=weight_VH.shape[0])


def _megatron(hidden_RH, weight_VH, target_R):
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    logits_R1V = hidden_RH.unsqueeze(1) @ weight_VH.T
    return -vocab_parallel_cross_entropy(logits_R1V, target_R.unsqueeze(1)).squeeze(1), None


def _measure(part: Part, score: Score, tokens: int, hidden: int, vocab: int) -> Numbers:
    torch.manual_seed(0)
    device = part.layout().device
    hidden_RH = torch.randn(tokens, hidden, device=device).bfloat16().requires_grad_()
    weight_VH = (torch.randn(vocab, hidden, device=device) * 0.1).bfloat16().requires_grad_()
    target_R = torch.randint(0, vocab, (tokens,), device=device)
    factor_R = torch.randn(tokens, device=device) / tokens

    def call() -> torch.Tensor:
        hidden_RH.grad = weight_VH.grad = None
        logprob_R, entropy_R = score(hidden_RH, weight_VH, target_R)
        loss = (factor_R * logprob_R).sum()
        (loss if entropy_R is None else loss - 0.01 * entropy_R.mean()).backward()
        return logprob_R.detach()

    call()
    hidden_RH.grad = weight_VH.grad = None
    if part.device == "cuda":
        before = torch.cuda.memory_allocated()
        part.reset_peak()
        logprob_R = call()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        peak = peak_bytes(call)
        logprob_R = call()
    seconds = statistics.median(part.seconds(call) for _ in range(1 if part.tiny else REPEATS))
    logits = hidden_RH[:CHECKED].detach().double() @ weight_VH.detach().double().T
    exact = logits.log_softmax(-1).gather(1, target_R[:CHECKED, None]).squeeze(1)
    error = (logprob_R[:CHECKED].double() - exact).abs().max().item()
    return {"peak_gib": peak / 2**30, "seconds": seconds, "error": error}
