"""The head of PPO's critic: one number per position, from the hidden states after the final norm."""

from __future__ import annotations

import torch
from megatron.core import tensor_parallel
from torch import Tensor


class ValueHead(torch.nn.Module):
    """weight [1, H] and bias [1], whole on every tensor-parallel rank of the last pipeline stage."""

    def __init__(self, hidden_size: int, dtype: torch.dtype):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, hidden_size, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.zeros(1, dtype=dtype))

    def forward(self, hidden_RH: Tensor) -> Tensor:
        """[R] float32; the product is made in float32, whatever the weights are."""
        return torch.nn.functional.linear(hidden_RH.float(), self.weight.float(), self.bias.float()).squeeze(-1)


def whole_sequence(hidden_T1H: Tensor, *, cut: bool, group: torch.distributed.ProcessGroup) -> Tensor:
    """The hidden states of all positions on every tensor-parallel rank, for a head that every rank computes whole.

    `cut` says that each rank has its part of the positions (sequence parallelism). Every rank then has the whole
    gradient, so that it is cut and not added up on the way back.
    """
    if not cut:
        return hidden_T1H
    return tensor_parallel.gather_from_sequence_parallel_region(
        hidden_T1H, tensor_parallel_output_grad=False, group=group
    )
