"""The policy's weights on their way in (from a folder of either kind) and out (as a stream of Hugging Face tensors).

The stream feeds the rollout engine and the export alike. It goes through the weight table in flattened buckets of
bounded size: the pipeline stage that owns a bucket broadcasts its tensor-parallel share along the pipeline, then the
shares are gathered over the tensor-parallel ranks. Every rank takes part in every collective, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from remax_megatron.model_facts import ModelFacts
from remax_megatron.parallel.layout import Layout
from remax_megatron.weights.buckets import Bucket, num_stream_elements, plan_buckets
from remax_megatron.weights.critic_folder import open_critic
from remax_megatron.weights.megatron_folder import open_weights
from remax_megatron.weights.shards import to_hf, to_megatron
from remax_megatron.weights.weight_table import (
    EMBEDDING,
    HEAD,
    owner,
    table_name,
    weight_table,
)


def table_parameters(chunk: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters of a model chunk by their names in the weight table."""
    return {table_name(name): parameter for name, parameter in chunk.named_parameters()}


def load_weights(
    chunks: list[torch.nn.Module], folder: str, facts: ModelFacts, layout: Layout, prefix: str = ""
) -> None:
    """Fill this rank's parameters from a Hugging Face folder or a Megatron checkpoint, in the parameters' dtype.

    No collectives, and no pickle of the checkpoint is run: either kind of folder is read where its bytes lie.

    With tied embeddings and more than one pipeline stage the last stage's copy of the embedding is filled too. `prefix`
    is that of a critic's names in the checkpoint of a run.
    """
    weights = open_critic(folder, facts, prefix) if facts.value_head else open_weights(folder, facts)
    parameters = [table_parameters(chunk) for chunk in chunks]
    for entry in weight_table(facts):
        rank, chunk, name = owner(entry, facts.num_layers, layout.pp, layout.vpp)
        targets = [parameters[chunk].pop(name)] if rank == layout.pp_rank else []
        if entry.megatron_name == EMBEDDING and facts.tied_embeddings and HEAD in parameters[-1]:
            targets.append(parameters[-1].pop(HEAD))
        if not targets:
            continue
        shard = to_megatron(entry, {n: weights.get(n) for n in entry.hf_names}, facts, layout.tp, layout.tp_rank)
        for target in targets:
            with torch.no_grad():
                target.copy_(shard)
            # Megatron's gradient norm counts a parameter on every tensor-parallel rank only when it is marked as cut.
            cut = entry.kind != "replicated"
            for attribute, value in {"tensor_model_parallel": cut, "partition_dim": int(entry.kind == "row")}.items():
                setattr(target, attribute, value)
    left = [name for chunk in parameters for name in chunk]
    assert not left, f"parameters without an entry in the weight table: {left}"


class WeightStream:
    """The policy's weights as (Hugging Face name, whole tensor), computed anew at each iteration.

    The plan of buckets is made once. `num_bytes` is the size of the Hugging Face tensors of one pass.
    """

    def __init__(
        self,
        chunks: list[torch.nn.Module],
        facts: ModelFacts,
        layout: Layout,
        dtype: torch.dtype,
        bucket_bytes: int,
        make_ready: Callable[[], None] = lambda: None,
    ):
        """A pass holds at most twice `bucket_bytes` at a time, with the tensor that its consumer got last, as long as
        the largest tensor and one rank's share of it are no more.

        chunks        this rank's chunks of the model, cut as `layout` says
        facts         sizes of the whole model
        dtype         of the tensors
        bucket_bytes  whole tensors that are gathered at once
        make_ready    is called before the weights are read, on every rank
        """
        self._parameters = [table_parameters(chunk) for chunk in chunks]
        self._facts, self._layout, self._dtype, self._make_ready = facts, layout, dtype, make_ready
        self._buckets = plan_buckets(facts, layout.tp, layout.pp, layout.vpp, dtype.itemsize, bucket_bytes)
        self.num_bytes = num_stream_elements(facts) * dtype.itemsize

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Collective over each model replica: all its ranks iterate to the end. A tensor is valid until the next one
        is asked for; whoever keeps it keeps the memory of its bucket."""
        self._make_ready()
        for bucket in self._buckets:
            yield from self._tensors(bucket)

    def _tensors(self, bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
        """The Hugging Face tensors of a bucket. Its memory, and what its last tensor took, is free at the end."""
        layout = self._layout
        share = self._share(bucket)
        if layout.pp > 1:
            source = dist.get_global_rank(layout.pp_group, bucket.stage)
            dist.broadcast(share, src=source, group=layout.pp_group)
        shares = share.unsqueeze(0)
        if layout.tp > 1:
            shares = torch.empty(layout.tp, bucket.numel, dtype=self._dtype, device=layout.device)
            dist.all_gather_into_tensor(shares.view(-1), share, group=layout.tp_group)
        del share
        for entry, _, _, shape, offset in bucket.slots:
            size = torch.Size(shape).numel()
            if len(bucket.slots) == 1 and entry.kind in ("vocab", "qkv"):  # cut along rows: the shares are the whole
                shards = [shares.view(layout.tp * shape[0], *shape[1:])]
            else:
                shards = [one[offset : offset + size].view(shape) for one in shares]
            yield from to_hf(entry, shards, self._facts).items()

    def _share(self, bucket: Bucket) -> Tensor:
        """This rank's shards of a bucket, flat: [numel]. Where it owns the bucket they are its weights, else memory to
        receive them in."""
        mine = bucket.stage == self._layout.pp_rank
        parameters = [self._parameters[chunk][name] for _, chunk, name, _, _ in bucket.slots if mine]
        if self._layout.tp > 1 and len(parameters) == 1 and parameters[0].dtype == self._dtype:
            return parameters[0].view(-1)  # only gathered from, never handed out
        share = torch.empty(bucket.numel, dtype=self._dtype, device=self._layout.device)
        for parameter, (_, _, _, shape, offset) in zip(parameters, bucket.slots, strict=mine):
            share[offset : offset + torch.Size(shape).numel()].view(shape).copy_(parameter)
        return share
