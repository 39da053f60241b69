"""The converters in one process: bytes there and back, files of every kind, changes of type, memory.

Bad input, kill -9 and loading at other TP x PP are not tested here.
"""

from __future__ import annotations

import argparse
import filecmp
import itertools
import json
import math
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from remax_megatron.convert import copying, hf_to_megatron, megatron_to_hf, roundtrip
from remax_megatron.errors import UserError
from remax_megatron.model_facts import ModelFacts
from remax_megatron.weights.hf_folder import INDEX, HfWeights, SafetensorsFile, expected_shapes
from remax_megatron.weights.torch_dist import TorchDist
from tests import ROOT
from tests.convert.folders import (
    BF16,
    FP16,
    FP32,
    HEADS,
    LARGE_VOCAB,
    SMALL_VOCAB,
    as_bytes,
    back,
    check_same_files,
    contents,
    load,
    random_tensors,
    same_tensors,
    there,
    there_and_back,
    verified,
    write_config,
    write_index,
    write_model,
)
from tests.small_models import YARN, make_qwen2, make_qwen3


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


@pytest.mark.parametrize("rope", [None, YARN])
@pytest.mark.parametrize(("tied", "dtype", "shard"), [(True, BF16, "5GB"), (False, FP32, "200KB")])
def test_qwen3_there_and_back_is_byte_equal(tied: bool, dtype: torch.dtype, shard: str, rope, tmp_path: Path) -> None:
    source = make_qwen3(tmp_path / "source", tied=tied, dtype=dtype, max_shard_size=shard, layers=2, rope=rope)
    assert (source / INDEX).exists() == (shard == "200KB")
    check_same_files(source, there_and_back(source, tmp_path))
    keys = TorchDist(tmp_path / "megatron" / "iter_0000000").tensors
    assert {f"decoder.layers.self_attention.{x}_layernorm.weight" for x in "qk"} <= keys.keys()
    assert "decoder.layers.self_attention.linear_qkv.bias" not in keys


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
