"""The reference policy: the model as it was before training, which a KL term compares with. It is never updated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from remax_megatron.batching.packed import PackedBatch
from remax_megatron.batching.schedule import Schedule
from remax_megatron.model_facts import ModelFacts
from remax_megatron.parallel.layout import Layout
from remax_megatron.policy.language_model import LanguageModel, Scored
from remax_megatron.policy.settings import PolicySettings
from remax_megatron.types import Row


class Reference(LanguageModel):
    """Frozen weights in the policy's layout and dtype; with `offload` on the CPU between uses (a GPU setting)."""

    def __init__(
        self,
        facts: ModelFacts,
        layout: Layout,
        settings: PolicySettings,
        model_folder: str,
        *,
        offload: bool = False,
    ):
        super().__init__(facts, layout, settings, model_folder)
        for chunk in self.chunks:
            chunk.requires_grad_(False)
        self._offload = offload and layout.device.type == "cuda"
        self._move("cpu")

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """The weights are where they can be computed with while the block runs. Not to be nested."""
        self._move(self.layout.device)
        try:
            yield
        finally:
            self._move("cpu")

    def logprobs(self, rows: Sequence[Row], temperature: float | None = None) -> list[list[float]]:
        """See `LanguageModel.logprobs`; the weights come to the device for it."""
        with self.on_device():
            return super().logprobs(rows, temperature)

    def hidden_states(self, rows: Sequence[Row], schedule: Schedule) -> list[Tensor]:
        """[R, H] of this rank's micro-batches in their order, on the last stage (elsewhere none). Collective.

        A whole distribution over the vocabulary is made from them where it is needed (`head_full_kl`).
        """
        states: list[Tensor] = []

        def keep(batch: PackedBatch, scored: Scored) -> Tensor:
            assert batch.number == len(states), "micro-batches come in order"
            states.append(scored.hidden_RH)
            return scored.logprob_R.sum()

        with self.on_device():
            self._run(rows, schedule, keep, forward_only=True)
        return states

    @property
    def head_VH(self) -> Tensor:
        """This rank's rows of the head; on the last stage."""
        return self.bare_chunks[-1].head_weight()

    def _move(self, device) -> None:
        if self._offload:
            for chunk in self.chunks:
                chunk.to(device)
            if device == "cpu":
                torch.cuda.empty_cache()  # vLLM maps its memory itself, and measures what is free when it starts
