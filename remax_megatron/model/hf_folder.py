"""Reading and writing Hugging Face weight folders, tensor by tensor, and nothing but safetensors.

Model code and pickles in a folder are never touched. Writing is atomic: a folder appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from remax_megatron.atomic import replacing_folder
from remax_megatron.config.model_facts import ModelFacts
from remax_megatron.errors import UserError
from remax_megatron.model.weight_table import weight_table

# What makes a folder a model beside its weights; copied as it is when a trained policy is exported.
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


class FolderError(UserError):
    """A model folder that cannot be used as it is."""


class HfWeights:
    """Memory-mapped view of a folder's safetensors: `names`, `shape(name)`, `get(name)`.

    FolderError: no safetensors, an index that names a missing file, or a damaged file.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            self._file_of = _weight_map(index)
        else:
            single = self.folder / "model.safetensors"
            if not single.exists():
                raise FolderError(
                    f"{self.folder} holds neither model.safetensors nor model.safetensors.index.json; "
                    "convert the weights to safetensors first"
                )
            self._file_of = dict.fromkeys(self._open_keys(single.name), single.name)
        self._open: dict[str, object] = {}

    def _open_keys(self, file: str) -> list[str]:
        with self._reader(file) as reader:
            return list(reader.keys())

    def _reader(self, file: str):
        path = self.folder / file
        if not path.exists():
            raise FolderError(f"{self.folder}: the index names {file}, which is missing")
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, struct.error, OSError) as error:
            raise FolderError(f"{path} is not a readable safetensors file: {error}") from error

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    def _handle(self, name: str):
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = self._reader(file)
        return self._open[file]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._read(name, "get_slice").get_shape())

    def get(self, name: str) -> Tensor:
        """The whole tensor, memory-mapped where the platform can."""
        return self._read(name, "get_tensor")

    def _read(self, name: str, how: str):
        try:
            return getattr(self._handle(name), how)(name)
        except SafetensorError as error:
            raise FolderError(f"{self.folder / self._file_of[name]} does not hold {name}: {error}") from error


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise FolderError(f"{index} is damaged: {type(error).__name__}: {error}") from error


def check_folder(weights: HfWeights, facts: ModelFacts) -> None:
    """FolderError naming the first missing, extra or misshapen tensor of the folder."""
    expected = {
        name: dims for entry in weight_table(facts) for name, dims in zip(entry.hf_names, entry.hf_shapes, strict=True)
    }
    # Derived or duplicated by some writers; carries nothing of its own.
    ignorable = {name for name in weights.names if name.endswith("rotary_emb.inv_freq")}
    if facts.tied_embeddings:
        ignorable.add("lm_head.weight")
    if missing := sorted(expected.keys() - weights.names):
        raise FolderError(f"{weights.folder}: {len(missing)} tensors are missing, first {missing[0]}")
    if extra := sorted(weights.names - expected.keys() - ignorable):
        raise FolderError(f"{weights.folder}: {len(extra)} tensors do not belong to a Qwen2 model, first {extra[0]}")
    for name, dims in expected.items():
        if weights.shape(name) != dims:
            raise FolderError(f"{weights.folder}: {name} has shape {weights.shape(name)}, config.json says {dims}")


def write_hf_folder(
    folder: str | Path, tensors: Iterable[tuple[str, Tensor]], source: str | Path, max_shard_bytes: int = 5 * 10**9
) -> Path:
    """Write `tensors` as sharded safetensors with an index, and the side files of `source`, then rename into place.

    Streams: at most one shard (`max_shard_bytes`) of tensors is held. An existing `folder` is replaced at the end.
    """
    with replacing_folder(folder) as aside:
        shards: list[list[str]] = []
        num_bytes = 0
        dtype = None
        for shard in _shards(tensors, max_shard_bytes):
            save_file(shard, aside / f"shard-{len(shards)}", metadata={"format": "pt"})
            shards.append(list(shard))
            num_bytes += sum(tensor.nbytes for tensor in shard.values())
            dtype = next(iter(shard.values())).dtype
        _name_shards(aside, shards, num_bytes)
        for name in SIDE_FILES:
            if (Path(source) / name).exists():
                shutil.copyfile(Path(source) / name, aside / name)
        _set_dtype(aside / "config.json", dtype)
    return Path(folder)


def _shards(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Consecutive tensors, copied to the CPU, in groups of at most `max_bytes` (or one tensor)."""
    pending: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if pending and sum(t.nbytes for t in pending.values()) + tensor.nbytes > max_bytes:
            yield pending
            pending = {}
        pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
    if pending:
        yield pending


def _name_shards(folder: Path, shards: list[list[str]], num_bytes: int) -> None:
    """Give "shard-0", ... their final names, which hold their count; write the index if there is more than one."""
    if len(shards) == 1:
        os.replace(folder / "shard-0", folder / "model.safetensors")
        return
    weight_map = {}
    for i, names in enumerate(shards):
        final = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(folder / f"shard-{i}", folder / final)
        weight_map.update(dict.fromkeys(names, final))
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))


def _set_dtype(config: Path, dtype: torch.dtype | None) -> None:
    values = json.loads(config.read_text())
    key = "torch_dtype" if "torch_dtype" in values else "dtype"
    values[key] = str(dtype).removeprefix("torch.")
    config.write_text(json.dumps(values, indent=2) + "\n")
