"""Megatron's `torch_dist` checkpoint format, read without Megatron and without running a pickle.

A checkpoint folder holds `metadata.json` (which format), `.metadata` (a pickled index: every tensor's shape, type and
chunks, and where each chunk lies) and `*.distcp` files, in which every chunk is what `torch.save` makes of it. A small
pickled dict is `common.pt`, or from megatron-core 0.19 on the object `common_state` in a `*.distcp` file. Formats:
megatron-core 0.16.1 and 0.19.2 `dist_checkpointing/strategies/torch.py`, torch 2.11 and 2.13
`distributed/checkpoint/filesystem.py`.

`_InertUnpickler` builds plain records, imports nothing, and calls nothing that the file names, so a payload in
`.metadata` cannot run. The chunks' bytes are read where they lie. Writing is weights/torch_dist_writer.py.
"""

from __future__ import annotations

import io
import itertools
import json
import pickle
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from remax_megatron.model_facts import ModelFacts
from remax_megatron.weights.hf_folder import FolderError
from remax_megatron.weights.mapped import Extent, MappedFiles
from remax_megatron.weights.weight_table import TE_NAMES, WeightEntry

# Megatron asks for these objects of every layer when it loads; without FP8 they hold None. The last one is asked for by
# Transformer Engine's attention up to megatron-core 0.14; what a model does not ask for is not read.
EXTRA_STATES = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
    "self_attention.core_attention",
)
AGAIN = "copy the checkpoint again, or save it again"
ITEM_PACKAGES = ("torch", "collections", "_codecs")
ITEM_ERRORS: tuple[type[Exception], ...] = (
    OSError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    NotImplementedError,  # what zipfile raises of other compressions
    RuntimeError,  # and of passwords
    EOFError,
)
PICKLE_ERRORS: tuple[type[Exception], ...] = (
    *ITEM_ERRORS,
    pickle.UnpicklingError,
    ImportError,
    ArithmeticError,
    MemoryError,
)


def extra_states(facts: ModelFacts) -> tuple[str, ...]:
    """Modules of a layer for which Megatron asks for an object without weights (Transformer Engine's, and its own)."""
    norms = ("self_attention.q_layernorm", "self_attention.k_layernorm") if facts.family.qk_norm else ()
    return (*EXTRA_STATES, *norms)


def saved_key(entry: WeightEntry) -> str:
    """The name of `entry` in a checkpoint, for all layers the same."""
    if entry.layer is None:
        return entry.megatron_name
    in_layer = entry.megatron_name.split("{layer}.")[1]
    return f"decoder.layers.{TE_NAMES.get(in_layer, in_layer)}"


class _Record:
    """Stands in for whatever class a pickle names: keeps the arguments and the state, does nothing."""

    def __init__(self, *args: object):
        self.args = args

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


class _InertUnpickler(pickle.Unpickler):
    """Builds records, tuples and torch dtypes; FolderError for any name outside `packages`."""

    def __init__(self, file: Any, path: str, packages: tuple[str, ...]):
        super().__init__(file)
        self._path, self._packages = path, packages

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] not in self._packages:
            raise FolderError(
                f"{self._path} names {module}.{name}, which no checkpoint needs; nothing of it was run. "
                "Do not load this checkpoint with other tools either"
            )
        if module == "torch" and name == "Size":
            return tuple
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return type(name, (_Record,), {})

    def persistent_load(self, pid: Any) -> Any:
        return pid


def _unpickle(file: Any, path: str, packages: tuple[str, ...]) -> Any:
    try:
        return _InertUnpickler(file, path, packages).load()
    except FolderError:
        raise
    except PICKLE_ERRORS as error:
        raise FolderError(f"{path} is damaged: {type(error).__name__}: {error}; {AGAIN}") from error


@dataclass(frozen=True)
class Chunk:
    """A block of a stored tensor and the torch.save'd item that holds it."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    path: str
    start: int
    size: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the checkpoint: its whole shape, its type, its chunks."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: list[Chunk]


class TorchDist:
    """The tensors of one checkpoint folder (the one with `.metadata` in it), and where their bytes lie."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._data_starts: dict[Chunk, int] = {}
        self._objects: list[Chunk] = []  # what Megatron saves beside tensors; nothing here reads their content
        formats = self._formats()
        if formats.get("sharded_backend") != "torch_dist":
            raise FolderError(
                f"{self.folder / 'metadata.json'} says sharded_backend={formats.get('sharded_backend')!r}, "
                "expected 'torch_dist'; save the checkpoint with --ckpt-format torch_dist"
            )
        path = self.folder / ".metadata"
        try:
            with open(path, "rb") as file:
                index = _unpickle(file, str(path), ("torch", "megatron", "collections", "pathlib", "_codecs"))
        except OSError as error:
            raise FolderError(f"{path} cannot be read: {error}; {AGAIN}") from error
        try:
            self.tensors = self._tensors(index)
        except (AttributeError, TypeError, ValueError, LookupError) as error:
            raise FolderError(
                f"{path} is not the index of a checkpoint: {type(error).__name__}: {error}; {AGAIN}"
            ) from error

    def _formats(self) -> dict:
        path = self.folder / "metadata.json"
        try:
            formats = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise FolderError(
                f"{self.folder} is not a distributed checkpoint: metadata.json: {error}; {AGAIN}"
            ) from error
        return formats if isinstance(formats, dict) else {}

    def _tensors(self, index: Any) -> dict[str, StoredTensor]:
        names = [info.relative_path for info in index.storage_data.values()]
        if outside := [name for name in names if Path(name).name != name]:
            raise FolderError(f"{self.folder / '.metadata'} names {outside[0]!r}, which is no file beside it; {AGAIN}")
        places = {
            (key.fqn, tuple(getattr(key, "offset", None) or ())): (
                str(self.folder / info.relative_path),
                info.offset,
                info.length,
            )
            for key, info in index.storage_data.items()
        }
        tensors = {}
        for key, stored in index.state_dict_metadata.items():
            if not hasattr(stored, "chunks"):
                self._objects.append(Chunk((), (), *places[key, ()]))
                continue
            dtype = stored.properties.state[0] if hasattr(stored.properties, "state") else stored.properties.dtype
            if not isinstance(dtype, torch.dtype):
                raise TypeError(f"{key} has no type")
            chunks = []
            for chunk in stored.chunks:
                if (key, chunk.offsets) not in places:
                    raise FolderError(f"{self.folder}: no file holds the chunk of {key} at {chunk.offsets}")
                found = Chunk(chunk.offsets, chunk.sizes, *places[key, chunk.offsets])
                numbers = (*found.offsets, *found.shape, found.start, found.size)
                if not all(type(number) is int and number >= 0 for number in numbers):
                    raise ValueError(f"{key} has a chunk with numbers {numbers}")
                if not len(found.offsets) == len(found.shape) == len(stored.size):
                    raise ValueError(f"{key} of shape {stored.size} has a chunk of shape {found.shape}")
                chunks.append(found)
            tensors[key] = StoredTensor(stored.size, dtype, sorted(chunks, key=lambda chunk: chunk.offsets))
        return tensors

    def rows(self, key: str, layer: int | None, start: int, stop: int) -> list[Extent]:
        """The bytes of rows `start` to `stop` of `key` (of its layer `layer` when the layers are stacked), in order."""
        tensor = self.tensors[key]
        lead = () if layer is None else (layer,)
        dims = tensor.shape[len(lead) :]
        width = torch.Size(dims[1:]).numel()
        itemsize = tensor.dtype.itemsize
        chunks = [chunk for chunk in tensor.chunks if chunk.offsets[: len(lead)] == lead]
        extents: list[Extent] = []
        row = start
        while row < stop:
            band = [c for c in chunks if c.offsets[len(lead)] <= row < c.offsets[len(lead)] + c.shape[len(lead)]]
            widths = [torch.Size(chunk.shape[len(lead) + 1 :]).numel() for chunk in band]
            end = min((c.offsets[len(lead)] + c.shape[len(lead)] for c in band), default=row)
            columns = [0, *itertools.accumulate(widths)]
            whole = len(dims) == 1 or [c.offsets[len(lead) + 1] for c in band] == columns[:-1]
            if sum(widths) != width or not whole:
                raise FolderError(
                    f"{self.folder}: the chunks of {key} do not cover its row {row} exactly once; {AGAIN}"
                )
            end = min(end, stop)
            places = [
                (chunk.path, self.data_start(key, chunk, tensor.dtype), chunk.offsets[len(lead)], w * itemsize)
                for chunk, w in zip(band, widths, strict=True)
            ]
            step = end - row if len(band) == 1 else 1
            extents += [
                Extent(path, data + (first - top) * row_bytes, step * row_bytes)
                for first in range(row, end, step)
                for path, data, top, row_bytes in places
            ]
            row = end
        return extents

    def read_rows(self, key: str, layer: int | None, start: int, stop: int, files: MappedFiles) -> torch.Tensor:
        """A copy of rows `start` to `stop` of `key`, whole in the other dimensions."""
        tensor = self.tensors[key]
        data = bytearray()
        for extent in self.rows(key, layer, start, stop):
            data += files.read(extent)
            files.release(extent)
        dims = tensor.shape[1:] if layer is None else tensor.shape[2:]
        return torch.frombuffer(data, dtype=tensor.dtype).reshape(stop - start, *dims)

    def check_pickles(self) -> None:
        """FolderError when a pickle in the folder names what no checkpoint needs, though nothing here would run it."""
        for key, tensor in self.tensors.items():
            for chunk in tensor.chunks:
                self.data_start(key, chunk, tensor.dtype)
        common = [path for path in [self.folder / "common.pt"] if path.exists()]  # up to megatron-core 0.18
        for chunk in (*self._objects, *(Chunk((), (), str(path), 0, path.stat().st_size) for path in common)):
            try:
                with _Window(chunk.path, chunk.start, chunk.size) as window, zipfile.ZipFile(window) as archive:
                    for name in archive.namelist():
                        if name.endswith(".pkl"):
                            _unpickle(io.BytesIO(archive.read(name)), chunk.path, ITEM_PACKAGES)
            except FolderError:
                raise
            except ITEM_ERRORS as error:
                raise FolderError(f"{chunk.path} is damaged at byte {chunk.start}: {error}; {AGAIN}") from error

    def data_start(self, key: str, chunk: Chunk, dtype: torch.dtype) -> int:
        """Where in the file the chunk's raw bytes begin. FolderError when the item is not the tensor it should be."""
        if chunk not in self._data_starts:
            try:
                self._data_starts[chunk] = _find_data(chunk, dtype)
            except FolderError:
                raise
            except ITEM_ERRORS as error:
                raise FolderError(
                    f"{chunk.path} does not hold {key} at byte {chunk.start}: {error}; {AGAIN}"
                ) from error
        return self._data_starts[chunk]


class _Window(io.RawIOBase):
    """`size` bytes of a file from `start` on, as a file."""

    def __init__(self, path: str, start: int, size: int):
        self._file, self._start, self._size = open(path, "rb"), start, size  # noqa: SIM115
        self._position = 0
        self._file.seek(0, io.SEEK_END)
        if self._file.tell() < start + size:
            self._file.close()
            raise OSError("the file is too short")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._position)
        data = self._file.read(max(0, min(len(buffer), self._size - self._position)))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def _find_data(chunk: Chunk, dtype: torch.dtype) -> int:
    """ValueError when the item holds no contiguous little-endian tensor of the chunk's shape and type."""
    with _Window(chunk.path, chunk.start, chunk.size) as window, zipfile.ZipFile(window) as archive:
        records = {record.filename.split("/", 1)[1]: record for record in archive.infolist()}
        tensor = _unpickle(io.BytesIO(archive.read(records["data.pkl"])), chunk.path, ITEM_PACKAGES)
        if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
            raise ValueError("its bytes are not in little-endian order")
        (_, storage, key, *_), offset, shape, stride = tensor.args[:4]
        steps = torch.empty(chunk.shape, device="meta").stride()
        stored = (storage.__name__, tuple(shape))
        wanted = (torch.empty(0, dtype=dtype).type().removeprefix("torch.").replace("Tensor", "Storage"), chunk.shape)
        if stored != wanted or (tuple(stride) != steps and 0 not in chunk.shape):
            raise ValueError(f"expected {wanted}, contiguous; found {stored} with strides {stride}")
        data = records[f"data/{key}"]
        if data.compress_type != zipfile.ZIP_STORED:
            raise ValueError("it is compressed")
        end = (offset + torch.Size(chunk.shape).numel()) * dtype.itemsize
        if offset < 0 or end > data.file_size:
            raise ValueError(f"its storage has {data.file_size} bytes, expected {end}")
        window.seek(data.header_offset + 26)
        name_size, extra_size = struct.unpack("<HH", window.read(4))
        return chunk.start + data.header_offset + 30 + name_size + extra_size + offset * dtype.itemsize
