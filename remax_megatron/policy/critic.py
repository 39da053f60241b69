"""PPO's critic: a model like the policy, with a value for every response token in place of words.

The value of a token is that of the state before it, so it comes from the position that predicts the token. Everything
collective is called by every rank of the run with the same rows, as with the policy, whose layout it has.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from remax_megatron.algorithm.value_objective import ValueObjective
from remax_megatron.batching.packed import PackedBatch
from remax_megatron.model.value_head import whole_sequence
from remax_megatron.model_facts import ModelFacts
from remax_megatron.parallel.layout import Layout
from remax_megatron.phases import PhaseTimer
from remax_megatron.policy.offload import HostOffload, blocks_of
from remax_megatron.policy.packed_model import unwrapped
from remax_megatron.policy.settings import PolicySettings
from remax_megatron.policy.trained_model import TrainedModel, UpdateResult
from remax_megatron.types import Row


class Critic(TrainedModel[Tensor]):
    """The model in training that says what a state is worth. Between its updates its weights may be on the host."""

    def __init__(
        self,
        facts: ModelFacts,
        layout: Layout,
        settings: PolicySettings,
        model_folder: str,
        timer: PhaseTimer | None = None,
        *,
        cliprange: float,
        prefix: str = "",
    ):
        """`cliprange` is that of the value loss; the other arguments are those of `TrainedModel`."""
        super().__init__(facts, layout, settings, model_folder, timer, prefix=prefix)
        self._objective = ValueObjective(cliprange)
        self._blocks, self._place = blocks_of(self.chunks)
        self._weights_offload = HostOffload()

    def values(self, rows: Sequence[Row]) -> list[list[float]]:
        """The value of the state before every response token of `rows`, on every rank. Collective."""
        return self._per_token(rows, self.schedule(rows), lambda batch, value_R: value_R)

    def update(self, rows: Sequence[Row]) -> UpdateResult:
        """One optimizer step on `rows`, which have values, returns and weights. None is made where the loss or the
        gradient is not finite. Collective."""
        return self._train(rows, self.schedule(rows), self._objective, self._objective)

    def release_training_memory(self) -> None:
        """GPU only: give up what rollouts and the policy's update do not need, as far as the offloads say so."""
        super().release_training_memory()
        if (
            self.layout.device.type == "cuda"
            and self.actor.megatron.param_offload
            and not self._weights_offload.is_away
        ):
            with self._timer.phase("offload"):
                self.offload_weights()

    def offload_weights(self) -> None:
        """Move the weights to the host; the next pass brings them back. Collective."""
        self.gather_weights()
        self._weights_offload.release(self._blocks)

    def weights_of(self, parameter: torch.nn.Parameter) -> Tensor:
        """The elements of a parameter, flat, where they are now."""
        block, start = self._place[parameter]
        return self._weights_offload.current(self._blocks[block]).view(-1)[start : start + parameter.numel()]

    def gather_weights(self) -> None:
        """See `TrainedModel.gather_weights`; the weights come to the device for it. Collective."""
        if self._weights_offload.is_away:
            with self._timer.phase("restore", queued=True):
                self._weights_offload.restore()
        super().gather_weights()

    def _before_passes(self) -> None:
        if self._weights_offload.is_away:
            self.gather_weights()

    def _score(self, chunk, hidden_T1H: Tensor, batch: PackedBatch, temperature: float) -> Tensor:
        """[R] float32. A critic has no temperature."""
        hidden_T1H = whole_sequence(hidden_T1H, cut=self.sequence_parallel, group=self.layout.tp_group)
        head = unwrapped(chunk).output_layer
        self._complete(chunk, list(head.parameters()))
        return head(hidden_T1H.squeeze(1).index_select(0, batch.position_R))
