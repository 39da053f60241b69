"""A dense model under Megatron that runs packed micro-batches: what policy, reference and critic have in common.

Everything collective is called by every rank of the run with the same rows; each data-parallel rank works on its
share of the micro-batches, and results come back on every rank.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from remax_megatron.batching.packed import PackedBatch, num_shared_tokens, pack, prompt_groups
from remax_megatron.batching.schedule import Schedule, row_cost, schedule_by_rows, schedule_by_tokens
from remax_megatron.model.attention import choose_backend, packed_rows
from remax_megatron.model.dense import build_chunks, transformer_config
from remax_megatron.model.layers import choose_layers
from remax_megatron.model.live_weights import load_weights
from remax_megatron.model_facts import ModelFacts
from remax_megatron.parallel import watchdog
from remax_megatron.parallel.layout import Layout
from remax_megatron.policy.settings import PolicySettings
from remax_megatron.types import Row

log = logging.getLogger(__name__)


S = TypeVar("S")  # what a model says of the scored positions of a micro-batch


class PackedModel(ABC, Generic[S]):
    """`chunks` on this rank with the weights of `model_folder`, and the settings that micro-batches are made by.

    What becomes of the last stage's hidden states is the subclass's to say, in `_score`.
    """

    def __init__(
        self,
        facts: ModelFacts,
        layout: Layout,
        settings: PolicySettings,
        model_folder: str,
        *,
        prefix: str = "",
    ):
        """`model_folder` is a Hugging Face folder or a Megatron checkpoint, in which `prefix` begins the names."""
        actor = settings.actor
        self.facts, self.layout, self.actor = facts, layout, actor
        self.temperature = settings.temperature
        self._row_cost = row_cost(facts)
        self.dtype = getattr(torch, actor.megatron.dtype)
        self.shares_prompts = actor.share_prompts
        requested = actor.megatron.attention_backend
        backend = choose_backend(requested, layout.device, self.dtype, self.shares_prompts)
        layers = choose_layers(actor.megatron.layers, layout.device, self.dtype)
        log.info("Layers: %s, attention: %s, on %s in %s", layers, backend, layout.device.type, actor.megatron.dtype)
        self.config = transformer_config(
            facts,
            layout,
            dtype=self.dtype,
            sequence_parallel=actor.megatron.sequence_parallel,
            recompute=settings.recompute,
            layers=layers,
            attention_backend=backend,
        )
        self.sequence_parallel = self.config.sequence_parallel
        self.bare_chunks = build_chunks(facts, self.config, layout, layers, backend)
        load_weights(self.bare_chunks, model_folder, facts, layout, prefix)
        wraps = self.dtype != torch.float32
        self.chunks = [Float16Module(self.config, chunk) if wraps else chunk for chunk in self.bare_chunks]
        self._forward_backward = get_forward_backward_func()

    # -- scoring ---------------------------------------------------------------------------------------------------

    def _per_token(
        self,
        rows: Sequence[Row],
        schedule: Schedule,
        value: Callable[[PackedBatch, S], Tensor],
        temperature: float | None = None,
    ) -> list[list[float]]:
        """A number [R] for every response token of `rows`, on every rank, from a forward pass. Collective."""
        offsets, total = _offsets(rows)
        flat = torch.zeros(total, dtype=torch.float32, device=self.layout.device)

        def collect(batch: PackedBatch, scored: S) -> Tensor:
            value_R = value(batch, scored)
            if self.layout.reports_for_replica:
                parts = value_R.split(batch.response_lengths) if batch.rows else []
                for row, part in zip(batch.rows, parts, strict=True):
                    flat[offsets[row] : offsets[row] + len(part)] = part
            return value_R.sum()

        if not rows:
            return []
        self._run(rows, schedule, collect, forward_only=True, temperature=temperature)
        dist.all_reduce(flat)
        values = flat.tolist()
        return [values[start : start + len(row.response_ids)] for row, start in zip(rows, offsets, strict=True)]

    # -- the pass over micro-batches ---------------------------------------------------------------------------------

    def schedule(self, rows: Sequence[Row]) -> Schedule:
        """Micro-batches of `rows` for every data-parallel rank; equal on all ranks."""
        layout, actor = self.layout, self.actor
        multiple = layout.pp if layout.vpp > 1 else 1
        if not actor.use_dynamic_bsz:
            assert actor.ppo_micro_batch_size_per_gpu is not None
            return schedule_by_rows(len(rows), layout.dp, actor.ppo_micro_batch_size_per_gpu, multiple)
        budget = actor.ppo_max_token_len_per_gpu
        groups = _groups_within(rows, budget) if self.shares_prompts else [[i] for i in range(len(rows))]
        lengths = [num_shared_tokens(rows, group) for group in groups]
        schedule = schedule_by_tokens(lengths, layout.dp, budget, multiple, self._row_cost)
        return [[[row for group in batch for row in groups[group]] for batch in rank] for rank in schedule]

    def num_computed_tokens(self, rows: Sequence[Row], batch: Sequence[int]) -> int:
        """Tokens of a micro-batch as it is packed: shared prompts count once."""
        groups = prompt_groups(rows, batch) if self.shares_prompts else [[i] for i in batch]
        return sum(num_shared_tokens(rows, group) for group in groups)

    def _run(
        self,
        rows: Sequence[Row],
        schedule: Schedule,
        loss: Callable[[PackedBatch, S], Tensor],
        *,
        forward_only: bool,
        temperature: float | None = None,
    ) -> None:
        """Megatron's forward (and backward) schedule over this rank's micro-batches; all ranks call. `loss` gives that
        of a micro-batch."""
        self._before_passes()
        mine = schedule[self.layout.dp_rank]
        pad_to = self._padding_multiple(rows, mine)

        def batches() -> Iterator[PackedBatch]:
            for number, indices in enumerate(mine):
                watchdog.beat(f"micro-batch {number + 1} of {len(mine)}")
                yield pack(
                    rows,
                    indices,
                    number=number,
                    pad_to=pad_to,
                    pad_limit=self._pad_limit,
                    share_prompts=self.shares_prompts,
                    device=self.layout.device,
                )

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
                seq_length=pad_to,  # used by pipelines, whose messages then need no shapes
                micro_batch_size=1,
                forward_only=forward_only,
            )
        for chunk in self.bare_chunks:
            chunk.set_input_tensor(None)  # else the last message and its gradient stay in memory
        watchdog.beat("after its micro-batches")

    def _padding_multiple(self, rows: Sequence[Row], mine: Sequence[Sequence[int]]) -> int:
        """What the length of a micro-batch is padded to a multiple of. In a pipeline it is one length for all: else
        the stages would have to tell each other the shape of every message, and wait for the device to read it."""
        multiple = self.layout.tp if self.sequence_parallel else 1
        if self.layout.device.type == "cpu" and self.dtype == torch.bfloat16:
            # Each new matrix shape costs 50 to 70 ms of kernel generation in bfloat16 on CPU: keep them few.
            multiple = math.lcm(64, multiple)
        if self.layout.pp == 1:
            return multiple
        longest = max(self.num_computed_tokens(rows, batch) for batch in mine)
        padded = max(-(-longest // multiple), 1) * multiple
        return min(padded, max(self._pad_limit, longest)) if self._pad_limit else padded

    @property
    def _pad_limit(self) -> int | None:
        return self.actor.ppo_max_token_len_per_gpu if self.actor.use_dynamic_bsz else None

    def _forward_step(
        self, batches: Iterator[PackedBatch], chunk, *, loss: Callable[[PackedBatch, S], Tensor], temperature: float
    ):
        batch = next(batches)
        keep_dtype = {"fp32_output": False} if self.dtype == torch.bfloat16 else {}  # of Float16Module
        output = chunk(
            input_ids=batch.tokens_T.unsqueeze(0),
            position_ids=batch.positions_T.unsqueeze(0),
            attention_mask=None,
            packed_seq_params=packed_rows(
                batch.segments,
                batch.cu_seqlens,
                batch.max_seqlen,
                shares_prompts=self.shares_prompts,
                fused_rotation=self.config.apply_rope_fusion,
            ),
            **keep_dtype,
        )

        def loss_func(hidden_T1H: Tensor):
            total = loss(batch, self._score(chunk, hidden_T1H, batch, temperature))
            return total, torch.zeros([], dtype=torch.int), {}

        return output, loss_func

    def _before_passes(self) -> None:
        """Make the weights ready to be computed with; on every rank, before its micro-batches."""

    @abstractmethod
    def _score(self, chunk, hidden_T1H: Tensor, batch: PackedBatch, temperature: float) -> S:
        """What the model says of the scored positions of `batch`, from the last stage's hidden states."""


def _groups_within(rows: Sequence[Row], budget: int) -> list[list[int]]:
    """Rows that share a prompt, in as many groups as it takes for each to fit `budget` with its copy of the prompt."""
    groups: list[list[int]] = []
    for together in prompt_groups(rows, range(len(rows))):
        group: list[int] = []
        for row in together:
            if group and num_shared_tokens(rows, [*group, row]) > budget:
                groups.append(group)
                group = []
            group.append(row)
        groups.append(group)
    return groups


def _offsets(rows: Sequence[Row]) -> tuple[list[int], int]:
    offsets, total = [], 0
    for row in rows:
        offsets.append(total)
        total += len(row.response_ids)
    return offsets, total


def unwrapped(module):
    """The model chunk in Megatron's wrappers around it."""
    while hasattr(module, "module"):
        module = module.module
    return module
