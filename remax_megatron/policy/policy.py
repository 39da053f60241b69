"""The policy as the trainer sees it: score rows, take an update, hand out weights.

Everything collective is called by every rank of the run with the same rows; each data-parallel rank works on its
share of the micro-batches, and results come back on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

from remax_megatron.algorithm.importance import SUMS as IMPORTANCE_SUMS
from remax_megatron.algorithm.importance import ImportanceStats, importance_weights
from remax_megatron.algorithm.kl import token_kl
from remax_megatron.algorithm.logprob import head_full_kl
from remax_megatron.algorithm.losses import Clip, clipped_policy_loss, reinforce_loss
from remax_megatron.batching.packed import PackedBatch
from remax_megatron.batching.schedule import Schedule
from remax_megatron.config.schema import Actor, RolloutCorrection
from remax_megatron.guards import MADE, VERDICTS, forbidden
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
from remax_megatron.types import NO_RECOMPUTE, Recompute, Row

# Sums over the tokens of an update, in the order they travel in; those of importance weights are over weights.
_SUMS = (
    "loss",
    "entropy",
    "num_clipped",
    "num_dual_clipped",
    "old_minus_new",
    "kl",
    "mismatch_abs",
    "mismatch_rollout_minus_policy",
    *(f"importance_{name}" for name in IMPORTANCE_SUMS),
)
_MAXIMA = ("mismatch_abs", "importance")


@dataclass(frozen=True)
class UpdateResult:
    """One optimizer step, or what forbade it: `skipped` is "" or one of guards.VERDICTS, equal on all ranks, and then
    no weight, moment or counter has changed; `nonfinite_rows` are those with a loss that is not finite, by their place
    in the update. Means are per response token that was trained on; `mismatch_*` compare the engine's
    logprobs with the policy's before the step (nats); `kl` is that of the loss, 0 without one; `fill` is tokens / what
    the micro-batches could hold, 0 to 1. `num_computed_tokens` counts a shared prompt once, `num_tokens` with every
    answer. `importance` holds the metrics of the importance weights, where there are any."""

    loss: float
    grad_norm: float
    learning_rate: float
    entropy: float
    clip_share: float
    dual_clip_share: float
    approx_kl: float
    kl: float
    mismatch_mean: float
    mismatch_signed_mean: float  # engine minus policy
    mismatch_max: float
    num_tokens: int
    num_computed_tokens: int
    num_response_tokens: int
    num_microbatches: int
    fill: float
    importance: dict[str, float] = field(default_factory=dict)
    skipped: str = MADE
    nonfinite_rows: list[int] = field(default_factory=list)


class Policy(PackedModel):
    """The model in training: `PackedModel` under Megatron's DDP, an optimizer, and the settings of the update."""

    def __init__(
        self,
        facts: ModelFacts,
        layout: Layout,
        actor: Actor,
        *,
        model_folder: str,
        temperature: float,
        recompute: Recompute = NO_RECOMPUTE,
        correction: RolloutCorrection | None = None,
        log: Callable[[str], None] = lambda line: None,
        timer: PhaseTimer | None = None,
    ):
        super().__init__(
            facts, layout, actor, model_folder=model_folder, temperature=temperature, recompute=recompute, log=log
        )
        self.correction = correction or RolloutCorrection()
        self._timer = timer or PhaseTimer()
        megatron = actor.megatron
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
        full = self.actor.use_kl_loss and self.actor.kl_loss_type == "full"
        states: list[Tensor] = []
        if full:
            assert reference is not None, "the full KL needs the reference policy"
            states = reference.hidden_states(rows, schedule)
        sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=self.layout.device)
        maxima = torch.zeros(len(_MAXIMA), dtype=torch.float64, device=self.layout.device)
        finite: list[tuple[list[int], list[int], Tensor]] = []  # rows, their lengths, is the token's loss finite [R]

        def loss(batch: PackedBatch, scored: Scored) -> Tensor:
            kl_R = self._full_kl(batch, scored, reference, states) if reference is not None and full else None
            total, finite_R, batch_sums, batch_maxima = self._loss(batch, scored.logprob_R, scored.entropy_R, kl_R)
            if self.layout.speaks_for_replica and scored.logprob_R.numel():
                finite.append((batch.rows, batch.response_lengths, finite_R))
                sums.add_(batch_sums)
                torch.maximum(maxima, batch_maxima, out=maxima)
            return total

        self._restore_gradients()
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        learning_rate = self._set_hyperparameters()
        with reference.on_device() if reference is not None and full else nullcontext():
            self._run(rows, schedule, loss, forward_only=False)
        dist.all_reduce(sums)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
        values = torch.cat([sums, maxima]).tolist()  # the host waits for the device once
        total = dict(zip(_SUMS, values[: len(_SUMS)], strict=True))
        maximum = dict(zip(_MAXIMA, values[len(_SUMS) :], strict=True))
        num_response_tokens = sum(len(row.response_ids) for row in rows)
        mean = {name: value / num_response_tokens for name, value in total.items()}
        grad_norm, skipped = self._step(total["loss"], mean["mismatch_abs"], mismatch_limit)
        num_computed = sum(self.num_computed_tokens(rows, batch) for rank in schedule for batch in rank)
        num_microbatches = len(schedule[0])
        weights = ImportanceStats(
            **{name: total[f"importance_{name}"] for name in IMPORTANCE_SUMS}, largest=maximum["importance"]
        )
        return UpdateResult(
            loss=total["loss"],
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            entropy=mean["entropy"],
            clip_share=mean["num_clipped"],
            dual_clip_share=mean["num_dual_clipped"],
            approx_kl=mean["old_minus_new"],
            kl=mean["kl"],
            mismatch_mean=mean["mismatch_abs"],
            mismatch_signed_mean=mean["mismatch_rollout_minus_policy"],
            mismatch_max=maximum["mismatch_abs"],
            num_tokens=sum(row.num_tokens for row in rows),
            num_computed_tokens=num_computed,
            num_response_tokens=num_response_tokens,
            num_microbatches=num_microbatches,
            fill=num_computed / (num_microbatches * self.layout.dp * self._microbatch_capacity(rows)),
            importance=weights.metrics(),
            skipped=skipped,
            nonfinite_rows=_rows_not_finite(finite) if skipped else [],
        )

    def _loss(
        self, batch: PackedBatch, logprob_R: Tensor, entropy_R: Tensor, full_kl_R: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(loss of the micro-batch with its gradient, which tokens' part of it is finite [R], sums in the order of
        _SUMS, maxima in that of _MAXIMA)."""
        actor, correction = self.actor, self.correction
        old_R = batch.old_logprob_R
        clip = Clip(
            low=actor.clip_ratio if actor.clip_ratio_low is None else actor.clip_ratio_low,
            high=actor.clip_ratio if actor.clip_ratio_high is None else actor.clip_ratio_high,
            dual=actor.clip_ratio_c,
        )
        tokens = clipped_policy_loss(logprob_R, old_R, batch.advantage_R, clip)
        loss_R = tokens.loss_R if actor.policy_loss == "ppo_clip" else reinforce_loss(logprob_R, batch.advantage_R)
        weight_sums = logprob_R.new_zeros(len(IMPORTANCE_SUMS), dtype=torch.float64)
        largest_weight = weight_sums[0]
        if correction.rollout_is is not None:
            before_R = logprob_R.detach() if old_R is None else old_R
            weight_R, weight_sums, largest_weight = importance_weights(
                before_R,
                batch.rollout_logprob_R,
                batch.response_lengths,
                level=correction.rollout_is,
                threshold=correction.rollout_is_threshold,
            )
            loss_R = loss_R * weight_R
        if actor.entropy_coeff:
            loss_R = loss_R - actor.entropy_coeff * entropy_R
        kl_R = torch.zeros_like(logprob_R)
        if actor.use_kl_loss and logprob_R.numel():
            if full_kl_R is not None:
                kl_R = full_kl_R
            else:
                assert batch.ref_logprob_R is not None, "a KL loss needs the reference's log-probabilities"
                kl_R = token_kl(logprob_R, batch.ref_logprob_R, actor.kl_loss_type)
            loss_R = loss_R + actor.kl_loss_coef * kl_R
        weighted_R = loss_R * batch.weight_R
        total = weighted_R.sum()
        mismatch_R = logprob_R.detach() - batch.rollout_logprob_R
        clips = actor.policy_loss == "ppo_clip"
        sums = [total, entropy_R.sum(), clips * tokens.clipped_R.sum(), clips * tokens.dual_clipped_R.sum()]
        sums += [tokens.old_minus_new_R.sum(), kl_R.sum(), mismatch_R.abs().sum(), -mismatch_R.sum()]
        of_tokens = torch.stack([value.detach().double() for value in sums])
        largest = torch.zeros(len(_MAXIMA), dtype=torch.float64, device=logprob_R.device)
        if logprob_R.numel():
            largest[0] = mismatch_R.abs().max()
            largest[1] = largest_weight
        # A maximum with NaN may come out differently on every rank; infinity may not.
        largest.nan_to_num_(nan=torch.inf, posinf=torch.inf)
        return total, weighted_R.detach().isfinite(), torch.cat([of_tokens, weight_sums]), largest

    def _step(self, loss: float, mismatch: float, mismatch_limit: float | None) -> tuple[float, str]:
        """The optimizer step, unless it is forbidden; returns the gradient norm and the verdict (guards.VERDICTS).

        The ranks agree on the verdict: one that sees a reason where others see none stops them all. Master weights,
        moments and `num_updates` are those of steps that were made; gradients begin at 0 in every update.
        """
        if self._offload.is_away:
            with self._timer.phase("restore", queued=True):
                self._offload.restore()
        with cpu_platform.cuda_type_names():
            self.optimizer.prepare_grads()
            grad_norm = float(self.optimizer.get_grad_norm())
            verdict = torch.tensor(
                VERDICTS.index(forbidden(loss, grad_norm, mismatch, mismatch_limit)), device=self.layout.device
            )
            dist.all_reduce(verdict, op=dist.ReduceOp.MAX)
            skipped = VERDICTS[int(verdict)]
            if skipped == MADE:
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
        """Set and return the learning rate of this step: linear warm-up over `lr_warmup_steps`, then constant.

        Weight decay acts on matrices, not on norms and biases: Megatron's groups carry that as `wd_mult`, which only
        its own scheduler would apply.
        """
        warmup = self.actor.optim.lr_warmup_steps
        factor = min(1.0, (self.num_updates + 1) / warmup) if warmup > 0 else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.actor.optim.lr * factor
            group["weight_decay"] = self.actor.optim.weight_decay * group["wd_mult"]
        return self.actor.optim.lr * factor

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


def _rows_not_finite(finite: Sequence[tuple[list[int], list[int], Tensor]]) -> list[int]:
    """The rows of all ranks' micro-batches that have a token whose loss is not finite, in order. Collective."""
    mine = [
        row
        for rows, lengths, finite_R in finite
        for row, part in zip(rows, finite_R.split(lengths), strict=True)
        if not part.all()
    ]
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return sorted({row for part in parts for row in part})
