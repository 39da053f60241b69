"""Log-probabilities and entropies of scored positions from hidden states, over a vocabulary cut between ranks.

The logits of a chunk of positions exist, in float32, only while that chunk is worked on, forward and again backward:
memory beyond inputs and gradients is chunk_size x V/TP, whatever the number of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _HeadLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_RH: Tensor,
        weight_VH: Tensor,
        target_R: Tensor,
        vocab_size: int,
        temperature: float,
        chunk_size: int,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        num = hidden_RH.shape[0]
        logprob_R = torch.empty(num, dtype=torch.float32, device=hidden_RH.device)
        entropy_R = torch.empty_like(logprob_R)
        log_z_R = torch.empty_like(logprob_R)
        first = _first_row(weight_VH, group)
        head = _float32_operand(weight_VH)
        for part in _chunks(num, chunk_size):
            logits = _logits(hidden_RH[part], head, first, vocab_size, temperature)
            peak = logits.amax(dim=-1)
            _all_reduce(peak, dist.ReduceOp.MAX, group)
            logits -= peak.unsqueeze(1)
            exp = logits.exp()
            mine, index = _own_targets(target_R[part], first, weight_VH.shape[0])
            target = torch.where(mine, logits.gather(1, index.unsqueeze(1)).squeeze(1), 0.0)
            # Padding columns hold -inf: they weigh nothing, and 0 * -inf must not become NaN.
            weighted = (exp * logits.masked_fill_(logits == -torch.inf, 0.0)).sum(dim=-1)
            sums = torch.stack([exp.sum(dim=-1), weighted, target])
            _all_reduce(sums, dist.ReduceOp.SUM, group)
            z, weighted, target = sums
            log_z_R[part] = peak + z.log()
            logprob_R[part] = target - z.log()
            entropy_R[part] = z.log() - weighted / z
        ctx.save_for_backward(hidden_RH, weight_VH, target_R, log_z_R, entropy_R)
        ctx.set_materialize_grads(False)
        ctx.settings = (vocab_size, temperature, chunk_size, group)
        return logprob_R, entropy_R

    @staticmethod
    def backward(ctx: Any, grad_logprob_R: Tensor | None, grad_entropy_R: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_RH, weight_VH, target_R, log_z_R, entropy_R = ctx.saved_tensors
        vocab_size, temperature, chunk_size, group = ctx.settings
        first = _first_row(weight_VH, group)
        head = _float32_operand(weight_VH)
        grad_hidden_RH = torch.empty_like(hidden_RH)
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
        for part in _chunks(hidden_RH.shape[0], chunk_size):
            logits = _logits(hidden_RH[part], head, first, vocab_size, temperature)
            log_p = logits - log_z_R[part].unsqueeze(1)
            p = log_p.exp()
            # d logprob / d logit_j = 1[j = target] - p_j;   d entropy / d logit_j = -p_j (log p_j + entropy)
            mine, index = _own_targets(target_R[part], first, weight_VH.shape[0])
            grad = torch.zeros_like(p)
            if grad_logprob_R is not None:
                grad -= p * grad_logprob_R[part].unsqueeze(1)
                grad.scatter_add_(1, index.unsqueeze(1), (mine * grad_logprob_R[part]).unsqueeze(1))
            if grad_entropy_R is not None:
                log_p = log_p.masked_fill_(log_p == -torch.inf, 0.0)
                grad -= p * (log_p + entropy_R[part].unsqueeze(1)) * grad_entropy_R[part].unsqueeze(1)
            grad = (grad / temperature).to(weight_VH.dtype)
            grad_hidden_RH[part] = grad @ weight_VH
            grad_weight_VH += grad.T @ hidden_RH[part]
        return grad_hidden_RH, grad_weight_VH.to(weight_VH.dtype), None, None, None, None, None


def head_logprob(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    target_R: Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    chunk_size: int = 1024,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """(log softmax(hidden @ weight.T / temperature)[target], entropy), each [R] float32, in nats.

    weight_VH holds this rank's rows of the head; rank r of `group` holds rows [r V, (r + 1) V). Rows at or beyond
    `vocab_size` are padding and get no probability. All ranks of `group` call with equal hidden_RH and target_R.
    The gradient of hidden_RH is this rank's part only: sum it over `group` (Megatron's copy-to-region does).
    """
    return _HeadLogProb.apply(hidden_RH, weight_VH, target_R, vocab_size, temperature, chunk_size, group)


def _float32_operand(weight_VH: Tensor) -> Tensor:
    """The head as `_logits` takes it: a GPU sums bfloat16 products in float32, a CPU needs float32 operands."""
    return weight_VH if weight_VH.is_cuda else weight_VH.float()


def _logits(hidden_RH: Tensor, weight_VH: Tensor, first: int, vocab_size: int, temperature: float) -> Tensor:
    if weight_VH.dtype == torch.float32:
        logits = hidden_RH.float() @ weight_VH.T
    else:
        logits = torch.mm(hidden_RH, weight_VH.T, out_dtype=torch.float32)
    if temperature != 1.0:
        logits.div_(temperature)
    if first + weight_VH.shape[0] > vocab_size:
        logits[:, max(vocab_size - first, 0) :] = -torch.inf
    return logits


def _own_targets(target: Tensor, first: int, rows: int) -> tuple[Tensor, Tensor]:
    mine = (target >= first) & (target < first + rows)
    return mine, torch.where(mine, target - first, 0)


def _first_row(weight_VH: Tensor, group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group) * weight_VH.shape[0]


def _chunks(num: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, num)) for i in range(0, num, size)]


def _all_reduce(tensor: Tensor, op: Any, group: dist.ProcessGroup | None) -> None:
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, op=op, group=group)
