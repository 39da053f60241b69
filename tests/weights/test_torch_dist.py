"""What torch's own reader finds in our checkpoints, their small files, and the reading of files in stretches."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from remax_megatron.convert import hf_to_megatron
from remax_megatron.model_facts import ModelFacts
from remax_megatron.weights.mapped import Extent, MappedFiles, blocks
from remax_megatron.weights.megatron_folder import MegatronWeights
from remax_megatron.weights.shards import to_megatron
from remax_megatron.weights.torch_dist import saved_key
from remax_megatron.weights.torch_dist_writer import item_wrapper, object_item
from remax_megatron.weights.weight_table import weight_table
from tests import ROOT
from tests.convert.folders import BF16, FP16, FP32, SIDE_FILES, SMALL_VOCAB, as_bytes, load, there, write_model

NAMES_OF_TWO_LAYERS = {
    "embedding.word_embeddings.weight": (1280, 32),
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (2, 32),
    "decoder.layers.self_attention.linear_qkv.weight": (2, 48, 32),  # (8 + 2 + 2) heads of 4
    "decoder.layers.self_attention.linear_qkv.bias": (2, 48),
    "decoder.layers.self_attention.linear_proj.weight": (2, 32, 32),
    "decoder.layers.mlp.linear_fc1.layer_norm_weight": (2, 32),
    "decoder.layers.mlp.linear_fc1.weight": (2, 96, 32),
    "decoder.layers.mlp.linear_fc2.weight": (2, 32, 48),
    "decoder.final_layernorm.weight": (32,),
}
OBJECTS_OF_TWO_LAYERS = {
    "decoder.layers.self_attention.linear_qkv._extra_state/shard_0_2",
    "decoder.layers.self_attention.linear_qkv._extra_state/shard_1_2",
    "decoder.layers.self_attention.linear_proj._extra_state/shard_0_2",
    "decoder.layers.self_attention.linear_proj._extra_state/shard_1_2",
    "decoder.layers.self_attention.core_attention._extra_state/shard_0_2",
    "decoder.layers.self_attention.core_attention._extra_state/shard_1_2",
    "decoder.layers.mlp.linear_fc1._extra_state/shard_0_2",
    "decoder.layers.mlp.linear_fc1._extra_state/shard_1_2",
    "decoder.layers.mlp.linear_fc2._extra_state/shard_0_2",
    "decoder.layers.mlp.linear_fc2._extra_state/shard_1_2",
    "decoder.final_layernorm._extra_state/shard_0_1",
}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(("tied", "chunk_bytes"), [(True, 128 * 2**20), (False, 100 * 32 * 4)])
def test_torch_reads_the_tensors(tied: bool, chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names and shapes are Megatron's at TP 1, and torch's own reader finds the merged tensors, padded with zeros."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

    monkeypatch.setattr(hf_to_megatron, "MAX_CHUNK_BYTES", chunk_bytes)
    source = write_model(tmp_path / "source", tied=tied, dtype=FP32)
    folder = there(source, tmp_path / "megatron") / "iter_0000000"
    assert (tmp_path / "megatron" / "latest_checkpointed_iteration.txt").read_text().strip() == "0"

    found = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    shapes = {key: tuple(m.size) for key, m in found.items() if isinstance(m, TensorStorageMetadata)}
    assert shapes == NAMES_OF_TWO_LAYERS | ({} if tied else {"output_layer.weight": (1280, 32)})
    assert {m.properties.dtype for m in found.values() if isinstance(m, TensorStorageMetadata)} == {FP32}
    objects = {key for key, m in found.items() if isinstance(m, BytesStorageMetadata)}
    assert objects == OBJECTS_OF_TWO_LAYERS and objects | shapes.keys() == found.keys()
    if chunk_bytes < 2**20:
        assert [chunk.sizes[0] for chunk in found["embedding.word_embeddings.weight"].chunks] == [100] * 12 + [80]

    loaded = {key: torch.ones(shape) for key, shape in shapes.items()}
    dcp.load(loaded, checkpoint_id=folder, no_dist=True)
    facts, hf = ModelFacts.from_folder(source), load(source)
    expected: dict[str, list[Tensor]] = {}
    for entry in weight_table(facts):
        expected.setdefault(saved_key(entry), []).append(to_megatron(entry, hf, facts, 1, 0))
    assert expected.keys() == shapes.keys()
    for key, parts in expected.items():
        whole = torch.stack(parts) if key.startswith("decoder.layers.") else parts[0]
        assert as_bytes(loaded[key]) == as_bytes(whole), key
    for key in shapes.keys() & {"embedding.word_embeddings.weight", "output_layer.weight"}:
        assert as_bytes(loaded[key][SMALL_VOCAB:]) == bytes((1280 - SMALL_VOCAB) * 32 * 4)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_reads_the_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron asks for them with every model it loads."""
    import torch.distributed.checkpoint as dcp

    monkeypatch.setattr(hf_to_megatron, "MAX_FILE_BYTES", 2**15)  # they lie in the last of several files
    folder = there(write_model(tmp_path / "source"), tmp_path / "megatron") / "iter_0000000"
    assert len(list(folder.glob("*.distcp"))) > 1
    loaded: dict[str, object] = {key: io.BytesIO() for key in OBJECTS_OF_TWO_LAYERS}
    dcp.load(loaded, checkpoint_id=folder, no_dist=True)
    assert loaded == {key: [None] for key in OBJECTS_OF_TWO_LAYERS}


def test_small_files_of_the_checkpoint(tmp_path: Path) -> None:
    megatron = there(write_model(tmp_path / "source"), tmp_path / "megatron")
    folder = megatron / "iter_0000000"
    assert json.loads((folder / "metadata.json").read_text()) == {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    common = torch.load(folder / "common.pt", weights_only=True)
    assert common["iteration"] == 0 and common["checkpoint_version"] == 3.0
    names = {"latest_checkpointed_iteration.txt", "config.json", "iter_0000000"}
    assert {path.name for path in megatron.iterdir()} == names | SIDE_FILES.keys()
    assert all((megatron / name).read_bytes() == data for name, data in SIDE_FILES.items())
    inside = {"__0_0.distcp", ".metadata", "metadata.json", "common.pt", "tensor_manifest.json"}
    assert {path.name for path in folder.iterdir()} == inside


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("shape", [(1,), (5,), (1, 1), (3, 7), (1, 33, 3), (2, 3, 5)])
def test_item_wrapper(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randn(shape).to(dtype)
    before, after = item_wrapper(shape, dtype)
    item = before + as_bytes(tensor) + after
    loaded = torch.load(io.BytesIO(item), weights_only=True)
    assert (loaded.dtype, loaded.shape) == (dtype, shape) and torch.equal(loaded, tensor)
    assert len(before) % 64 == 0


def test_object_item() -> None:
    assert torch.load(io.BytesIO(object_item(None)), weights_only=True) == [None]


@pytest.mark.parametrize(("kv", "dtype"), [(2, BF16), (8, FP32)])
def test_megatron_weights_read_any_rows(
    kv: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_to_megatron, "MAX_CHUNK_BYTES", 100 * 32 * dtype.itemsize)
    source = write_model(tmp_path / "source", kv=kv, dtype=dtype)
    facts = ModelFacts.from_folder(source)
    weights = MegatronWeights(there(source, tmp_path / "megatron"), facts)
    maps, chance = MappedFiles(), random.Random(kv)
    tensors = load(source)
    assert weights.names == tensors.keys()
    for name, tensor in tensors.items():
        assert weights.shape(name) == tensor.shape and weights.dtype(name) == dtype
        assert as_bytes(weights.get(name)) == as_bytes(tensor)
        for _ in range(20):
            row = chance.randrange(len(tensor))
            num_rows = chance.randint(1, len(tensor) - row)
            found = b"".join(bytes(maps.read(extent)) for extent in weights.extents(name, row, num_rows))
            assert found == as_bytes(tensor[row : row + num_rows]), (name, row, num_rows)
        found = b"".join(bytes(maps.read(extent)) for extent in weights.extents(name, 1))
        assert found == as_bytes(tensor[1:])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 50), st.integers(0, 40))), st.integers(1, 30))
def test_blocks(stretches: list[tuple[str, int, int]], num_bytes: int) -> None:
    extents = [Extent(*stretch) for stretch in stretches]
    groups = list(blocks(extents, num_bytes))

    def places(these: Iterable[Extent]) -> list[tuple[str, int]]:
        return [(e.path, byte) for e in these for byte in range(e.offset, e.offset + e.num_bytes)]

    assert places(extent for group in groups for extent in group) == places(extents)
    sizes = [sum(extent.num_bytes for extent in group) for group in groups]
    assert all(size == num_bytes for size in sizes[:-1]) and all(0 < size <= num_bytes for size in sizes[-1:])
    assert all(extent.num_bytes for group in groups for extent in group)


def test_mapped_files_read_any_stretch(tmp_path: Path) -> None:
    data = random.Random(0).randbytes(20_001)
    path = tmp_path / "file"
    path.write_bytes(data)
    maps = MappedFiles()
    for offset, num_bytes in [(0, 1), (1, 3), (4095, 2), (4096, 4096), (4097, 12_345), (20_000, 1), (0, 20_001)]:
        extent = Extent(str(path), offset, num_bytes)
        for _ in range(2):  # also after it was released
            maps.prefetch(extent)
            assert bytes(maps.read(extent)) == data[offset : offset + num_bytes]
            maps.release(extent)
    with pytest.raises(OSError, match="too short"):
        maps.read(Extent(str(path), 20_000, 2))


@pytest.mark.parametrize("kept", [8192, 17_000], ids=["pages are gone", "the last page is shorter"])
def test_a_file_that_shrank_is_an_error(kept: int, tmp_path: Path) -> None:
    """Not the death of the process, nor zeros. In a process of its own: what is tested against kills it."""
    code = (
        "import os, sys\n"
        "from remax_megatron.weights.mapped import Extent, MappedFiles\n"
        "path, kept, maps = sys.argv[1], int(sys.argv[2]), MappedFiles()\n"
        "assert bytes(maps.read(Extent(path, 0, 16))) == b'x' * 16\n"
        "os.truncate(path, kept)\n"
        "try:\n"
        "    print(set(bytes(maps.read(Extent(path, 8192, 11808)))))\n"
        "except OSError as error:\n"
        "    print('OSError', error.filename)\n"
    )
    path = tmp_path / "file"
    path.write_bytes(b"x" * 20_000)
    command = [sys.executable, "-c", code, str(path), str(kept)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()) == (0, ["OSError", str(path)]), done
