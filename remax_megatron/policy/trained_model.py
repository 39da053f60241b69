"""A packed model in training: Megatron's DDP around it, its optimizer and learning rate, offloads, one optimizer step.

What is minimised is the subclass's: it gives the `Terms` of each micro-batch, and its objective makes metrics of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

from remax_megatron.algorithm.objective import MISMATCH, Terms
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
from remax_megatron.policy.packed_model import PackedModel, S
from remax_megatron.policy.settings import PolicySettings
from remax_megatron.types import Row


class TokenObjective(Protocol):
    """What a model is trained for: the names of the sums and maxima in its `Terms`, and the metrics made of them."""

    @property
    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The names of all sums, "loss" among them, and of all maxima, in order."""

    def metrics(self, sums: Mapping[str, float], maxima: Mapping[str, float], num_tokens: int) -> dict[str, float]:
        """The metrics of an update with `num_tokens` response tokens."""


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
        """The mean of |engine - policy| before the step, in nats; of the policy's updates."""
        return self.metrics[MISMATCH]


class TrainedModel(PackedModel[S]):
    """`PackedModel` under Megatron's DDP, with an optimizer."""

    def __init__(
        self,
        facts: ModelFacts,
        layout: Layout,
        settings: PolicySettings,
        model_folder: str,
        timer: PhaseTimer | None = None,
        *,
        prefix: str = "",
    ):
        """`timer` gets the phases of offloads; the other arguments are those of `PackedModel`."""
        super().__init__(facts, layout, settings, model_folder, prefix=prefix)
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

    def _train(
        self,
        rows: Sequence[Row],
        schedule: Schedule,
        objective: TokenObjective,
        terms: Callable[[PackedBatch, S], Terms],
        mismatch_limit: float | None = None,
        around: AbstractContextManager[None] | None = None,
    ) -> UpdateResult:
        """One optimizer step on `rows`, or, where it is forbidden, none. Collective.

        rows            with their weights
        schedule        of their micro-batches
        objective       names what `terms` add up to
        terms           of a micro-batch, on the last stage
        mismatch_limit  on the objective's metric MISMATCH, in nats, None: there is none
        around          is held while the micro-batches run
        """
        totals = _Totals(objective, self.layout.device)

        def loss(batch: PackedBatch, scored: S) -> Tensor:
            found = terms(batch, scored)
            if self.layout.reports_for_replica and found.finite_R.numel():
                totals.add(batch, found)
            return found.total

        self._restore_gradients()
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        learning_rate = self._set_hyperparameters()
        with around or nullcontext():
            self._run(rows, schedule, loss, forward_only=False)
        num_response_tokens = sum(len(row.response_ids) for row in rows)
        total, metrics = totals.metrics(num_response_tokens)
        grad_norm, skipped = self._step(total, metrics.get(MISMATCH, 0.0), mismatch_limit)
        num_computed = sum(self.num_computed_tokens(rows, batch) for rank in schedule for batch in rank)
        num_microbatches = len(schedule[0])
        return UpdateResult(
            loss=total,
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

    def _complete(self, chunk, parameters: Sequence[Tensor]) -> None:
        """Megatron waits for gathered weights before a module's forward pass; here for those that have none."""
        if self.overlap_param_gather:
            for parameter in parameters:
                if parameter in chunk.param_to_bucket_group:
                    chunk.param_to_bucket_group[parameter].finish_param_sync()

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

    def weights_of(self, parameter: torch.nn.Parameter) -> Tensor:
        """The elements of a parameter, flat, where they are now."""
        return parameter.detach().view(-1)

    def weight_stream(self, dtype: torch.dtype, bucket_bytes: int) -> WeightStream:
        """The weights as Hugging Face tensors of `dtype`; see `WeightStream`."""
        return WeightStream(self.bare_chunks, self.facts, self.layout, dtype, bucket_bytes, self.gather_weights)


class _Totals:
    """What an update's micro-batches add up to: sums, maxima, and which tokens have a loss that is finite."""

    def __init__(self, objective: TokenObjective, device: torch.device):
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
        if terms.maxima:
            maxima = torch.stack(list(terms.maxima.values())).nan_to_num_(nan=torch.inf, posinf=torch.inf)
            torch.maximum(self._maxima, maxima, out=self._maxima)

    def metrics(self, num_tokens: int) -> tuple[float, dict[str, float]]:
        """The loss, and the objective's metrics, over all ranks' micro-batches, which have `num_tokens` tokens. Every
        rank calls."""
        dist.all_reduce(self._sums)
        dist.all_reduce(self._maxima, op=dist.ReduceOp.MAX)
        values = torch.cat([self._sums, self._maxima]).tolist()  # the host waits for the device once
        of_sums, of_maxima = self._objective.names
        sums = dict(zip(of_sums, values[: len(of_sums)], strict=True))
        maxima = dict(zip(of_maxima, values[len(of_sums) :], strict=True))
        return sums["loss"], self._objective.metrics(sums, maxima, num_tokens)

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
