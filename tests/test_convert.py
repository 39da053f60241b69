"""The converters in one process: bytes there and back, what others read in our checkpoints, what verify finds.

Bad input, kill -9 and loading at other TP x PP are not tested here.
"""

from __future__ import annotations

import argparse
import filecmp
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from remax_megatron.convert import copying, hf_to_megatron, logits, megatron_to_hf, roundtrip, verify
from remax_megatron.errors import UserError
from remax_megatron.model_facts import ModelFacts
from remax_megatron.weights.hf_folder import INDEX, HfWeights, SafetensorsFile, expected_shapes
from remax_megatron.weights.mapped import Extent, MappedFiles, blocks
from remax_megatron.weights.megatron_folder import MegatronWeights
from remax_megatron.weights.torch_dist import TorchDist, saved_key
from remax_megatron.weights.torch_dist_writer import item_wrapper, object_item
from remax_megatron.weights.weight_table import to_megatron, weight_table
from tests.conftest import ROOT
from tests.small_models import make_qwen2

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HEADS = 8
# Qwen2.5's vocabularies are 1187 x 128 and 1188 x 128; divided by 128 neither is a multiple of 128.
SMALL_VOCAB, LARGE_VOCAB = 151936 // 128, 152064 // 128
SIDE_FILES = {
    "generation_config.json": b'{\n  "temperature": 0.7\n}',
    "tokenizer.json": '{"version": "1.0", "word": "北京"}'.encode(),
    "tokenizer_config.json": b'{"model_max_length": 1e+30}\r\n',
    "vocab.json": b"{}",
    "merges.txt": "#version: 0.2\nĠ a\n".encode(),
    "chat_template.jinja": b"{{ messages }}",
    "LICENSE": b"\xff\xfe not UTF-8 \x00",
}
QKV, FC1 = "decoder.layers.self_attention.linear_qkv.weight", "decoder.layers.mlp.linear_fc1.weight"


def random_tensors(facts: ModelFacts, dtype: torch.dtype, seed: int = 0, bits: bool = True) -> dict[str, Tensor]:
    """All tensors of the model: every bit at random (NaN and infinities included), or numbers around 0."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, dims in expected_shapes(facts).items():
        if bits:
            raw = torch.randint(0, 256, (*dims, dtype.itemsize), dtype=torch.uint8, generator=generator)
            tensors[name] = raw.view(dtype).squeeze(-1)
        else:
            tensors[name] = (0.1 * torch.randn(dims, generator=generator)).to(dtype)
    return tensors


def write_config(folder: Path, dtype: torch.dtype, *, tied=False, kv=2, vocab=SMALL_VOCAB, hidden=32, ffn=48) -> None:
    """config.json as it was before transformers 5, on one line, with a key that nobody knows; and the side files."""
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": kv,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": vocab,
        "note": "µ",
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    for name, data in SIDE_FILES.items():
        (folder / name).write_bytes(data)


def write_model(folder: Path, *, dtype=BF16, num_files=1, seed=0, bits=True, **sizes) -> Path:
    """A Qwen2 folder as safetensors writes it, of two layers and `HEADS` heads; returns the folder."""
    write_config(folder, dtype, **sizes)
    tensors = random_tensors(ModelFacts.from_folder(folder), dtype, seed, bits)
    names = sorted(tensors)
    if num_files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    files = {f"model-{i + 1:05d}-of-{num_files:05d}.safetensors": names[i::num_files] for i in range(num_files)}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, folder / file, metadata={"format": "pt"})
    write_index(folder, files, tensors)
    return folder


def write_index(folder: Path, files: Mapping[str, Iterable[str]], tensors: Mapping[str, Tensor]) -> None:
    index = {
        "metadata": {
            "total_parameters": sum(tensor.numel() for tensor in tensors.values()),
            "total_size": sum(tensor.nbytes for tensor in tensors.values()),
        },
        "weight_map": {name: file for file, held in files.items() for name in held},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def load(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def same_tensors(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Equal names, types, shapes and bytes."""
    return a.keys() == b.keys() and all(
        (a[name].dtype, a[name].shape, as_bytes(a[name])) == (b[name].dtype, b[name].shape, as_bytes(b[name]))
        for name in a
    )


def contents(folder: Path) -> dict[str, str]:
    """The sha-256 of every file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def there(hf: Path, output: Path, *options: str) -> Path:
    assert hf_to_megatron.main(["--hf", str(hf), "--output", str(output), *options]) == 0
    return output


def back(megatron: Path, output: Path, *options: str) -> Path:
    assert megatron_to_hf.main(["--megatron", str(megatron), "--output", str(output), *options]) == 0
    return output


def there_and_back(hf: Path, work: Path) -> Path:
    return back(there(hf, work / "megatron"), work / "hf")


def check_same_files(source: Path, returned: Path) -> None:
    """All of `source` has come back byte for byte; tensor_manifest.json is all that is new."""
    before, after = contents(source), contents(returned)
    assert after.pop("tensor_manifest.json")
    assert after == before


def verified(capsys: pytest.CaptureFixture[str], *options: object) -> tuple[int, str]:
    """(exit code, what verify printed on standard output)."""
    capsys.readouterr()
    code = verify.main([str(option) for option in options])
    return code, capsys.readouterr().out


# -- there and back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tied", "kv", "vocab", "dtype", "num_files"),
    [
        (True, 2, SMALL_VOCAB, BF16, 1),
        (False, 2, SMALL_VOCAB, BF16, 3),
        (True, 4, LARGE_VOCAB, BF16, 4),
        (False, 4, LARGE_VOCAB, BF16, 1),
        (True, 8, SMALL_VOCAB, FP32, 2),
        (False, 8, LARGE_VOCAB, FP32, 5),
        (True, 2, LARGE_VOCAB, FP32, 1),
        (False, 4, SMALL_VOCAB, FP16, 1),
        (True, 8, LARGE_VOCAB, FP16, 3),
        (False, 2, 1280, BF16, 26),  # no padding; a file for (nearly) every tensor
        (False, 1, 1, FP16, 1),
    ],
)
def test_there_and_back_is_byte_equal(
    tied: bool, kv: int, vocab: int, dtype: torch.dtype, num_files: int, tmp_path: Path
) -> None:
    source = write_model(tmp_path / "source", tied=tied, kv=kv, vocab=vocab, dtype=dtype, num_files=num_files)
    before = contents(source)
    returned = there_and_back(source, tmp_path)
    check_same_files(source, returned)
    assert contents(source) == before  # the input is as it was
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron", "source"]  # nothing left beside


@pytest.mark.parametrize("order", [(True, False, True), (False, True, False)])
def test_tied_and_untied_in_one_process(order: tuple[bool, ...], tmp_path: Path) -> None:
    for i, tied in enumerate(order):
        source = write_model(tmp_path / f"source-{i}", tied=tied, seed=i)
        returned = there_and_back(source, tmp_path / str(i))
        check_same_files(source, returned)
        keys = TorchDist(tmp_path / str(i) / "megatron" / "iter_0000000").tensors
        assert ("output_layer.weight" in keys) == (not tied)


@pytest.mark.parametrize("block_bytes", [64, 1000, 4096])
def test_blocks_of_any_size_make_the_same_files(
    block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With blocks, pwritev groups, chunks and files so small that tensors are cut everywhere."""
    source = write_model(tmp_path / "source", dtype=FP32, kv=4)
    monkeypatch.setattr(copying, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(copying, "MAX_VECTORS", 3)
    monkeypatch.setattr(hf_to_megatron, "MAX_CHUNK_BYTES", 7 * 32 * 4)  # 7 rows: 1280 are 183 chunks, the last ones 0
    monkeypatch.setattr(hf_to_megatron, "MAX_FILE_BYTES", 2**16)
    megatron = there(source, tmp_path / "megatron")
    embedding = TorchDist(megatron / "iter_0000000").tensors["embedding.word_embeddings.weight"]
    assert len(embedding.chunks) == 183 and [c.shape for c in embedding.chunks][-2:] == [(7, 32), (6, 32)]
    assert len(list(megatron.glob("iter_0000000/*.distcp"))) == 3
    check_same_files(source, back(megatron, tmp_path / "hf"))
    wide = back(there(source, tmp_path / "bf16", "--dtype", "bf16"), tmp_path / "hf-bf16")
    monkeypatch.undo()
    plain = back(there(source, tmp_path / "plain", "--dtype", "bf16"), tmp_path / "hf-plain")
    assert contents(wide) == contents(plain)


def test_a_write_cut_short_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a signal or a nearly full disk leaves it: 5 bytes of the first try, then 3 at a time."""
    whole, data = os.pwrite, random.Random(0).randbytes(40)
    monkeypatch.setattr(os, "pwritev", lambda handle, views, offset: whole(handle, b"".join(views)[:5], offset))
    monkeypatch.setattr(os, "pwrite", lambda handle, view, offset: whole(handle, view[:3], offset))
    monkeypatch.setattr(copying, "MAX_VECTORS", 2)
    path = tmp_path / "file"
    with open(path, "wb") as file:
        copying._write_at(file.fileno(), [memoryview(data)[a:b] for a, b in [(0, 7), (7, 8), (8, 10), (10, 40)]], 100)
    assert path.read_bytes() == bytes(100) + data


@pytest.mark.parametrize(("tied", "dtype", "shard_bytes"), [(True, BF16, "100KB"), (False, FP32, "5GB")])
def test_folders_that_transformers_writes_come_back(
    tied: bool, dtype: torch.dtype, shard_bytes: str, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    sizes = dict(vocab=SMALL_VOCAB, heads=HEADS, kv=4, layers=2)
    make_qwen2(source, tied=tied, dtype=dtype, max_shard_size=shard_bytes, **sizes)
    assert (len(list(source.glob("*.safetensors"))) > 1) == (shard_bytes == "100KB")
    check_same_files(source, there_and_back(source, tmp_path))


def write_by_hand(path: Path, tensors: Mapping[str, Tensor], chance: random.Random) -> None:
    """A safetensors file: tensors in one random order, the header's entries in another, odd spaces and metadata."""
    order = chance.sample(sorted(tensors), len(tensors))
    ends = list(itertools.accumulate(tensors[name].nbytes for name in order))
    names = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
    entries: dict[str, dict] = {
        name: {
            "data_offsets": [end - tensors[name].nbytes, end],
            "dtype": names[tensors[name].dtype],
            "shape": list(tensors[name].shape),
        }
        for name, end in zip(order, ends, strict=True)
    }
    entries["__metadata__"] = {"made by": 'a "hand", 手', "empty": "", "\t\\": "\n"}
    shuffled = {name: entries[name] for name in chance.sample(sorted(entries), len(entries))}
    header = json.dumps(shuffled, indent=chance.choice([None, 1, 3]), ensure_ascii=False).encode()
    header += b" " * chance.randrange(30)  # the tensors are not aligned to anything
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for name in order:
            file.write(as_bytes(tensors[name]))


def test_a_bare_checkpoint_needs_a_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_model(tmp_path / "source", num_files=2)
    megatron = there(source, tmp_path / "megatron")
    check_same_files(source, back(megatron / "iter_0000000", tmp_path / "hf-0"))  # what lies above belongs to it

    bare = tmp_path / "bare"
    shutil.copytree(megatron / "iter_0000000", bare / "release")
    (bare / "latest_checkpointed_iteration.txt").write_text("release")
    assert megatron_to_hf.main(["--megatron", str(bare), "--output", str(tmp_path / "hf-1")]) == 2
    assert "--hf-template" in capsys.readouterr().err and not (tmp_path / "hf-1").exists()
    returned = back(bare, tmp_path / "hf-1", "--hf-template", str(source))
    check_same_files(source, returned)


@pytest.mark.parametrize("num_files", [1, 3])
def test_files_in_an_unusual_order_come_back(num_files: int, tmp_path: Path) -> None:
    chance = random.Random(num_files)
    source = tmp_path / "source"
    write_config(source, BF16, kv=4)
    tensors = random_tensors(ModelFacts.from_folder(source), BF16)
    if num_files == 1:
        write_by_hand(source / "model.safetensors", tensors, chance)
    else:
        names = chance.sample(sorted(tensors), len(tensors))
        files = {f"weights {i}-é.safetensors": names[i::num_files] for i in range(num_files)}
        for file, held in files.items():
            write_by_hand(source / file, {name: tensors[name] for name in held}, chance)
        write_index(source, files, tensors)
    check_same_files(source, there_and_back(source, tmp_path))


def test_an_index_with_windows_line_ends_comes_back(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", num_files=2)
    index = source / INDEX
    index.write_bytes(index.read_bytes().replace(b"\n", b"\r\n"))
    check_same_files(source, there_and_back(source, tmp_path))


def test_a_tensor_in_two_files_is_not_lost(tmp_path: Path) -> None:
    """Equal copies in two files: the weights are right afterwards, or the folder is refused."""
    source = write_model(tmp_path / "source", num_files=2)
    first, second = sorted(source.glob("*.safetensors"))
    twice = load_file(first)
    extra = load_file(second)
    extra["model.norm.weight"] = (twice | extra)["model.norm.weight"]
    twice["model.norm.weight"] = extra["model.norm.weight"]
    save_file(twice, first, metadata={"format": "pt"})
    save_file(extra, second, metadata={"format": "pt"})
    index = json.loads((source / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = second.name
    (source / INDEX).write_text(json.dumps(index))
    try:
        hf_to_megatron.convert(source, tmp_path / "megatron")
    except UserError as error:
        assert "model.norm.weight" in str(error) and not (tmp_path / "megatron").exists()  # noqa: PT017
        return
    returned = back(tmp_path / "megatron", tmp_path / "hf")
    weights = HfWeights(returned)
    assert as_bytes(weights.get("model.norm.weight")) == as_bytes(extra["model.norm.weight"])
    assert same_tensors(load(returned), load(source))


def test_a_tied_folder_with_a_copy_of_the_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_model(tmp_path / "source", tied=True)
    tensors = load(source)
    with_head = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(with_head, source / "model.safetensors", metadata={"format": "pt"})
    returned = there_and_back(source, tmp_path)
    assert same_tensors(load(returned), tensors)
    assert (returned / "config.json").read_bytes() == (source / "config.json").read_bytes()
    code, output = verified(capsys, source, returned)
    assert code == 0 and "26 tensors, no differences" in output
    assert roundtrip.main([str(source)]) == 0


@pytest.mark.parametrize(("tied", "size", "limit"), [(False, "40KB", 40_000), (True, "16KiB", 16_384)])
def test_max_shard_size(tied: bool, size: str, limit: int, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = write_model(tmp_path / "source", tied=tied, dtype=FP32, bits=False)
    returned = back(there(source, tmp_path / "megatron"), tmp_path / "hf", "--max-shard-size", size)
    assert same_tensors(load(returned), load(source))

    index = json.loads((returned / INDEX).read_text())
    paths = sorted(returned.glob("*.safetensors"))
    count = len(paths)
    assert count > 2
    assert [path.name for path in paths] == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    held = {path.name: load_file(path) for path in paths}
    assert index["weight_map"] == {name: file for file, tensors in held.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in held.values() for t in tensors.values())
    for path in paths:  # the limit is one of tensors' bytes, and a tensor above it stands alone
        head = SafetensorsFile.read(path).head
        assert len(head) % 8 == 0  # the tensors are aligned
        data_bytes = path.stat().st_size - len(head)
        assert data_bytes == sum(tensor.nbytes for tensor in held[path.name].values())
        assert data_bytes <= limit or len(held[path.name]) == 1
    alone = sum(len(tensors) == 1 for tensors in held.values())
    assert alone < count  # otherwise the limit was not tried

    state = AutoModelForCausalLM.from_pretrained(returned).state_dict()
    if tied:
        del state["lm_head.weight"]
    assert same_tensors(state, load(source))


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), ("500mb", 5 * 10**8), ("7", 7), ("1kb", 1000)]
)
def test_shard_sizes(text: str, num_bytes: int) -> None:
    assert megatron_to_hf.shard_size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "0", "5 XB", "-1GB", "GB", "0.1", "1e9"])
def test_what_is_no_shard_size(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected a size such as 5GB"):
        megatron_to_hf.shard_size(text)


# -- changes of type ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source_dtype", "option", "target"),
    [(BF16, "fp32", FP32), (FP16, "fp32", FP32), (FP32, "bf16", BF16), (FP16, "bf16", BF16), (BF16, "bf16", BF16)],
)
def test_dtype(source_dtype: torch.dtype, option: str, target: torch.dtype, tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", dtype=source_dtype, bits=False, num_files=2, hidden=64)
    tensors = load(source)
    megatron = there(source, tmp_path / "megatron", "--dtype", option)
    assert {tensor.dtype for tensor in TorchDist(megatron / "iter_0000000").tensors.values()} == {target}
    returned = back(megatron, tmp_path / "hf")
    assert same_tensors(load(returned), {name: tensor.to(target) for name, tensor in tensors.items()})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    for folder in (megatron, returned):
        assert json.loads((folder / "config.json").read_text()) == config | {
            "torch_dtype": str(target).removeprefix("torch.")
        }
    if target == source_dtype:
        check_same_files(source, returned)
    else:  # exact on the way up, so that down again it is what it was
        again = back(there(returned, tmp_path / "m2", "--dtype", "bf16"), tmp_path / "hf2")
        assert same_tensors(load(again), {name: tensor.to(target).to(BF16) for name, tensor in tensors.items()})


def test_dtype_under_the_name_of_transformers_5(tmp_path: Path) -> None:
    source = make_qwen2(tmp_path / "source", tied=True, layers=1)
    config = json.loads((source / "config.json").read_text())
    assert config["dtype"] == "float32" and "torch_dtype" not in config
    returned = back(there(source, tmp_path / "megatron", "--dtype", "bf16"), tmp_path / "hf")
    assert json.loads((returned / "config.json").read_text()) == config | {"dtype": "bfloat16"}


# -- what lies in a checkpoint -----------------------------------------------------------------------------------------

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


# -- mapped files ------------------------------------------------------------------------------------------------------


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


# -- verify ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf, megatron, and back; tests copy what they change."""
    work = tmp_path_factory.mktemp("models")
    source = write_model(work / "source", num_files=2, bits=False, dtype=FP32)
    there_and_back(source, work)
    return work


def test_equal_checkpoints(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, megatron, returned = models / "source", models / "megatron", models / "hf"
    other = there(source, tmp_path / "other")
    for a, b in [(source, returned), (source, megatron), (megatron, source), (megatron, other), (source, source)]:
        code, output = verified(capsys, a, b)
        assert code == 0 and "27 tensors, no differences" in output
    assert verified(capsys, megatron / "iter_0000000", source)[0] == 0


def flip(path: str | Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


NAMES = ["model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["hf", "megatron"])
def test_a_changed_byte_is_named(
    kind: str, name: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = Path(shutil.copytree(models / kind, tmp_path / "damaged"))
    last = verify.open_model(damaged)[0].extents(name)[-1]
    flip(last.path, last.offset + last.num_bytes - 1)
    for folders in [(damaged,), (damaged, models / "source"), (models / "megatron", damaged)]:
        code, output = verified(capsys, *folders)
        assert code == 1
        named = [line for line in output.splitlines() if line.startswith(name)]
        assert named and not any(
            line.startswith(other) for line in output.splitlines() for other in set(NAMES) - {name}
        )
        assert f"{len(named)} differences" in output


def test_padding_is_not_compared(models: Path, tmp_path: Path) -> None:
    """Megatron trains the padding rows of a checkpoint too; they are no part of the model."""
    damaged = Path(shutil.copytree(models / "megatron", tmp_path / "damaged"))
    last = verify.open_model(damaged)[0].extents("lm_head.weight")[-1]
    flip(last.path, last.offset + last.num_bytes)
    assert verify.main([str(damaged), str(models / "source")]) == 0


def test_manifest(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load(models / "source")
    for kind in ("hf", "megatron"):
        content = json.loads(next((models / kind).rglob("tensor_manifest.json")).read_text())
        assert content["digest"] == "xxh3_128"
        assert content["tensors"] == {
            name: {
                "dtype": "float32",
                "shape": list(tensor.shape),
                "digest": xxhash.xxh3_128_hexdigest(as_bytes(tensor)),
            }
            for name, tensor in tensors.items()
        }
        assert verified(capsys, models / kind)[0] == 0
    assert verify.main([str(models / "source")]) == 2  # no manifest, no second folder
    assert "source has no tensor_manifest.json" in capsys.readouterr().err


def test_manifests_of_version_0_1_0(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both kinds were called manifest.json; that of a run's checkpoint says nothing of tensors."""
    old = Path(shutil.copytree(models / "hf", tmp_path / "old"))
    manifest = (old / "tensor_manifest.json").rename(old / "manifest.json")
    assert verified(capsys, old)[0] == 0
    content = json.loads(manifest.read_text())
    content["tensors"]["model.norm.weight"]["digest"] = "0" * 32
    manifest.write_text(json.dumps(content))
    code, said = verified(capsys, old)
    assert code == 1 and "model.norm.weight" in said and "is not what its manifest.json says" in said
    manifest.write_text(json.dumps({"digest": "xxh3_128", "tensors": {}, "files": {}}))
    assert verify.main([str(old)]) == 2
    assert "old has no tensor_manifest.json" in capsys.readouterr().err


def test_json(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "verdict.json"
    assert verified(capsys, models / "source", models / "megatron", "--json", file)[0] == 0
    content = json.loads(file.read_text())
    norm = load(models / "source")["model.norm.weight"]
    assert content["tensors"]["model.norm.weight"] == {
        "dtype": "float32",
        "shape": [32],
        "digest": xxhash.xxh3_128(norm.numpy().tobytes()).hexdigest(),
    }
    assert content["tensors"].keys() == load(models / "source").keys()
    assert content["differences"] == [] and content["max_logit_difference"] is None


def test_other_types_shapes_and_names_are_named(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = models / "source"
    file = tmp_path / "verdict.json"

    narrow = there(source, tmp_path / "narrow", "--dtype", "bf16")
    code, output = verified(capsys, source, narrow, "--json", file)
    differences = json.loads(file.read_text())["differences"]
    assert code == 1 and "... and 17 more" in output and "27 differences" in output and len(differences) == 27
    assert f"lm_head.weight: the dtype is float32 in {source} and bfloat16 in {narrow}" in differences

    wide = write_model(tmp_path / "wide", ffn=56, bits=False, dtype=FP32)
    assert verified(capsys, source, wide, "--json", file)[0] == 1
    differences = json.loads(file.read_text())["differences"]
    by_shape = [line for line in differences if "the shape is" in line]
    assert len(by_shape) == 6 and all("mlp" in line for line in by_shape)
    assert f"model.layers.0.mlp.up_proj.weight: the shape is (48, 32) in {source} and (56, 32) in {wide}" in by_shape

    tied = write_model(tmp_path / "tied", tied=True, bits=False, dtype=FP32)
    for folders, place in [((source, tied), source), ((tied, source), source)]:
        code, output = verified(capsys, *folders)
        assert code == 1 and f"lm_head.weight: only in {place}" in output.splitlines()


# -- logits ------------------------------------------------------------------------------------------------------------


def transformers_logits(folder: Path, prompts: list[list[int]]) -> list[Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=FP32).eval()
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0] for ids in prompts]


def largest_difference(a: Iterable[Tensor], b: Iterable[Tensor]) -> float:
    return max((left - right).abs().max().item() for left, right in zip(a, b, strict=True))


@pytest.mark.parametrize(("tied", "dtype"), [(True, FP32), (False, FP32), (True, BF16), (False, BF16)])
def test_streamed_logits_are_those_of_transformers(
    tied: bool, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logits, "HEAD_ROWS", 500)  # 1187 rows in three blocks
    source = make_qwen2(tmp_path / "source", tied=tied, vocab=SMALL_VOCAB, heads=HEADS, kv=2, layers=2, dtype=dtype)
    prompts = [[3, 1, 1186, 7, 7, 500], [0], list(range(40, 80))]
    expected = transformers_logits(source, prompts)
    assert {tensor.dtype for tensor in load(source).values()} == {dtype}
    assert expected[2].abs().max() > 1  # otherwise 1e-5 says nothing
    for folder in (source, there(source, tmp_path / "megatron")):
        found = logits.StreamedModel(folder).logits(prompts)
        assert [tuple(values.shape) for values in found] == [(6, 1187), (1, 1187), (40, 1187)]
        assert largest_difference(found, expected) <= 1e-5


def test_verify_logits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_qwen2(tmp_path / "source", tied=False, vocab=SMALL_VOCAB, heads=HEADS, layers=2)
    megatron = there(source, tmp_path / "megatron")
    code, output = verified(capsys, source, megatron, "--logits")
    assert code == 0 and "largest difference of a logit: 0 (tolerance 0.0001)" in output

    tensors = load(source)
    tensors["model.layers.1.mlp.down_proj.weight"][5, 7] += 0.5
    other = Path(shutil.copytree(source, tmp_path / "other"))
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    prompts = logits.prompt_ids(source, SMALL_VOCAB)
    expected = largest_difference(transformers_logits(source, prompts), transformers_logits(other, prompts))
    for a, b in [(source, other), (other, megatron)]:
        file = tmp_path / "verdict.json"
        code, output = verified(capsys, a, b, "--logits", "--json", file)
        number = float(re.search(r"largest difference of a logit: (\S+) ", output)[1])
        assert code == 1 and 1e-3 < number == pytest.approx(expected, rel=0.01)
        assert json.loads(file.read_text())["max_logit_difference"] == pytest.approx(expected, rel=1e-3)
        assert "model.layers.1.mlp.down_proj.weight: the digest is" in output


def test_nan_in_the_logits_of_one_prompt_is_not_within_the_tolerance(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", bits=False, dtype=FP32)
    (source / "tokenizer.json").unlink()
    *others, last = logits.prompt_ids(source, SMALL_VOCAB)
    only_there = (set(last) - set().union(*others)).pop()
    damaged = Path(shutil.copytree(source, tmp_path / "damaged"))
    tensors = load(source)
    tensors["model.embed_tokens.weight"][only_there, 0] = math.nan
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    assert math.isnan(logits.max_logit_difference(source, damaged))


def test_prompts_are_text_where_there_is_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer

    from remax_megatron.demo.warm_start import MODEL_CONFIG, make_tokenizer

    source = make_qwen2(tmp_path / "source", tied=False, vocab=MODEL_CONFIG["vocab_size"], layers=2)
    make_tokenizer().save_pretrained(source)
    assert (source / "tokenizer.json").is_file() and (source / "chat_template.jinja").is_file()
    returned = there_and_back(source, tmp_path)
    check_same_files(source, returned)
    tokenizer = AutoTokenizer.from_pretrained(source)
    vocab = ModelFacts.from_folder(source).vocab_size
    for folder in (source, tmp_path / "megatron", tmp_path / "megatron" / "iter_0000000"):
        prompts = logits.prompt_ids(folder, vocab)
        assert prompts[0] == tokenizer("The capital of France is", add_special_tokens=False).input_ids
        assert 0 < len(prompts) <= len(logits.PROMPTS) and all(0 <= i < vocab for ids in prompts for i in ids)
    found = logits.StreamedModel(tmp_path / "megatron").logits(prompts)
    assert largest_difference(found, transformers_logits(source, prompts)) <= 1e-5
    code, output = verified(capsys, source, tmp_path / "megatron", "--logits")
    assert code == 0 and "largest difference of a logit: 0 " in output


# -- the command that does both ----------------------------------------------------------------------------------------


def test_roundtrip_command(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = models / "source"
    before = contents(source)
    assert roundtrip.main([str(source), "--work", str(tmp_path), "--workers", "1"]) == 0
    assert list(tmp_path.iterdir()) == [] and contents(source) == before
    assert re.search(r"^there: .* GB/s.*\nback: .* peak memory .*\n27 tensors, no differences", capsys.readouterr().out)
    assert roundtrip.main([str(source), "--work", str(tmp_path), "--keep"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]
    check_same_files(source, tmp_path / "hf")
    assert roundtrip.main([str(source), "--keep"]) == 2
    assert roundtrip.main([str(source), "--work", str(tmp_path / "none")]) == 2


def test_roundtrip_finds_files_that_differ(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = megatron_to_hf.convert

    def other_head(megatron: Path, output: Path, **options) -> copying.Report:
        report = original(megatron, output, **options)
        path = next(output.glob("*.safetensors"))
        save_file(load_file(path), path, metadata={"format": "other"})
        return report

    monkeypatch.setattr(megatron_to_hf, "convert", other_head)
    assert roundtrip.main([str(models / "source"), "--work", str(tmp_path)]) == 1
    assert "the file is not the one it came from" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


# -- resuming ----------------------------------------------------------------------------------------------------------


class Interrupted:
    """Counts the jobs that are written; the one after `after` (and all later) is stopped by Ctrl-C half-way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int | None = None):
        self.written: list[str] = []
        self.after = after
        original = copying._Writer.write

        def write(writer, job, progress):
            def stop(num_bytes: int) -> None:
                if self.after is not None and len(self.written) >= self.after:
                    raise KeyboardInterrupt
                progress(num_bytes)

            digests = original(writer, job, stop)
            self.written.append(job.name)
            return digests

        monkeypatch.setattr(copying._Writer, "write", write)


@pytest.mark.parametrize("direction", ["there", "back"])
def test_resume_writes_only_what_is_missing(
    direction: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if direction == "there":
        reference, num_jobs = models / "megatron", 1 + 2 * 7 + 2
        convert, source, kind = hf_to_megatron.main, models / "source", "--hf"
    else:
        reference, num_jobs = models / "hf", 27
        convert, source, kind = megatron_to_hf.main, models / "megatron", "--megatron"
    output, partial = tmp_path / "out", tmp_path / ".out.partial"
    command = [kind, str(source), "--output", str(output), "--workers", "1"]
    jobs = Interrupted(monkeypatch, after=5)
    assert convert(command) == 130
    assert len(jobs.written) == 5 and partial.is_dir() and not output.exists()
    assert "--resume goes on with what is in" in capsys.readouterr().err
    assert convert(command) == 2  # without --resume it stays as it is
    assert "add --resume to go on" in capsys.readouterr().err and partial.is_dir()

    journal = partial / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-10])  # the last line cut short: that job is done again
    first, jobs.written, jobs.after = jobs.written[:-1], [], 4
    assert convert([*command, "--resume"]) == 130
    second, jobs.written, jobs.after = jobs.written, [], None
    assert len(second) == 4 and not set(first) & set(second)

    assert convert([*command, "--resume"]) == 0
    assert len(jobs.written) == num_jobs - 8 and not set(first + second) & set(jobs.written)
    assert not partial.exists()
    assert contents(output) == contents(reference)  # the manifest's digests included


def test_resume_does_again_what_was_damaged(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = Interrupted(monkeypatch, after=20)
    with pytest.raises(KeyboardInterrupt):
        megatron_to_hf.convert(models / "megatron", tmp_path / "out", workers=1)
    first, jobs.written, jobs.after = jobs.written, [], None
    for name in first[2:4]:
        extent = HfWeights(models / "source").extents(name)[0]
        flip(tmp_path / ".out.partial" / Path(extent.path).name, extent.offset)
    report = megatron_to_hf.convert(models / "megatron", tmp_path / "out", workers=1, resume=True)
    assert set(jobs.written) & set(first) == set(first[2:4]) and len(jobs.written) == 7 + 2
    assert contents(tmp_path / "out") == contents(models / "hf")
    manifest = json.loads((models / "hf" / "tensor_manifest.json").read_text())["tensors"]
    assert report.digests == {name: entry["digest"] for name, entry in manifest.items()}
    assert report.seconds > 0


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_resume_of_a_change_of_type(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_model(tmp_path / "source", dtype=FP32 if dtype == "bf16" else BF16, bits=False)
    reference = there(source, tmp_path / "reference", "--dtype", dtype)
    command = ["--hf", str(source), "--output", str(tmp_path / "out"), "--workers", "1"]
    jobs = Interrupted(monkeypatch, after=10)
    assert hf_to_megatron.main([*command, "--dtype", dtype]) == 130
    before = contents(tmp_path / ".out.partial")
    assert hf_to_megatron.main([*command, "--resume"]) == 2  # of another type: refused, and left as it was
    assert contents(tmp_path / ".out.partial") == before
    jobs.written, jobs.after = [], None
    assert hf_to_megatron.main([*command, "--dtype", dtype, "--resume"]) == 0
    assert len(jobs.written) == 17 - 10 and contents(tmp_path / "out") == contents(reference)


# -- memory ------------------------------------------------------------------------------------------------------------


def write_large(folder: Path) -> int:
    """A bf16 folder of 0.7 GB, every block of it different; returns its bytes."""
    write_config(folder, BF16, vocab=SMALL_VOCAB, hidden=4096, ffn=10_880)
    shapes = expected_shapes(ModelFacts.from_folder(folder))
    entries: dict[str, dict] = {}
    end = 0
    for name, dims in shapes.items():
        start, end = end, end + 2 * math.prod(dims)
        entries[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    ramp = torch.arange(2**22, dtype=torch.int32)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for start in range(0, end, ramp.nbytes):
            ramp.add_(2**22 + 7)
            file.write(ramp.numpy().data.cast("B")[: end - start])
    return end


def peak_kib(code: str) -> int:
    """Largest resident memory of a Python process that runs `code`, mapped files included."""
    code += "\nprint(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    limit_kib = 350 * 1024
    folders = source, megatron, returned = [tmp_path / name for name in ("source", "megatron", "hf")]
    try:
        assert write_large(source) > 600e6
        base = peak_kib("import torch, remax_megatron.convert.hf_to_megatron")
        code = "from remax_megatron.convert import {0} as m; assert m.main(['--{1}', {2!r}, '--output', {3!r}]) == 0"
        there_kib = peak_kib(code.format("hf_to_megatron", "hf", str(source), str(megatron)))
        back_kib = peak_kib(code.format("megatron_to_hf", "megatron", str(megatron), str(returned)))
        assert filecmp.cmp(source / "model.safetensors", returned / "model.safetensors", shallow=False)
        assert there_kib - base < limit_kib and back_kib - base < limit_kib, (base, there_kib, back_kib)
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)  # pytest would keep 2 GB


def test_logits_show_a_wrong_weight_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both directions of the converters use the table, and so does every digest; `--logits` does not."""
    source = make_qwen2(tmp_path / "source", tied=False)

    def swapped(entry, parts, *args):  # up before gate
        names = entry.hf_names[::-1] if entry.kind == "gate_up" else entry.hf_names
        mixed = {name: parts[other] for name, other in zip(entry.hf_names, names, strict=True)}
        return to_megatron(entry, mixed, *args)

    monkeypatch.setattr("remax_megatron.weights.weight_table.to_megatron", swapped)
    hf_to_megatron.convert(source, tmp_path / "megatron")
    assert verify.compare(source, tmp_path / "megatron").differences == []
    assert logits.max_logit_difference(source, tmp_path / "megatron") > 1e-3
