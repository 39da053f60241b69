"""Hugging Face weight folders: reading them tensor by tensor, and laying out and writing new ones.

Nothing but safetensors is read or written; model code and pickles in a folder are never touched.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from remax_megatron.atomic import replacing_folder
from remax_megatron.downloads import failed_download
from remax_megatron.errors import UserError
from remax_megatron.model_facts import ModelFacts
from remax_megatron.weights.mapped import Extent, MappedFiles, blocks
from remax_megatron.weights.weight_table import weight_table

MAX_SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HF_EMBEDDING, HF_HEAD = "model.embed_tokens.weight", "lm_head.weight"
BLOCK_BYTES = 2**20

# What makes a folder a model beside its weights; copied as it is when weights are written.
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
    "LICENSE",
    "README.md",
)
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
AGAIN = "copy or download the folder again"
# Ends of the names of buffers that some writers store: made from config.json, and not weights.
BUFFERS = tuple(f"rotary_emb.{name}" for name in ("inv_freq", "original_inv_freq", "cos_cached", "sin_cached"))
# Parts of names that wrappers put in (torch.compile, FSDP, activation checkpointing; in front also DDP and DeepSpeed).
WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
BASE_PREFIX = "model."  # of all names but the head's; missing where the model without head was saved
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class FolderError(UserError):
    """A model folder that cannot be used as it is."""


@dataclass(frozen=True)
class SafetensorsFile:
    """What the head of a safetensors file says. Offsets are bytes from the start of the file."""

    header: str
    dtypes: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    offsets: dict[str, int]
    sizes: dict[str, int]
    num_bytes: int

    @classmethod
    def from_header(cls, header: str) -> SafetensorsFile:
        """ValueError, KeyError or TypeError when `header` is not one."""
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        start = 8 + len(header.encode())
        spans = {name: entry["data_offsets"] for name, entry in entries.items()}
        return cls(
            header=header,
            dtypes={name: entry["dtype"] for name, entry in entries.items()},
            shapes={name: tuple(entry["shape"]) for name, entry in entries.items()},
            offsets={name: start + begin for name, (begin, _) in spans.items()},
            sizes={name: end - begin for name, (begin, end) in spans.items()},
            num_bytes=start + max((end for _, end in spans.values()), default=0),
        )

    @classmethod
    def read(cls, path: Path) -> SafetensorsFile:
        """Read the head of the file at `path`."""
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            return cls.from_header(file.read(length).decode())

    @property
    def head(self) -> bytes:
        """The bytes before the first tensor."""
        encoded = self.header.encode()
        return struct.pack("<Q", len(encoded)) + encoded


class HfWeights:
    """Memory-mapped view of a folder's safetensors.

    Tensors go by the names of the causal language model, also where the file has those of a wrapper around it
    (`_orig_mod.model...`, `module.model...`) or of the model without its head (`layers.0...`).

    FolderError: no safetensors, an index that does not fit the files, or a damaged file.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if (self.folder / INDEX).exists():
            weight_map = _weight_map(self.folder / INDEX)
        elif (self.folder / SINGLE).exists():
            weight_map = None
        else:
            raise FolderError(f"{self.folder} holds neither {SINGLE} nor {INDEX}; {_instead(self.folder)}")
        names = [SINGLE] if weight_map is None else sorted(set(weight_map.values()))
        self._open: dict[str, safe_open] = {}
        self.files: dict[str, SafetensorsFile] = {name: self._open_file(name) for name in names}
        self._file_of = {tensor: name for name, file in self.files.items() for tensor in file.shapes}
        for name, file in self.files.items():
            for tensor in file.shapes:
                if self._file_of[tensor] != name:
                    raise FolderError(f"{self.folder}: both {name} and {self._file_of[tensor]} hold {tensor}")
        for tensor, name in (weight_map or {}).items():
            if self._file_of.get(tensor) != name:
                raise FolderError(f"{self.folder / name} does not hold {tensor}, which {INDEX} places there; {AGAIN}")
        self._stored = _by_model_name(self._file_of)

    def _open_file(self, name: str) -> SafetensorsFile:
        path = self.folder / name
        if not path.exists():
            link = " (a link to a file that is not there)" if path.is_symlink() else ""
            raise FolderError(f"{self.folder}: the index names {name}, which is missing{link}; {AGAIN}")
        try:
            self._open[name] = safe_open(path, framework="pt")  # checks the head against the file's size
            return SafetensorsFile.read(path)
        except (SafetensorError, struct.error, OSError) as error:
            why = failed_download(path) or _cut_short(path) or f"{error}; {AGAIN}"
            raise FolderError(f"{path} is not a readable safetensors file: {_it(why)}") from error

    @property
    def names(self) -> set[str]:
        """Return the names of all tensors."""
        return set(self._stored)

    @property
    def renamed(self) -> bool:
        """Tell whether the files call any tensor otherwise than `names` does."""
        return any(name != stored for name, stored in self._stored.items())

    def _place(self, name: str) -> tuple[SafetensorsFile, str]:
        """(the file that holds tensor `name`, what it is called there)."""
        stored = self._stored[name]
        return self.files[self._file_of[stored]], stored

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        file, stored = self._place(name)
        return file.shapes[stored]

    def dtype(self, name: str) -> torch.dtype:
        """FolderError for a tensor of another type than float32, bfloat16 or float16."""
        file, stored = self._place(name)
        dtype = file.dtypes[stored]
        if dtype not in DTYPES:
            raise FolderError(f"{self.folder}: {name} is stored as {dtype}, expected one of {', '.join(DTYPES)}")
        return DTYPES[dtype]

    def get(self, name: str) -> Tensor:
        """The whole tensor, memory-mapped where the platform can."""
        stored = self._stored[name]
        return self._open[self._file_of[stored]].get_tensor(stored)

    def extents(self, name: str, row: int = 0, num_rows: int | None = None) -> list[Extent]:
        """Where the bytes of `name` lie, from row `row` on."""
        file, stored = self._place(name)
        rows = self.shape(name)[0]
        row_bytes = file.sizes[stored] // rows
        num_rows = rows - row if num_rows is None else num_rows
        path = str(self.folder / self._file_of[stored])
        return [Extent(path, file.offsets[stored] + row * row_bytes, num_rows * row_bytes)]


def _by_model_name(stored: Iterable[str]) -> dict[str, str]:
    """The name that the causal language model has for each tensor -> the stored one. Names that would not be unique
    then stay as they are."""
    stored = list(stored)
    names = {name: _unwrapped(name) for name in stored}
    if HF_EMBEDDING.removeprefix(BASE_PREFIX) in names.values():
        names = {old: new if new == HF_HEAD else BASE_PREFIX + new for old, new in names.items()}
    if len(set(names.values())) < len(stored):
        return {name: name for name in stored}
    return {new: old for old, new in names.items()}


def _unwrapped(name: str) -> str:
    """The name of a tensor without the parts that wrappers put in."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while parts[:1] == ["module"]:
        del parts[0]
    return ".".join(parts)


def _it(why: str) -> str:
    """`why` with a subject, where it is what `failed_download` says."""
    return f"it {why}" if why.startswith("is ") else why


def _cut_short(path: Path) -> str | None:
    """How much of a safetensors file is there, when its head is whole and its end is missing."""
    try:
        expected = SafetensorsFile.read(path).num_bytes
    except (ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError, struct.error, OSError):
        return None
    size = path.stat().st_size
    return f"it is cut short, {size} bytes of {expected}; {AGAIN}" if size < expected else None


def _instead(folder: Path) -> str:
    """What to do about a folder without weights, by what it holds instead."""
    if (folder / "adapter_config.json").is_file():
        return (
            "it is an adapter (LoRA): merge it into its base model with peft's merge_and_unload() and save that with "
            "save_pretrained()"
        )
    if shards := sorted(folder.glob("model-*-of-*.safetensors")):
        return f"{len(shards)} files such as {shards[0].name} are there without it; {AGAIN}"
    return "name a Hugging Face folder, or convert the weights to safetensors first"


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = dict(json.loads(index.read_text())["weight_map"])
        if not all(isinstance(name, str) for name in weight_map.values()):
            raise TypeError("its weight_map has values that are no file names")
        return weight_map
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if why := failed_download(index):
            raise FolderError(f"{index} {why}") from error
        raise FolderError(f"{index} is damaged: {type(error).__name__}: {error}; {AGAIN}") from error


def expected_shapes(facts: ModelFacts) -> dict[str, tuple[int, ...]]:
    """Hugging Face names and shapes of all distinct tensors of the model, in the order of the forward pass."""
    return {
        name: dims for entry in weight_table(facts) for name, dims in zip(entry.hf_names, entry.hf_shapes, strict=True)
    }


def check_folder(weights: HfWeights, facts: ModelFacts) -> None:
    """FolderError naming the first missing, extra or misshapen tensor of the folder."""
    expected = expected_shapes(facts)
    # Derived or duplicated by some writers; carries nothing of its own.
    ignorable = {name for name in weights.names if name.endswith(BUFFERS)}
    if facts.tied_embeddings:
        ignorable.add(HF_HEAD)
    _check_side_files(weights.folder)
    if missing := sorted(expected.keys() - weights.names):
        mend = _other_names(weights.names, facts) or AGAIN
        raise FolderError(f"{weights.folder}: {len(missing)} tensors are missing, first {missing[0]}; {mend}")
    if extra := sorted(weights.names - expected.keys() - ignorable):
        raise FolderError(
            f"{weights.folder}: {len(extra)} tensors do not belong to a {facts.model_type} model, first {extra[0]}; "
            "remove them, or use the config.json that the weights were saved with"
        )
    for name, dims in expected.items():
        if weights.shape(name) != dims:
            raise FolderError(
                f"{weights.folder}: {name} has shape {weights.shape(name)}, config.json says {dims}; "
                "use the config.json that the weights were saved with"
            )
    if facts.tied_embeddings and HF_HEAD in weights.names:
        maps = MappedFiles()
        pairs = (blocks(weights.extents(name), BLOCK_BYTES) for name in (HF_HEAD, HF_EMBEDDING))
        kinds = [(weights.shape(name), weights.dtype(name)) for name in (HF_HEAD, HF_EMBEDDING)]
        if kinds[0] != kinds[1] or not all(maps.equal(head, other) for ((head,), (other,)) in zip(*pairs, strict=True)):
            raise FolderError(
                f"{weights.folder}: config.json ties the embeddings, but {HF_HEAD} differs from {HF_EMBEDDING}; "
                f"set tie_word_embeddings to false there, or remove {HF_HEAD}"
            )


def _check_side_files(folder: Path) -> None:
    """FolderError when a file that is copied beside the weights is a pointer or a web page instead."""
    for name in SIDE_FILES:
        path = folder / name
        if path.is_file() and path.suffix != ".md" and (why := failed_download(path)):
            raise FolderError(f"{path} {why}")


def _other_names(names: set[str], facts: ModelFacts) -> str | None:
    """What to do about a folder in which tensors are missing because of one thing about all its names, else None."""
    if any(".lora_A." in name or ".base_layer." in name for name in names):
        return (
            "it holds an adapter (LoRA) around the model; merge it with peft's merge_and_unload() and save the result "
            "with save_pretrained()"
        )
    embedding = min((name for name in names if name.endswith("." + HF_EMBEDDING)), key=len, default=None)
    if embedding is not None:
        return (
            f"it holds {embedding} and so on, with the prefix {embedding.removesuffix(HF_EMBEDDING)!r} of a model "
            "around the language model; save the language model alone"
        )
    if HF_EMBEDDING in names and HF_HEAD not in names and not facts.tied_embeddings:
        return (
            "config.json says tie_word_embeddings=false: use the folder of the whole causal language model, or set "
            "tie_word_embeddings to true if the head is the embedding"
        )
    return None


@dataclass(frozen=True)
class HfLayout:
    """Which safetensors file holds which tensor where, before any is written. `index` is None for a single file."""

    files: dict[str, SafetensorsFile]
    index: str | None

    @classmethod
    def planned(cls, facts: ModelFacts, dtype: torch.dtype, max_shard_bytes: int = MAX_SHARD_BYTES) -> HfLayout:
        """Consecutive tensors in files of at most `max_shard_bytes` of data (or one tensor)."""
        shards: list[dict[str, tuple[int, ...]]] = [{}]
        filled = total = 0
        for name, dims in expected_shapes(facts).items():
            size = torch.Size(dims).numel() * dtype.itemsize
            if shards[-1] and filled + size > max_shard_bytes:
                shards.append({})
                filled = 0
            shards[-1][name] = dims
            filled, total = filled + size, total + size
        count = len(shards)
        if count == 1:
            return cls({SINGLE: SafetensorsFile.from_header(_header(shards[0], dtype))}, None)
        files = {
            f"model-{i + 1:05d}-of-{count:05d}.safetensors": SafetensorsFile.from_header(_header(shard, dtype))
            for i, shard in enumerate(shards)
        }
        weight_map = {name: file for file, content in files.items() for name in content.shapes}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        return cls(files, json.dumps(index, indent=2, sort_keys=True) + "\n")

    @classmethod
    def recorded(cls, headers: Mapping[str, str], index: str | None) -> HfLayout:
        """The layout of an existing folder, from the heads of its files. ValueError when they are not heads."""
        return cls({name: SafetensorsFile.from_header(header) for name, header in headers.items()}, index)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all tensors by name."""
        return {name: shape for file in self.files.values() for name, shape in file.shapes.items()}

    def dtypes(self) -> set[torch.dtype]:
        """Return the types that occur."""
        return {DTYPES[dtype] for file in self.files.values() for dtype in file.dtypes.values()}

    def is_sound(self) -> bool:
        """Whether the files are safetensors files of one folder, and each is covered by its tensors exactly once."""
        for name, file in self.files.items():
            if Path(name).name != name or not name.endswith(".safetensors"):
                return False
            end = len(file.head)
            for tensor in sorted(file.offsets, key=lambda tensor: file.offsets[tensor]):
                size = torch.Size(file.shapes[tensor]).numel() * DTYPES[file.dtypes[tensor]].itemsize
                if (file.offsets[tensor], file.sizes[tensor]) != (end, size):
                    return False
                end += size
        return True

    def place(self, tensor: str) -> tuple[str, int]:
        """(file, offset) of `tensor`."""
        return next((name, file.offsets[tensor]) for name, file in self.files.items() if tensor in file.offsets)


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> str:
    """The head of a safetensors file, padded so that the tensors are aligned to 8 bytes."""
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dims in shapes.items():
        end = offset + torch.Size(dims).numel() * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(dims), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries, separators=(",", ":"))
    return header + " " * (-len(header) % 8)


def write_hf_folder(
    folder: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    source: str | Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    *,
    facts: ModelFacts | None = None,
    change_config: Callable[[bytes], bytes] = bytes,
) -> Path:
    """Write `tensors` as sharded safetensors with an index, and the side files of `source`, then rename into place.

    Streams: each tensor goes to its place and is forgotten. An existing `folder` is replaced at the end.

    folder           to write
    tensors          (Hugging Face name, whole tensor)
    source           a model's folder
    max_shard_bytes  of a file
    facts            of the model that is written, None: of `source`
    change_config    makes its config.json of that in `source`
    """
    facts = facts or ModelFacts.from_folder(source)
    layout, files, dtype = None, {}, None
    missing = set(expected_shapes(facts))
    with replacing_folder(folder) as aside:
        try:
            for name, tensor in tensors:
                if layout is None:
                    dtype = tensor.dtype
                    layout = HfLayout.planned(facts, dtype, max_shard_bytes)
                    for file, content in layout.files.items():
                        files[file] = open(aside / file, "wb")  # noqa: SIM115
                        files[file].write(content.head)
                file, offset = layout.place(name)
                files[file].seek(offset)
                files[file].write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
                missing.discard(name)
        finally:
            for open_file in files.values():
                open_file.close()
        assert layout is not None and not missing, f"tensors that nobody sent: {sorted(missing)[:3]}"
        for name, data in side_files(source, dtype).items():
            (aside / name).write_bytes(change_config(data) if name == "config.json" else data)
        if layout.index is not None:
            (aside / INDEX).write_text(layout.index)
    return Path(folder)


def side_files(source: str | Path, dtype: torch.dtype | None = None) -> dict[str, bytes]:
    """The files of `source` that make a folder a model beside its weights, byte for byte.

    In config.json the weights' type becomes `dtype`, when one is given and it differs.
    """
    files = {name: (Path(source) / name).read_bytes() for name in SIDE_FILES if (Path(source) / name).is_file()}
    values = json.loads(files["config.json"])
    key = "torch_dtype" if "torch_dtype" in values else "dtype"
    name = str(dtype).removeprefix("torch.")
    if dtype is not None and values.get(key, name) != name:
        files["config.json"] = (json.dumps(values | {key: name}, indent=2) + "\n").encode()
    return files
