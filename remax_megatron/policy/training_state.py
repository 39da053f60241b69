"""The state of a training: weights, fp32 master weights and Adam's moments, as blocks of whole, layout-free tensors.

Every rank writes blocks of the whole tensors of the weight table: of its tensor-parallel shard of its stages' layers
the stretch that the distributed optimizer gave it (without one, the first data-parallel rank writes the shard). A
block is described in the coordinates of the whole tensor at TP 1, so a checkpoint made of them is of no layout and is
read at any other. The names are Megatron's, and a critic's stand behind a prefix:

    decoder.layers.mlp.linear_fc1.weight                             the weights, in the parameters' type
    optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight     and exp_avg_sq: float32
    optimizer.state.fp32_param.decoder.layers.mlp.linear_fc1.weight  only where the weights are not float32

Written by `megatron.core.dist_checkpointing` (checkpoint/saver.py), read by weights/torch_dist.py, which runs no
pickle.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from remax_megatron.model.live_weights import table_parameters
from remax_megatron.parallel import watchdog
from remax_megatron.policy.trained_model import TrainedModel
from remax_megatron.weights.hf_folder import FolderError
from remax_megatron.weights.mapped import MappedFiles
from remax_megatron.weights.shards import shard_runs
from remax_megatron.weights.torch_dist import TorchDist, extra_states, saved_key
from remax_megatron.weights.weight_table import EMBEDDING, HEAD, WeightEntry, owner, weight_table

MASTER, MOMENTS = "fp32_param", ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Owned:
    """What this rank holds of one table entry: elements `start` to `stop` of its flattened shard `parameter`."""

    entry: WeightEntry
    parameter: torch.nn.Parameter
    start: int
    stop: int
    main: Tensor  # the optimizer's own parameter: those elements, in float32
    adam: torch.optim.Optimizer


class TrainingState:
    """Reads and writes the state of `model`, whose names in a checkpoint begin with `prefix`. Neither is collective."""

    def __init__(self, model: TrainedModel, prefix: str = ""):
        self._model, self._prefix, self._facts, self._layout = model, prefix, model.facts, model.layout
        self._optimizers = model.optimizers
        self._is_distributed = model.actor.megatron.use_distributed_optimizer

    # -- out -------------------------------------------------------------------------------------------------------

    def sharded(self) -> dict[str, ShardedTensor | ShardedObject]:
        """The blocks that this rank writes, for `dist_checkpointing.save`. They are views of the live state."""
        blocks: dict[str, ShardedTensor | ShardedObject] = {}
        layout = self._layout
        for owned, is_copy in self._owned():
            if is_copy or (owned.entry.kind == "replicated" and layout.tp_rank > 0):
                continue
            if not self._is_distributed and layout.dp_rank > 0:
                continue
            key = saved_key(owned.entry)
            weights = self._model.weights_of(owned.parameter)[owned.start : owned.stop]
            for name, values in {"": weights, **self._optimizer_state(owned)}.items():
                kind = f"optimizer.state.{name}." if name else ""
                for offsets, block in self._blocks(owned, values):
                    sharded = self._sharded(owned.entry, self._prefix + kind + key, offsets, block)
                    blocks[f"{sharded.key}/{sharded.global_offset}"] = sharded
        if layout.tp_rank == 0 and layout.dp_rank == 0 and not self._prefix:
            for name, shape, offset in self._extra_states():
                blocks[f"{name}/{offset}"] = ShardedObject(name, None, shape, offset)
        return blocks

    def _blocks(self, owned: _Owned, values: Tensor) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """(row and column in the whole tensor, block) for the owned stretch `values`, which is cut into rectangles."""
        width = self._width(owned)
        runs = shard_runs(owned.entry, self._facts, self._layout.tp, self._layout.tp_rank)
        first_column = self._first_column(owned)
        for row, column, num_rows, num_columns in _rectangles(owned.start, owned.stop, width):
            for top, whole_top, count in runs:
                begin, end = max(row, top), min(row + num_rows, top + count)
                if begin < end:
                    at = begin * width + column - owned.start
                    block = values[at : at + (end - begin - 1) * width + num_columns]
                    block = block.view(end - begin, num_columns)
                    yield (whole_top + begin - top, first_column + column), block

    def _sharded(self, entry: WeightEntry, key: str, offsets: tuple[int, ...], block: Tensor) -> ShardedTensor:
        shape = _whole_shape(entry)
        if len(shape) == 1:
            offsets, block = offsets[:1], block.view(-1)
        if entry.layer is not None:
            shape, offsets, block = (self._facts.num_layers, *shape), (entry.layer, *offsets), block.unsqueeze(0)
        return ShardedTensor(key, block, block.dtype, tuple(block.shape), shape, offsets, axis_fragmentations=None)

    def _extra_states(self) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
        """(name, shape, offset) of the empty objects that Megatron asks for with every layer."""
        num_layers = self._facts.num_layers
        for entry in weight_table(self._facts):
            rank, _, _ = owner(entry, num_layers, self._layout.pp, self._layout.vpp)
            if rank == self._layout.pp_rank and entry.megatron_name.endswith("linear_proj.weight"):
                assert entry.layer is not None
                for name in extra_states(self._facts):
                    yield f"decoder.layers.{name}._extra_state", (num_layers,), (entry.layer,)
        if self._layout.is_last_stage:
            yield "decoder.final_layernorm._extra_state", (1,), (0,)

    # -- in --------------------------------------------------------------------------------------------------------

    def load_optimizer(self, folder: str | Path, num_updates: int) -> None:
        """Fill master weights and moments from the checkpoint in `folder`, made after `num_updates` optimizer steps.

        The weights themselves are `load_weights`' to read. FolderError when the checkpoint does not hold the state.
        """
        stored, files = TorchDist(folder), MappedFiles()
        for owned, _ in self._owned():
            watchdog.beat(f"reading the state of {owned.entry.hf_names[0]}")
            for name, values in self._optimizer_state(owned).items():
                key = f"{self._prefix}optimizer.state.{name}.{saved_key(owned.entry)}"
                self._check(stored, folder, owned.entry, key)
                values.copy_(self._read(stored, files, owned, key))
            _set_step(owned.adam, owned.main, num_updates)
        self._model.num_updates = num_updates

    def _check(self, stored: TorchDist, folder: str | Path, entry: WeightEntry, key: str) -> None:
        layers = () if entry.layer is None else (self._facts.num_layers,)
        wanted = (*layers, *_whole_shape(entry))
        if key not in stored.tensors:
            raise FolderError(f"{folder} does not hold {key}: it is no checkpoint of a training; name another")
        if (found := stored.tensors[key]).shape != wanted or found.dtype != torch.float32:
            raise FolderError(
                f"{folder}: {key} has shape {found.shape} and type {found.dtype}, expected {wanted} and torch.float32; "
                "resume with the model that the run was started with"
            )

    def _read(self, stored: TorchDist, files: MappedFiles, owned: _Owned, key: str) -> Tensor:
        """The owned stretch of `key`; padding rows are 0."""
        width, column = self._width(owned), self._first_column(owned)
        top, bottom = owned.start // width, -(-owned.stop // width)
        block = torch.zeros(bottom - top, width)
        for row, whole_row, count in shard_runs(owned.entry, self._facts, self._layout.tp, self._layout.tp_rank):
            begin, end = max(row, top), min(row + count, bottom)
            if begin < end:
                start = whole_row + begin - row
                rows = stored.read_rows(key, owned.entry.layer, start, start + end - begin, files)
                block[begin - top : end - top] = rows.view(end - begin, -1)[:, column : column + width]
        return block.view(-1)[owned.start - top * width : owned.stop - top * width]

    # -- what is where ---------------------------------------------------------------------------------------------

    def _owned(self) -> Iterator[tuple[_Owned, bool]]:
        """What this rank holds, with True for the last stage's copy of a tied embedding."""
        layout, facts = self._layout, self._facts
        parameters = [table_parameters(chunk) for chunk in self._model.bare_chunks]
        for entry in weight_table(facts):
            rank, chunk, name = owner(entry, facts.num_layers, layout.pp, layout.vpp)
            if rank == layout.pp_rank:
                yield from ((owned, False) for owned in self._stretch(entry, parameters[chunk][name]))
            if entry.megatron_name == EMBEDDING and facts.tied_embeddings and HEAD in parameters[-1]:
                yield from ((owned, True) for owned in self._stretch(entry, parameters[-1][HEAD]))

    def _stretch(self, entry: WeightEntry, parameter: torch.nn.Parameter) -> Iterator[_Owned]:
        for optimizer in self._optimizers:
            if isinstance(optimizer, DistributedOptimizer):
                if parameter in optimizer.model_param_gbuf_map:
                    place = optimizer._get_model_param_range_map(parameter)["param"]
                    group, order = optimizer.model_param_group_index_map[parameter]
                    main = optimizer.optimizer.param_groups[group]["params"][order]
                    yield _Owned(entry, parameter, place.start, place.end, main, optimizer.optimizer)
            else:
                main = getattr(parameter, "main_param", parameter)
                yield _Owned(entry, parameter, 0, parameter.numel(), main, optimizer.optimizer)

    def _optimizer_state(self, owned: _Owned) -> dict[str, Tensor]:
        """The owned stretch of the moments, and of the master weights where the parameters are not float32."""
        state = _adam_state(owned.adam, owned.main)
        masters = {} if owned.parameter.dtype == torch.float32 else {MASTER: owned.main}
        tensors = {**masters, **{name: state[name] for name in MOMENTS}}
        return {name: self._model.optimizer_state(values).detach().view(-1) for name, values in tensors.items()}

    def _width(self, owned: _Owned) -> int:
        """Columns of the shard; a vector has one."""
        return owned.parameter.shape[1] if owned.parameter.dim() == 2 else 1

    def _first_column(self, owned: _Owned) -> int:
        return self._layout.tp_rank * self._width(owned) if owned.entry.kind == "row" else 0


def _whole_shape(entry: WeightEntry) -> tuple[int, ...]:
    """Of the tensor at TP 1, without padding."""
    return (sum(shape[0] for shape in entry.hf_shapes), *entry.hf_shapes[0][1:])


def _rectangles(start: int, stop: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """(row, column, rows, columns) of at most three rectangles that make up elements `start` to `stop` of a matrix."""
    while start < stop:
        row, column = divmod(start, width)
        num_rows = (stop - start) // width if column == 0 else 0
        if num_rows:
            yield row, 0, num_rows, width
            start += num_rows * width
        else:
            num_columns = min(width - column, stop - start)
            yield row, column, 1, num_columns
            start += num_columns


def _adam_state(adam: torch.optim.Optimizer, main: Tensor) -> dict[str, Tensor]:
    """Adam's state of `main`, made as Adam makes it when no step was taken yet."""
    state = adam.state[main]
    for name in MOMENTS:
        if name not in state:
            state[name] = torch.zeros_like(main, dtype=torch.float32)
    if isinstance(adam, torch.optim.AdamW) and "step" not in state:
        state["step"] = torch.tensor(0.0)
    return state


def _set_step(adam: torch.optim.Optimizer, main: Tensor, num_updates: int) -> None:
    """Tell Adam how many steps it took: torch's counts per parameter, the fused ones per group."""
    if isinstance(adam, torch.optim.AdamW):
        adam.state[main]["step"] = torch.tensor(float(num_updates))
    else:
        for group in adam.param_groups:
            group["step"] = num_updates
