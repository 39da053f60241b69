"""A packed model that gives log-probabilities: what policy and reference have in common beyond `PackedModel`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core import tensor_parallel
from torch import Tensor

from remax_megatron.algorithm.logprob import head_logprob
from remax_megatron.batching.packed import PackedBatch
from remax_megatron.policy.packed_model import PackedModel, unwrapped
from remax_megatron.types import Row


@dataclass(frozen=True)
class Scored:
    """The scored positions of a micro-batch on the last stage: logprob_R and entropy_R [R] float32, and what they were
    computed from, the hidden states hidden_RH and this rank's rows of the head, head_VH."""

    logprob_R: Tensor
    entropy_R: Tensor
    hidden_RH: Tensor
    head_VH: Tensor


class LanguageModel(PackedModel[Scored]):
    """`PackedModel` whose head gives the probabilities of words."""

    def logprobs(self, rows: Sequence[Row], temperature: float | None = None) -> list[list[float]]:
        """log pi(token | before) of every response token of `rows`, in nats; None: at the sampling temperature.

        Collective: all ranks, same rows; the result is on every rank.
        """
        return self._per_token(rows, self.schedule(rows), lambda batch, scored: scored.logprob_R, temperature)

    def _head(self, chunk) -> Tensor:
        """This rank's rows of the head, ready to be computed with."""
        return unwrapped(chunk).head_weight()

    def _score(self, chunk, hidden_T1H: Tensor, batch: PackedBatch, temperature: float) -> Scored:
        group = self.layout.tp_group
        if self.sequence_parallel:
            hidden_T1H = tensor_parallel.gather_from_sequence_parallel_region(hidden_T1H, group=group)
        else:
            hidden_T1H = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_T1H, group=group)
        hidden_RH = hidden_T1H.squeeze(1).index_select(0, batch.position_R)
        head_VH = self._head(chunk)
        logprob_R, entropy_R = head_logprob(
            hidden_RH,
            head_VH,
            batch.target_R,
            vocab_size=self.facts.vocab_size,
            temperature=temperature,
            chunk_size=self.actor.megatron.logprob_chunk_size,
            group=group,
        )
        return Scored(logprob_R, entropy_R, hidden_RH, head_VH)
