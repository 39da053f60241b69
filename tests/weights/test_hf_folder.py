"""Hugging Face folders: what is written is read back by us and by transformers, and what is wrong is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from remax_megatron.model_facts import ModelFacts
from remax_megatron.weights.hf_folder import FolderError, HfWeights, check_folder, write_hf_folder
from tests.small_models import make_qwen2

INDEX = "model.safetensors.index.json"


def tensors_dtype(folder: Path) -> set[torch.dtype]:
    weights = HfWeights(folder)
    return {weights.get(name).dtype for name in weights.names}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied Qwen2 of one layer; tests copy it before they change anything."""
    return make_qwen2(tmp_path_factory.mktemp("model") / "source", tied=False, layers=1)


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "model"))


def stream(folder: Path) -> Iterator[tuple[str, Tensor]]:
    weights = HfWeights(folder)
    for name in sorted(weights.names):
        yield name, weights.get(name)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rewrite(folder: Path, **changes: Tensor | None) -> None:
    """Replace (or with None: drop) tensors of model.safetensors; "__" stands for "."."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def split(folder: Path, max_shard_bytes: int = 60_000) -> Path:
    """The same model beside `folder`, in several shards with an index."""
    return write_hf_folder(folder.with_name("sharded"), stream(folder), folder, max_shard_bytes)


def check(folder: Path) -> None:
    check_folder(HfWeights(folder), ModelFacts.from_folder(folder))


def logits(folder: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.arange(1, 30).unsqueeze(0)).logits


@pytest.mark.parametrize("max_shard_bytes", [10**9, 60_000, 1])
def test_round_trip(max_shard_bytes: int, source: Path, tmp_path: Path) -> None:
    written = write_hf_folder(tmp_path / "new" / "out", stream(source), source, max_shard_bytes)
    assert written == tmp_path / "new" / "out"
    before, after = HfWeights(source), HfWeights(written)
    assert after.names == before.names and len(after.names) == 15  # 12 of the layer, embedding, final norm, head
    for name in before.names:
        assert after.shape(name) == before.shape(name) == tuple(before.get(name).shape)
        assert torch.equal(after.get(name), before.get(name)) and after.get(name).dtype == torch.float32
    check(written)
    assert tensors_dtype(written) == {torch.float32}

    shards = sorted(path for path in written.iterdir() if path.suffix == ".safetensors")
    sizes = {name: before.get(name).numel() * 4 for name in before.names}
    if max_shard_bytes == 10**9:
        assert [path.name for path in shards] == ["model.safetensors"] and not (written / INDEX).exists()
    else:
        if max_shard_bytes == 1:
            assert len(shards) == 15  # a tensor above the limit stands alone
        count = len(shards)
        assert count > 1 and [p.name for p in shards] == [
            f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
        ]
        index = json.loads((written / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(sizes.values())
        assert set(index["weight_map"]) == before.names
        for path in shards:
            held = load_file(path)
            assert {index["weight_map"][name] for name in held} == {path.name}
            assert len(held) == 1 or sum(sizes[name] for name in held) <= max_shard_bytes
    # The side files are there, nothing else is, and no temporary name is left beside the folder.
    assert (written / "generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()
    others = {p.name for p in written.iterdir()} - {p.name for p in shards} - {INDEX}
    assert others == {"config.json", "generation_config.json"}
    assert [path.name for path in written.parent.iterdir()] == ["out"]


def test_transformers_loads_the_result_and_gives_the_same_logits(source: Path, tmp_path: Path) -> None:
    sharded = write_hf_folder(tmp_path / "out", stream(source), source, 60_000)
    assert (sharded / INDEX).exists()
    assert torch.equal(logits(sharded), logits(source))


def test_config_follows_the_dtype_of_the_tensors(source: Path, tmp_path: Path) -> None:
    assert json.loads((source / "config.json").read_text())["dtype"] == "float32"
    low = write_hf_folder(tmp_path / "low", ((name, t.bfloat16()) for name, t in stream(source)), source)
    before, after = (json.loads((f / "config.json").read_text()) for f in (source, low))
    assert after == before | {"dtype": "bfloat16"}
    assert tensors_dtype(low) == {torch.bfloat16}
    # transformers 4 wrote torch_dtype: that key is kept and no second one appears.
    del before["dtype"]
    (low / "config.json").write_text(json.dumps(before | {"torch_dtype": "bfloat16"}))
    high = write_hf_folder(tmp_path / "high", stream(source), low)
    assert json.loads((high / "config.json").read_text()) == before | {"torch_dtype": "float32"}


def test_views_and_transposed_tensors_are_written_whole(source: Path, tmp_path: Path) -> None:
    tensors = dict(stream(source))
    square = tensors["model.layers.0.self_attn.q_proj.weight"].clone()
    key_value = torch.cat([square, square])  # 256 x 128; both tensors below share its memory
    tensors["model.layers.0.self_attn.q_proj.weight"] = square.T
    tensors["model.layers.0.self_attn.k_proj.weight"] = key_value[64:128]
    tensors["model.layers.0.self_attn.v_proj.weight"] = key_value[64:128]
    written = HfWeights(write_hf_folder(tmp_path / "out", iter(tensors.items()), source))
    assert all(torch.equal(written.get(name), tensor) for name, tensor in tensors.items())


def test_an_existing_folder_is_replaced_whole(folder: Path, source: Path) -> None:
    (folder / "stale.txt").write_text("old")
    write_hf_folder(folder, ((name, t + 1) for name, t in stream(folder)), folder)  # onto its own source
    assert sorted(contents(folder)) == sorted(contents(source))
    assert torch.equal(HfWeights(folder).get("model.norm.weight"), HfWeights(source).get("model.norm.weight") + 1)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("existing", [True, False])
def test_an_interrupted_write_leaves_the_old_folder_or_none(existing: bool, folder: Path, source: Path) -> None:
    if not existing:
        shutil.rmtree(folder)
    before = contents(folder) if existing else None

    def broken() -> Iterator[tuple[str, Tensor]]:
        for i, item in enumerate(stream(source)):
            if i == 9:
                raise RuntimeError("a rank died")
            yield item

    with pytest.raises(RuntimeError, match="a rank died"):
        write_hf_folder(folder, broken(), source, max_shard_bytes=1)
    assert (contents(folder) if folder.exists() else None) == before
    visible = [path.name for path in folder.parent.iterdir() if not path.name.startswith(".")]
    assert visible == ([folder.name] if existing else [])
    # The next write is not in the way of what the broken one left.
    write_hf_folder(folder, stream(source), source)
    check(folder)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_no_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FolderError, match=r"model holds neither model\.safetensors nor model\.safetensors\.index"):
        HfWeights(folder)


@pytest.mark.parametrize("keep", [0, 5, 200, 0.5, -1])
def test_truncated_safetensors(keep: float, folder: Path) -> None:
    """Nothing, half a length, half a header, half the tensors, all but the last byte."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(FolderError, match=r"model\.safetensors is not a readable safetensors file"):
        check(folder)


def test_truncated_shard(folder: Path) -> None:
    sharded = split(folder)
    path = sorted(sharded.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FolderError, match=rf"{path.name} is not a readable safetensors file"):
        check(sharded)


def test_index_naming_a_missing_file(folder: Path) -> None:
    sharded = split(folder)
    path = sorted(sharded.glob("*.safetensors"))[1]
    path.unlink()
    with pytest.raises(FolderError, match=rf"the index names {path.name}, which is missing"):
        check(sharded)


def test_index_naming_a_tensor_that_its_file_does_not_hold(folder: Path) -> None:
    sharded = split(folder)
    index = json.loads((sharded / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    holder = index["weight_map"]["model.norm.weight"]
    index["weight_map"]["model.norm.weight"] = next(file for file in files if file != holder)
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(FolderError, match=r"model\.norm\.weight"):
        check(sharded)


@pytest.mark.parametrize("text", ['{"weight_map": {"model.norm', "{}"])
def test_damaged_index(text: str, folder: Path) -> None:
    (folder / INDEX).write_text(text)
    with pytest.raises(FolderError, match=r"model\.safetensors\.index\.json"):
        check(folder)


def test_missing_tensor(folder: Path) -> None:
    rewrite(folder, model__layers__0__self_attn__k_proj__bias=None, model__norm__weight=None)
    with pytest.raises(FolderError, match=r"2 tensors are missing, first model\.layers\.0\.self_attn\.k_proj\.bias"):
        check(folder)


def test_extra_tensor(folder: Path) -> None:
    rewrite(folder, model__layers__0__self_attn__o_proj__bias=torch.zeros(128))
    with pytest.raises(
        FolderError, match=r"1 tensors do not belong to a qwen2 model, first model\.layers\.0\.self_attn\.o_proj\.bias"
    ):
        check(folder)


def test_misshapen_tensor(folder: Path) -> None:
    rewrite(folder, model__embed_tokens__weight=torch.zeros(210, 128))
    with pytest.raises(
        FolderError,
        match=r"model\.embed_tokens\.weight has shape \(210, 128\), config\.json says \(211, 128\)",
    ):
        check(folder)


def test_what_some_writers_add_is_ignored(folder: Path, tmp_path: Path) -> None:
    rewrite(folder, model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(16))
    check(folder)
    # With tied embeddings the head is a copy; without, it must be there.
    tied = make_qwen2(tmp_path / "tied", tied=True, layers=1)
    check(tied)
    rewrite(tied, lm_head__weight=HfWeights(tied).get("model.embed_tokens.weight").clone())
    check(tied)
    rewrite(tied, lm_head__weight=torch.zeros(211, 128))
    with pytest.raises(FolderError, match=r"ties the embeddings, but lm_head\.weight differs"):
        check(tied)
    rewrite(folder, lm_head__weight=None)
    with pytest.raises(FolderError, match=r"1 tensors are missing, first lm_head\.weight"):
        check(folder)
