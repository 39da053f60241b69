"""The policy as the trainer sees it: score rows, take an update, hand out weights.

Everything collective is called by every rank of the run with the same rows; each data-parallel rank works on its
share of the micro-batches, and results come back on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from remax_megatron.algorithm.logprob import head_full_kl
from remax_megatron.algorithm.objective import Terms
from remax_megatron.batching.packed import PackedBatch
from remax_megatron.batching.schedule import Schedule
from remax_megatron.model_facts import ModelFacts
from remax_megatron.parallel.layout import Layout
from remax_megatron.phases import PhaseTimer
from remax_megatron.policy.language_model import LanguageModel, Scored
from remax_megatron.policy.reference import Reference
from remax_megatron.policy.settings import PolicySettings
from remax_megatron.policy.trained_model import TrainedModel, UpdateResult
from remax_megatron.types import Row


class Policy(TrainedModel[Scored], LanguageModel):
    """The model in training that writes the answers, and the settings of its update."""

    def __init__(
        self,
        facts: ModelFacts,
        layout: Layout,
        settings: PolicySettings,
        model_folder: str,
        timer: PhaseTimer | None = None,
    ):
        """The arguments are those of `TrainedModel`."""
        super().__init__(facts, layout, settings, model_folder, timer)
        self._objective = settings.objective()

    def full_kl(self, rows: Sequence[Row], reference: Reference) -> list[list[float]]:
        """KL(policy || reference) over the whole vocabulary at every response token of `rows`, in nats. Collective."""
        schedule = self.schedule(rows)
        states = reference.hidden_states(rows, schedule)
        with reference.on_device():
            return self._per_token(
                rows, schedule, lambda batch, scored: self._full_kl(batch, scored, reference, states)
            )

    def _full_kl(self, batch: PackedBatch, scored: Scored, reference: Reference, states: list[Tensor]) -> Tensor:
        return head_full_kl(
            scored.hidden_RH,
            scored.head_VH,
            states[batch.number],
            reference.head_VH,
            vocab_size=self.facts.vocab_size,
            temperature=self.temperature,
            chunk_size=self.actor.megatron.logprob_chunk_size,
            group=self.layout.tp_group,
        )

    def update(
        self,
        rows: Sequence[Row],
        schedule: Schedule | None = None,
        reference: Reference | None = None,
        mismatch_limit: float | None = None,
    ) -> UpdateResult:
        """One optimizer step on `rows`, whose `weight` the caller has set from the whole update (`weigh_rows`).

        No step is made, and the result says so, when the loss or the gradient is not finite, or when the mean of
        |engine - policy| (nats) is over `mismatch_limit`, to be given only while the policy's weights are those that
        wrote the answers. `reference` is needed where the loss has the full KL. Collective: all ranks, same rows, same
        `schedule` (None: `self.schedule(rows)`).
        """
        schedule = self.schedule(rows) if schedule is None else schedule
        full = self._objective.kl_kind == "full"
        states: list[Tensor] = []
        if full:
            assert reference is not None, "the full KL needs the reference policy"
            states = reference.hidden_states(rows, schedule)

        def terms(batch: PackedBatch, scored: Scored) -> Terms:
            kl_R = self._full_kl(batch, scored, reference, states) if reference is not None and full else None
            return self._objective(batch, scored.logprob_R, scored.entropy_R, kl_R)

        around = reference.on_device() if reference is not None and full else None
        return self._train(rows, schedule, self._objective, terms, mismatch_limit, around)

    def _head(self, chunk) -> Tensor:
        head_VH = super()._head(chunk)
        self._complete(chunk, [head_VH])
        return head_VH
