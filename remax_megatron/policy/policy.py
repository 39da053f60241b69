"""The policy as the trainer sees it: score rows, take an update, hand out weights.

Everything collective is called by every rank of the run with the same rows; each data-parallel rank works on its
share of the micro-batches, and results come back on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

from remax_megatron.algorithm.logprob import head_full_kl
from remax_megatron.algorithm.objective import MISMATCH, Objective, Terms
from remax_megatron.batching.packed import PackedBatch
from remax_megatron.batching.schedule import Schedule
from remax_megatron.guards import Skip, skip_reason
from remax_megatron.model.layers import fuse_weight_gradients
from remax_megatron.model.live_weights import WeightStream
from remax_megatron.model_facts import ModelFacts
from remax_megatron.parallel import cpu_platform
from remax_megatron.parallel.layout import Layout
from remax_megatron.phases import PhaseTimer
from remax_megatron.policy import gradient_norm
from remax_megatron.policy.offload import HostOffload, optimizer_tensors
from remax_megatron.policy.packed_model import PackedModel, Scored
from remax_megatron.policy.reference import Reference
from remax_megatron.policy.settings import PolicySettings
from remax_megatron.types import Row


@dataclass(frozen=True)
class UpdateResult:
    """One optimizer step, or why it was not made: `skipped` is equal on all ranks; unless it is Skip.NONE, no weight,
    moment or counter has changed. `nonfinite_rows` are those with a loss that is not finite, by their place in the
    update. `metrics` are the objective's, over the response tokens that were trained on. `fill` is tokens / what the
    micro-batches could hold, 0 to 1. `num_computed_tokens` counts a shared prompt once, `num_tokens` with every answer.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    metrics: dict[str, float]
    num_tokens: int
    num_computed_tokens: int
    num_response_tokens: int
    num_microbatches: int
    fill: float
    skipped: Skip = Skip.NONE
    nonfinite_rows: list[int] = field(default_factory=list)

    @property
    def mismatch(self) -> float:
        """The mean of |engine - policy| before the step, in nats."""
        return self.metrics[MISMATCH]


class Policy(PackedModel):
    """The model in training: `PackedModel` under Megatron's DDP, an optimizer, and the settings of the update."""

    def __init__(
        self,
        facts: ModelFacts,
        layout: Layout,
        settings: PolicySettings,
        model_folder: str,
        timer: PhaseTimer | None = None,
    ):
        """`model_folder` is a Hugging Face folder or a Megatron checkpoint; `timer` gets the phases of offloads."""
        super().__init__(facts, layout, settings, model_folder)
        self._objective = settings.objective()
        self._learning_rate = settings.learning_rate()
        self._timer = timer or PhaseTimer()
        megatron = settings.actor.megatron
        overlap_reduce, overlap_gather = megatron.overlap_grad_reduce, megatron.overlap_param_gather
        if overlap_reduce is None:
            overlap_reduce = bool(overlap_gather) or (layout.device.type == "cuda" and layout.dp > 1)
        if overlap_gather is None:
            overlap_gather = overlap_reduce and layout.device.type == "cuda" and megatron.use_distributed_optimizer
        self.overlap_param_gather = overlap_gather
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=overlap_reduce,
            overlap_param_gather=self.overlap_param_gather,
            use_distributed_optimizer=megatron.use_distributed_optimizer,
            average_in_collective=False,
        )
        self.chunks = [
            DistributedDataParallel(config=self.config, ddp_config=ddp, module=chunk, disable_bucketing=i > 0)
            for i, chunk in enumerate(self.chunks)
        ]
        fuse_weight_gradients(self.chunks)
        # The loss is already divided by its global count: gradients are summed over ranks and nothing more.
        self.config.finalize_model_grads_func = lambda model, num_tokens=None, **kwargs: finalize_model_grads(
            model, None, **kwargs
        )
        self.config.grad_scale_func = None
        self.config.no_sync_func = (
            [chunk.no_sync for chunk in self.chunks] if len(self.chunks) > 1 else self.chunks[0].no_sync
        )
        if layout.device.type == "cuda":
            gradient_norm.use_on_gpu()
        self.optimizer = self._build_optimizer()
        self.optimizers = list(getattr(self.optimizer, "chained_optimizers", [self.optimizer]))
        self.num_updates = 0
        self._weights_are_gathered = True  # False where overlap_param_gather has left that to a forward pass
        self._offload = HostOffload()
        self._released = False

    def _build_optimizer(self):
        optim = self.actor.optim
        config = OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            min_lr=0.0,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.beta1,
            adam_beta2=optim.beta2,
            adam_eps=optim.eps,
            clip_grad=optim.clip_grad,
            bf16=self.dtype == torch.bfloat16,
            params_dtype=self.dtype,
            use_distributed_optimizer=self.actor.megatron.use_distributed_optimizer,
            overlap_param_gather=self.overlap_param_gather,
        )
        no_decay_on_vectors = get_standard_config_overrides(config)
        with cpu_platform.cuda_type_names():
            return get_megatron_optimizer(config, self.chunks, no_decay_on_vectors, use_gloo_process_groups=False)

    # -- updating --------------------------------------------------------------------------------------------------

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
        totals = _Totals(self._objective, self.layout.device)

        def loss(batch: PackedBatch, scored: Scored) -> Tensor:
            kl_R = self._full_kl(batch, scored, reference, states) if reference is not None and full else None
            terms = self._objective(batch, scored.logprob_R, scored.entropy_R, kl_R)
            if self.layout.reports_for_replica and scored.logprob_R.numel():
                totals.add(batch, terms)
            return terms.total

        self._restore_gradients()
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        learning_rate = self._set_hyperparameters()
        with reference.on_device() if reference is not None and full else nullcontext():
            self._run(rows, schedule, loss, forward_only=False)
        num_response_tokens = sum(len(row.response_ids) for row in rows)
        metrics = totals.metrics(num_response_tokens)
        grad_norm, skipped = self._step(metrics["actor/loss"], metrics[MISMATCH], mismatch_limit)
        num_computed = sum(self.num_computed_tokens(rows, batch) for rank in schedule for batch in rank)
        num_microbatches = len(schedule[0])
        return UpdateResult(
            loss=metrics["actor/loss"],
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            metrics=metrics,
            num_tokens=sum(row.num_tokens for row in rows),
            num_computed_tokens=num_computed,
            num_response_tokens=num_response_tokens,
            num_microbatches=num_microbatches,
            fill=num_computed / (num_microbatches * self.layout.dp * self._microbatch_capacity(rows)),
            skipped=skipped,
            nonfinite_rows=totals.nonfinite_rows() if skipped else [],
        )

    def _step(self, loss: float, mismatch: float, mismatch_limit: float | None) -> tuple[float, Skip]:
        """The optimizer step, unless it is forbidden; returns the gradient norm and what forbade it.

        The ranks agree on that: one that sees a reason where others see none stops them all. Master weights,
        moments and `num_updates` are those of steps that were made; gradients begin at 0 in every update.
        """
        if self._offload.is_away:
            with self._timer.phase("restore", queued=True):
                self._offload.restore()
        with cpu_platform.cuda_type_names():
            self.optimizer.prepare_grads()
            grad_norm = float(self.optimizer.get_grad_norm())
            reason = torch.tensor(skip_reason(loss, grad_norm, mismatch, mismatch_limit), device=self.layout.device)
            dist.all_reduce(reason, op=dist.ReduceOp.MAX)
            skipped = Skip(int(reason))
            if not skipped:
                self._clip_gradients(grad_norm)
                self.optimizer.step_with_ready_grads()
                self.num_updates += 1
                self._weights_are_gathered = not self.overlap_param_gather
        return grad_norm, skipped

    def _clip_gradients(self, grad_norm: float) -> None:
        """Scale the gradients to a norm of at most `clip_grad`, as Megatron's own `step` does, which would compute the
        norm a second time."""
        limit = self.actor.optim.clip_grad
        for optimizer in self.optimizers:
            if limit > 0 and (parameters := optimizer.get_parameters()):
                clip_grad_by_total_norm_fp32(parameters, max_norm=limit, total_norm=grad_norm)

    def _head(self, chunk) -> Tensor:
        """Megatron waits for gathered weights before a module's forward pass, which the output layer does not have."""
        head_VH = super()._head(chunk)
        if self.overlap_param_gather and head_VH in chunk.param_to_bucket_group:
            chunk.param_to_bucket_group[head_VH].finish_param_sync()
        return head_VH

    def gather_weights(self) -> None:
        """Complete the weights that an update with overlap_param_gather has left to the next forward pass. Collective.

        Whatever reads weights outside of a forward pass calls it first; without the overlap nothing is to do.
        """
        if not self._weights_are_gathered:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)
            self._weights_are_gathered = True

    def _microbatch_capacity(self, rows: Sequence[Row]) -> int:
        """Tokens that a micro-batch could hold: the budget, or with fixed rows that many of the longest one."""
        if self.actor.use_dynamic_bsz:
            return self.actor.ppo_max_token_len_per_gpu
        assert self.actor.ppo_micro_batch_size_per_gpu is not None
        return self.actor.ppo_micro_batch_size_per_gpu * max(row.num_tokens for row in rows)

    def _set_hyperparameters(self) -> float:
        """Set and return the learning rate of this step.

        Weight decay acts on matrices, not on norms and biases: Megatron's groups carry that as `wd_mult`, which only
        its own scheduler would apply.
        """
        learning_rate = self._learning_rate(self.num_updates)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
            group["weight_decay"] = self.actor.optim.weight_decay * group["wd_mult"]
        return learning_rate

    # -- memory ----------------------------------------------------------------------------------------------------

    def release_training_memory(self) -> None:
        """GPU only: give up what rollouts do not need, as far as grad_offload and optimizer_offload say so.

        Gradients are dropped, master weights and moments move to the CPU; the next update brings them back, the
        optimizer's state only for its step.
        """
        if self.layout.device.type != "cuda" or self._released:
            return
        self._released = True
        with self._timer.phase("offload"):
            if self.actor.megatron.grad_offload:
                for chunk in self.chunks:
                    chunk.offload_grad_buffers()
            if self.actor.megatron.optimizer_offload:
                self.offload_optimizer()

    def offload_optimizer(self) -> None:
        """Move master weights and moments to the host; the next update's step brings them back."""
        masters = self.dtype != torch.float32  # else they are the model's own weights
        adams = [optimizer.optimizer for optimizer in self.optimizers]
        self._offload.release([tensor for adam in adams for tensor in optimizer_tensors(adam, masters=masters)])

    def _restore_gradients(self) -> None:
        if self._released and self.actor.megatron.grad_offload:
            for chunk in self.chunks:
                chunk.restore_grad_buffers()
        self._released = False

    def optimizer_state(self, tensor: Tensor) -> Tensor:
        """A master weight or moment where it is now, on the device or on the host."""
        return self._offload.current(tensor)

    # -- weights ---------------------------------------------------------------------------------------------------

    def weight_stream(self, dtype: torch.dtype, bucket_bytes: int) -> WeightStream:
        """The weights as Hugging Face tensors of `dtype`; see `WeightStream`."""
        return WeightStream(self.bare_chunks, self.facts, self.layout, dtype, bucket_bytes, self.gather_weights)


class _Totals:
    """What an update's micro-batches add up to: sums, maxima, and which tokens have a loss that is finite."""

    def __init__(self, objective: Objective, device: torch.device):
        self._objective = objective
        self._sums, self._maxima = (
            torch.zeros(len(one), dtype=torch.float64, device=device) for one in objective.names
        )
        self._finite: list[tuple[PackedBatch, Tensor]] = []  # with [R] bool

    def add(self, batch: PackedBatch, terms: Terms) -> None:
        """Add a micro-batch; nothing is read back from the device."""
        self._finite.append((batch, terms.finite_R))
        self._sums.add_(torch.stack(list(terms.sums.values())))
        # A maximum with NaN may come out differently on every rank; infinity may not.
        maxima = torch.stack(list(terms.maxima.values())).nan_to_num_(nan=torch.inf, posinf=torch.inf)
        torch.maximum(self._maxima, maxima, out=self._maxima)

    def metrics(self, num_tokens: int) -> dict[str, float]:
        """The objective's metrics over all ranks' micro-batches; these have `num_tokens` tokens. Every rank calls."""
        dist.all_reduce(self._sums)
        dist.all_reduce(self._maxima, op=dist.ReduceOp.MAX)
        values = torch.cat([self._sums, self._maxima]).tolist()  # the host waits for the device once
        of_sums, of_maxima = self._objective.names
        sums, maxima = values[: len(of_sums)], values[len(of_sums) :]
        return self._objective.metrics(
            dict(zip(of_sums, sums, strict=True)), dict(zip(of_maxima, maxima, strict=True)), num_tokens
        )

    def nonfinite_rows(self) -> list[int]:
        """The rows of all ranks' micro-batches with a token whose loss is not finite, in order. Every rank calls."""
        mine = [
            row
            for batch, finite_R in self._finite
            for row, part in zip(batch.rows, finite_R.split(batch.response_lengths), strict=True)
            if not part.all()
        ]
        parts: list = [None] * dist.get_world_size()
        dist.all_gather_object(parts, mine)
        return sorted({row for part in parts for row in part})
