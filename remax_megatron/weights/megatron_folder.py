"""A Megatron checkpoint folder as a source of Hugging Face tensors, and the choice between the two kinds of folder.

    DIR/latest_checkpointed_iteration.txt    "0", "120", or "release"
    DIR/iter_0000000/                        the checkpoint (see weights.torch_dist)
    DIR/config.json, tokenizer files, ...    what makes the folder a model

The checkpoint's own folder (iter_0000000) is taken as well; config.json may lie beside or above it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from remax_megatron.model_facts import ModelFacts
from remax_megatron.weights.hf_folder import FolderError, HfWeights, check_folder, expected_shapes
from remax_megatron.weights.mapped import Extent, MappedFiles
from remax_megatron.weights.shards import row_runs
from remax_megatron.weights.torch_dist import TorchDist, saved_key
from remax_megatron.weights.weight_table import WeightEntry, weight_table

TRACKER = "latest_checkpointed_iteration.txt"
OTHER_CONFIG = "use the config.json that the model was trained with"
MODEL_PREFIXES = ("decoder.", "embedding.", "output_layer.")  # what else there is belongs to the optimizer and the run


def is_megatron_folder(folder: str | Path) -> bool:
    """Tell whether `path` is a Megatron checkpoint, or a folder of them."""
    folder = Path(folder)
    return (folder / TRACKER).is_file() or (folder / ".metadata").is_file()


def checkpoint_folder(folder: str | Path) -> Path:
    """The folder with `.metadata` in it. FolderError when the tracker file names none."""
    folder = Path(folder)
    if (folder / ".metadata").is_file():
        return folder
    tracker = folder / TRACKER
    try:
        text = tracker.read_text(errors="replace").strip()
    except OSError as error:
        raise FolderError(
            f"{folder} holds neither {TRACKER} nor .metadata: not a Megatron checkpoint; name one"
        ) from error
    name = text if text == "release" else f"iter_{int(text):07d}" if text.isdecimal() else None
    if name is None:
        raise FolderError(f"{tracker} says {text!r}, expected the number of an iteration or release")
    if not (folder / name / ".metadata").is_file():
        raise FolderError(
            f"{tracker} says {text}, but {folder / name} holds no .metadata; copy it again, or name another "
            "iteration's folder"
        )
    return folder / name


def model_folder(folder: str | Path) -> Path:
    """The folder whose config.json and tokenizer belong to the weights in `folder`: itself, or the one above."""
    folder = Path(folder)
    above = folder.resolve().parent
    return above if not (folder / "config.json").is_file() and (above / "config.json").is_file() else folder


def weights_folder(folder: str | Path) -> Path:
    """Where weights and manifest lie: the folder itself, or a Megatron folder's current checkpoint."""
    return checkpoint_folder(folder) if is_megatron_folder(folder) else Path(folder)


class MegatronWeights:
    """The weights of a Megatron checkpoint under their Hugging Face names, read where they lie.

    `prefix` begins the names of the model's tensors where the checkpoint holds another model as well. FolderError when
    tensors are missing, extra or misshapen for a model of `facts`.
    """

    def __init__(self, folder: str | Path, facts: ModelFacts, prefix: str = ""):
        self.folder, self._prefix = Path(folder), prefix
        self._stored = TorchDist(checkpoint_folder(folder))
        self._maps = MappedFiles()
        self._shapes = expected_shapes(facts)
        self._made_of: dict[str, tuple[WeightEntry, list[tuple[int, int]]]] = {}
        for entry in weight_table(facts):
            by_name: dict[str, list[tuple[int, int, int]]] = {name: [] for name in entry.hf_names}
            for run in row_runs(entry, facts):
                by_name[run.hf_name].append((run.hf_row, run.megatron_row, run.num_rows))
            for name, runs in by_name.items():
                self._made_of[name] = entry, [(row, count) for _, row, count in sorted(runs)]
        self._stacked = not any(key.startswith(f"{prefix}decoder.layers.0.") for key in self._stored.tensors)
        self._check(facts)

    def _key(self, entry: WeightEntry) -> tuple[str, int | None]:
        """(key, layer within it): the layers lie stacked in one tensor, or each under its own number."""
        key = self._prefix + saved_key(entry)
        if entry.layer is None or self._stacked:
            return key, entry.layer
        return key.replace("decoder.layers.", f"decoder.layers.{entry.layer}."), None

    def _check(self, facts: ModelFacts) -> None:
        tensors = self._stored.tensors
        expected: dict[str, tuple[int, ...]] = {}
        for entry in weight_table(facts):
            key, layer = self._key(entry)
            dims = (sum(shape[0] for shape in entry.hf_shapes), *entry.hf_shapes[0][1:])
            expected[key] = dims if layer is None else (facts.num_layers, *dims)
            if key not in tensors:
                raise FolderError(f"{self._stored.folder}: the tensor {key} is missing; {OTHER_CONFIG}")
            found = tensors[key].shape
            padded = entry.kind == "vocab" and found[1:] == dims[1:] and found[0] >= dims[0]
            if found != expected[key] and not padded:
                raise FolderError(
                    f"{self._stored.folder}: {key} has shape {found}, config.json says {expected[key]}; {OTHER_CONFIG}"
                )
        parts = tuple(self._prefix + part for part in MODEL_PREFIXES)
        ours = {key for key in tensors if key.startswith(parts) and not key.endswith("_extra_state")}
        if extra := sorted(ours - expected.keys()):
            raise FolderError(
                f"{self._stored.folder}: {len(extra)} tensors do not belong to the model of config.json, "
                f"first {extra[0]}; {OTHER_CONFIG}"
            )

    @property
    def files(self) -> list[Path]:
        """All files that hold weights, and the index."""
        chunks = {chunk.path for tensor in self._stored.tensors.values() for chunk in tensor.chunks}
        return [*map(Path, sorted(chunks)), self._stored.folder / ".metadata"]

    def check_items(self) -> None:
        """FolderError when a chunk of a tensor is missing or not what the index says; reads no weights."""
        for key, tensor in self._stored.tensors.items():
            if key.startswith(MODEL_PREFIXES):
                for chunk in tensor.chunks:
                    self._stored.data_start(key, chunk, tensor.dtype)

    def fused_rows(self, key: str, layer: int | None, row: int, num_rows: int) -> list[Extent]:
        """Rows of a tensor as Megatron stores it, under its own name."""
        return self._stored.rows(*self._fused_key(key, layer), row, row + num_rows)

    def fused_dtype(self, key: str, layer: int | None) -> torch.dtype:
        """Return the type of a tensor as Megatron stores it, under its own name."""
        return self._stored.tensors[self._fused_key(key, layer)[0]].dtype

    def _fused_key(self, key: str, layer: int | None) -> tuple[str, int | None]:
        """(key, layer within it) of Megatron's name for a tensor of a layer."""
        if layer is not None and not self._stacked:
            return key.replace("decoder.layers.", f"decoder.layers.{layer}."), None
        return key, layer

    @property
    def names(self) -> set[str]:
        """Return the Hugging Face names of all tensors."""
        return set(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a Hugging Face tensor."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Return the type in which a Hugging Face tensor is stored."""
        return self._stored.tensors[self._key(self._made_of[name][0])[0]].dtype

    def extents(self, name: str, row: int = 0, num_rows: int | None = None) -> list[Extent]:
        """Where the bytes of the Hugging Face tensor `name` lie, from its row `row` on."""
        entry, runs = self._made_of[name]
        key, layer = self._key(entry)
        stop = self._shapes[name][0] if num_rows is None else row + num_rows
        extents: list[Extent] = []
        top = 0  # row of the Hugging Face tensor where the run begins
        for start, count in runs:
            first, last = max(row - top, 0), min(stop - top, count)
            if first < last:
                extents += self._stored.rows(key, layer, start + first, start + last)
            top += count
        return extents

    def get(self, name: str) -> Tensor:
        """The whole tensor, copied into memory."""
        data = bytearray()
        for extent in self.extents(name):
            data += self._maps.read(extent)
            self._maps.release(extent)
        return torch.frombuffer(data, dtype=self.dtype(name)).reshape(self._shapes[name])


def open_weights(folder: str | Path, facts: ModelFacts, prefix: str = "") -> HfWeights | MegatronWeights:
    """The weights in `folder`, of either kind, checked against `facts`. FolderError when they do not fit.

    `prefix` is that of the model's names in a Megatron checkpoint that holds two.
    """
    if is_megatron_folder(folder):
        return MegatronWeights(folder, facts, prefix)
    weights = HfWeights(folder)
    check_folder(weights, facts)
    return weights


def open_model(folder: str | Path) -> tuple[HfWeights | MegatronWeights, ModelFacts]:
    """The weights in `folder` and the sizes its config.json gives. UserError when it is neither kind of checkpoint."""
    if not Path(folder).is_dir():
        raise FolderError(f"{folder}: there is no such folder; name a checkpoint")
    facts = ModelFacts.from_folder(model_folder(folder), setting="DIR")
    return open_weights(folder, facts), facts
