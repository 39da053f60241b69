"""The policy as the trainer sees it: score rows, take an update, hand out weights.

Everything collective is called by every rank of the run with the same rows; each data-parallel rank works on its
share of the micro-batches, and results come back on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from remax_megatron.algorithm.logprob import head_logprob
from remax_megatron.algorithm.losses import Clip, LossScale, clipped_policy_loss
from remax_megatron.batching.packed import PackedBatch, pack
from remax_megatron.batching.schedule import Schedule, schedule_by_rows, schedule_by_tokens
from remax_megatron.config.model_facts import ModelFacts
from remax_megatron.config.schema import Actor
from remax_megatron.model.attention import choose_backend
from remax_megatron.model.qwen2 import build_chunks, transformer_config
from remax_megatron.model.weights import WeightStream, load_weights
from remax_megatron.parallel import cpu_platform
from remax_megatron.parallel.layout import Layout
from remax_megatron.types import Row

# Sums over the tokens of an update, in the order they travel in; "max_" entries are maxima instead.
_SUMS = (
    "loss",
    "entropy",
    "num_clipped",
    "num_dual_clipped",
    "old_minus_new",
    "mismatch_abs",
    "mismatch_rollout_minus_policy",
    "max_mismatch_abs",
)


@dataclass(frozen=True)
class UpdateResult:
    """One optimizer step. Means are per response token of the update; `mismatch_*` compare the engine's logprobs
    with the policy's before the step (nats); `fill` is tokens / what the micro-batches could hold, 0 to 1."""

    loss: float
    grad_norm: float
    learning_rate: float
    entropy: float
    clip_share: float
    dual_clip_share: float
    approx_kl: float
    mismatch_mean: float
    mismatch_signed_mean: float  # engine minus policy
    mismatch_max: float
    num_tokens: int
    num_response_tokens: int
    num_microbatches: int
    fill: float


class Policy:
    """A Qwen2 model under Megatron: `chunks` on this rank, an optimizer, and the settings of the update."""

    def __init__(
        self,
        facts: ModelFacts,
        layout: Layout,
        actor: Actor,
        *,
        model_folder: str,
        temperature: float,
        recompute: bool,
        log: Callable[[str], None] = lambda line: None,
    ):
        self.facts, self.layout, self.actor = facts, layout, actor
        self.temperature = temperature
        self.dtype = getattr(torch, actor.megatron.dtype)
        self.attention_backend = choose_backend(actor.megatron.attention_backend, layout.device, self.dtype)
        log(f"Attention backend: {self.attention_backend} on {layout.device.type}, {actor.megatron.dtype}")
        config = transformer_config(
            facts,
            layout,
            dtype=self.dtype,
            sequence_parallel=actor.megatron.sequence_parallel,
            recompute=recompute,
        )
        self.sequence_parallel = config.sequence_parallel
        bare = build_chunks(facts, config, layout, self.attention_backend)
        load_weights(bare, model_folder, facts, layout)
        self.bare_chunks = bare
        wrapped = [Float16Module(config, chunk) for chunk in bare] if self.dtype != torch.float32 else bare
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=False,
            use_distributed_optimizer=actor.megatron.use_distributed_optimizer,
            average_in_collective=False,
        )
        self.chunks = [
            DistributedDataParallel(config=config, ddp_config=ddp, module=chunk, disable_bucketing=i > 0)
            for i, chunk in enumerate(wrapped)
        ]
        # The loss is already divided by its global count: gradients are summed over ranks and nothing more.
        config.finalize_model_grads_func = lambda model, num_tokens=None, **kwargs: finalize_model_grads(
            model, None, **kwargs
        )
        config.grad_scale_func = None
        config.no_sync_func = (
            [chunk.no_sync for chunk in self.chunks] if len(self.chunks) > 1 else self.chunks[0].no_sync
        )
        self.optimizer = self._build_optimizer()
        self.num_updates = 0
        self._released = False
        self._forward_backward = get_forward_backward_func()

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
        )
        no_decay_on_vectors = get_standard_config_overrides(config)
        with cpu_platform.cuda_type_names():
            return get_megatron_optimizer(config, self.chunks, no_decay_on_vectors, use_gloo_process_groups=False)

    # -- scoring ---------------------------------------------------------------------------------------------------

    def logprobs(self, rows: Sequence[Row], temperature: float | None = None) -> list[list[float]]:
        """log pi(token | before) of every response token of `rows`, in nats; None: at the sampling temperature.

        Collective: all ranks, same rows; the result is on every rank.
        """
        schedule = self.schedule(rows)
        offsets, total = _offsets(rows)
        flat = torch.zeros(total, dtype=torch.float32, device=self.layout.device)

        def collect(batch: PackedBatch, logprob_R: Tensor, entropy_R: Tensor) -> tuple[Tensor, dict]:
            if self.layout.speaks_for_replica:
                start = 0
                for row in batch.rows:
                    size = len(rows[row].response_ids)
                    flat[offsets[row] : offsets[row] + size] = logprob_R[start : start + size]
                    start += size
            return logprob_R.sum(), {}

        with torch.no_grad():
            self._run(rows, schedule, collect, forward_only=True, temperature=temperature)
        dist.all_reduce(flat)
        values = flat.tolist()
        return [values[start : start + len(row.response_ids)] for row, start in zip(rows, offsets, strict=True)]

    # -- updating --------------------------------------------------------------------------------------------------

    def update(self, rows: Sequence[Row], schedule: Schedule | None = None) -> UpdateResult:
        """One optimizer step on `rows`: PPO-clip over their advantages, token mean over the whole update.

        Collective: all ranks, same rows, same `schedule` (None: `self.schedule(rows)`).
        """
        scale = LossScale.of(rows)
        schedule = self.schedule(rows) if schedule is None else schedule
        actor = self.actor
        clip = Clip(
            low=actor.clip_ratio if actor.clip_ratio_low is None else actor.clip_ratio_low,
            high=actor.clip_ratio if actor.clip_ratio_high is None else actor.clip_ratio_high,
            dual=actor.clip_ratio_c,
        )
        sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=self.layout.device)

        def loss(batch: PackedBatch, logprob_R: Tensor, entropy_R: Tensor) -> tuple[Tensor, dict]:
            policy = clipped_policy_loss(logprob_R, batch.old_logprob_R, batch.advantage_R, clip)
            total = policy.loss
            if actor.entropy_coeff:
                total = total - actor.entropy_coeff * entropy_R.sum()
            if self.layout.speaks_for_replica and logprob_R.numel():
                mismatch = logprob_R.detach() - batch.rollout_logprob_R
                values = (
                    total,
                    entropy_R.sum(),
                    policy.num_clipped,
                    policy.num_dual_clipped,
                    policy.sum_old_minus_new,
                    mismatch.abs().sum(),
                    -mismatch.sum(),
                )
                sums[:-1] += torch.stack([value.detach().double() for value in values])
                sums[-1] = torch.maximum(sums[-1], mismatch.abs().max().double())
            return scale(total), {}

        self._restore_training_memory()
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        learning_rate = self._set_hyperparameters()
        self._run(rows, schedule, loss, forward_only=False)
        maximum = sums[-1:].clone()
        dist.all_reduce(sums)
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX)
        grad_norm = self._step(loss=sums[0].item() / scale.num_tokens)
        mean = dict(zip(_SUMS, (sums / scale.num_tokens).tolist(), strict=True))
        num_tokens = sum(row.num_tokens for row in rows)
        num_microbatches = len(schedule[0])
        return UpdateResult(
            loss=mean["loss"],
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            entropy=mean["entropy"],
            clip_share=mean["num_clipped"],
            dual_clip_share=mean["num_dual_clipped"],
            approx_kl=mean["old_minus_new"],
            mismatch_mean=mean["mismatch_abs"],
            mismatch_signed_mean=mean["mismatch_rollout_minus_policy"],
            mismatch_max=maximum.item(),
            num_tokens=num_tokens,
            num_response_tokens=scale.num_tokens,
            num_microbatches=num_microbatches,
            fill=num_tokens / (num_microbatches * self.layout.dp * self._microbatch_capacity(rows)),
        )

    def _step(self, loss: float) -> float:
        """The optimizer step; returns the gradient norm. FloatingPointError, on every rank alike and with the weights
        untouched, when the loss or the gradient is not finite."""
        with cpu_platform.cuda_type_names():
            self.optimizer.prepare_grads()
            grad_norm = float(self.optimizer.get_grad_norm())
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                raise FloatingPointError(
                    f"update {self.num_updates + 1}: loss {loss}, gradient norm {grad_norm}; "
                    "the weights were not changed"
                )
            self.optimizer.step()
        self.num_updates += 1
        return grad_norm

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

        Gradients are dropped, master weights and moments move to the CPU; the next update brings them back.
        """
        if self.layout.device.type != "cuda" or self._released:
            return
        self._released = True
        if self.actor.megatron.grad_offload:
            for chunk in self.chunks:
                chunk.offload_grad_buffers()
        if self.actor.megatron.optimizer_offload:
            self.optimizer.offload_to_cpu()

    def _restore_training_memory(self) -> None:
        if not self._released:
            return
        self._released = False
        if self.actor.megatron.grad_offload:
            for chunk in self.chunks:
                chunk.restore_grad_buffers()
        if self.actor.megatron.optimizer_offload:
            self.optimizer.restore_from_cpu()

    # -- weights ---------------------------------------------------------------------------------------------------

    def weight_stream(self, dtype: torch.dtype, bucket_bytes: int) -> WeightStream:
        """The weights as Hugging Face tensors of `dtype`; see `WeightStream`."""
        return WeightStream(self.bare_chunks, self.facts, self.layout, dtype, bucket_bytes)

    # -- the pass over micro-batches ---------------------------------------------------------------------------------

    def schedule(self, rows: Sequence[Row]) -> Schedule:
        """Micro-batches of `rows` for every data-parallel rank; equal on all ranks."""
        layout, actor = self.layout, self.actor
        multiple = layout.pp if layout.vpp > 1 else 1
        if actor.use_dynamic_bsz:
            lengths = [row.num_tokens for row in rows]
            return schedule_by_tokens(lengths, layout.dp, actor.ppo_max_token_len_per_gpu, multiple)
        assert actor.ppo_micro_batch_size_per_gpu is not None
        return schedule_by_rows(len(rows), layout.dp, actor.ppo_micro_batch_size_per_gpu, multiple)

    def _run(
        self,
        rows: Sequence[Row],
        schedule: Schedule,
        loss: Callable[[PackedBatch, Tensor, Tensor], tuple[Tensor, dict]],
        *,
        forward_only: bool,
        temperature: float | None = None,
    ) -> None:
        """Megatron's forward (and backward) schedule over this rank's micro-batches; all ranks call."""
        mine = schedule[self.layout.dp_rank]
        pad_to = self.layout.tp if self.sequence_parallel else 1
        if self.layout.device.type == "cpu" and self.dtype == torch.bfloat16:
            # Each new matrix shape costs 50 to 70 ms of kernel generation in bfloat16 on CPU: keep them few.
            pad_to = math.lcm(64, pad_to)

        def batches() -> Iterator[PackedBatch]:
            limit = self.actor.ppo_max_token_len_per_gpu if self.actor.use_dynamic_bsz else None
            for indices in mine:
                yield pack(rows, indices, pad_to=pad_to, pad_limit=limit, device=self.layout.device)

        iterators = [batches() for _ in self.chunks]
        for chunk in self.chunks:
            chunk.train(not forward_only)
        with torch.no_grad() if forward_only else nullcontext():
            self._forward_backward(
                forward_step_func=partial(
                    self._forward_step,
                    loss=loss,
                    temperature=self.temperature if temperature is None else temperature,
                ),
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
                num_microbatches=len(mine),
                seq_length=1,  # lengths vary; Megatron exchanges the real shapes
                micro_batch_size=1,
                forward_only=forward_only,
            )

    def _forward_step(self, batches: Iterator[PackedBatch], chunk, *, loss, temperature: float):
        batch = next(batches)
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=batch.cu_seqlens,
            cu_seqlens_kv=batch.cu_seqlens,
            max_seqlen_q=batch.max_seqlen,
            max_seqlen_kv=batch.max_seqlen,
        )
        keep_dtype = {"fp32_output": False} if self.dtype == torch.bfloat16 else {}  # of Float16Module
        output = chunk(
            input_ids=batch.tokens_T.unsqueeze(0),
            position_ids=batch.positions_T.unsqueeze(0),
            attention_mask=None,
            packed_seq_params=packed,
            **keep_dtype,
        )

        def loss_func(hidden_T1H: Tensor):
            logprob_R, entropy_R = self._score(chunk, hidden_T1H, batch, temperature)
            total, metrics = loss(batch, logprob_R, entropy_R)
            return total, torch.zeros([], dtype=torch.int), metrics

        return output, loss_func

    def _score(self, chunk, hidden_T1H: Tensor, batch: PackedBatch, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy at the scored positions, from the last stage's hidden states."""
        group = self.layout.tp_group
        if self.sequence_parallel:
            hidden_T1H = tensor_parallel.gather_from_sequence_parallel_region(hidden_T1H, group=group)
        else:
            hidden_T1H = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_T1H, group=group)
        hidden_RH = hidden_T1H.squeeze(1).index_select(0, batch.position_R)
        head = _unwrap(chunk).head_weight()
        return head_logprob(
            hidden_RH,
            head,
            batch.target_R,
            vocab_size=self.facts.vocab_size,
            temperature=temperature,
            chunk_size=self.actor.megatron.logprob_chunk_size,
            group=group,
        )


def _offsets(rows: Sequence[Row]) -> tuple[list[int], int]:
    offsets, total = [], 0
    for row in rows:
        offsets.append(total)
        total += len(row.response_ids)
    return offsets, total


def _unwrap(module):
    while hasattr(module, "module"):
        module = module.module
    return module
