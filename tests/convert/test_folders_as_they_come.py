"""Folders as they circulate: buffers beside the weights, names of wrappers, several types, pointers for files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from remax_megatron.convert import hf_to_megatron, logits, roundtrip
from remax_megatron.model_facts import ModelFacts
from remax_megatron.weights.hf_folder import FolderError, HfWeights, check_folder
from tests.convert.folders import (
    BF16,
    FP16,
    FP32,
    INDEX,
    back,
    load,
    same_tensors,
    there,
    there_and_back,
    verified,
    write_model,
)

SINGLE = "model.safetensors"


def without_tokenizer(folder: Path) -> Path:
    """The prompts of --logits are then drawn from the vocabulary."""
    (folder / "tokenizer.json").unlink()
    return folder


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return without_tokenizer(write_model(tmp_path_factory.mktemp("tied") / "model", bits=False, tied=True))


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return without_tokenizer(write_model(tmp_path_factory.mktemp("untied") / "model", bits=False))


def changed(folder: Path, target: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """A copy of `folder` with other tensors."""
    shutil.copytree(folder, target)
    save_file(change(load_file(folder / SINGLE)), target / SINGLE, metadata={"format": "pt"})
    return target


def refusal(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which the converter refuses `folder`."""
    capsys.readouterr()
    output = folder.with_name("refused")
    assert hf_to_megatron.main(["--hf", str(folder), "--output", str(output)]) == 2 and not output.exists()
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


# -- buffers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "buffer",
    [
        "model.layers.{}.self_attn.rotary_emb.inv_freq",
        "model.layers.{}.self_attn.rotary_emb.cos_cached",
        "model.rotary_emb.inv_freq",
        "model.rotary_emb.original_inv_freq",
    ],
)
def test_buffers_of_another_type_are_left_out(buffer: str, untied: Path, tmp_path: Path, capsys) -> None:
    buffers = {buffer.format(layer): torch.arange(2, dtype=FP32) for layer in range(2)}
    source = changed(untied, tmp_path / "model", lambda tensors: tensors | buffers)
    returned = there_and_back(source, tmp_path)
    assert same_tensors(load(returned), load(untied))
    for other in (tmp_path / "megatron", returned, untied):
        code, output = verified(capsys, source, other, "--logits")
        assert code == 0 and "largest difference of a logit: 0 " in output


# -- names -------------------------------------------------------------------------------------------------------------

NAMES = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "compiled layers": lambda name: name.replace(".self_attn.", "._orig_mod.self_attn."),
    "DDP": lambda name: f"module.{name}",
    "DeepSpeed twice": lambda name: f"module.module.{name}",
    "DDP of torch.compile": lambda name: f"module._orig_mod.{name}",
    "FSDP": lambda name: f"_fsdp_wrapped_module.{name.replace('.self_attn', '._fsdp_wrapped_module.self_attn')}",
    "no model.": lambda name: name.removeprefix("model."),
    "compiled, no model.": lambda name: f"_orig_mod.{name.removeprefix('model.')}",
}


@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_names_of_wrappers_are_taken(case: str, kind: str, tied: Path, untied: Path, tmp_path: Path, capsys) -> None:
    plain = tied if kind == "tied" else untied
    named = changed(plain, tmp_path / "model", lambda tensors: {NAMES[case](n): t for n, t in tensors.items()})
    assert load(named).keys() != load(plain).keys()
    returned = there_and_back(named, tmp_path)
    assert same_tensors(load(returned), load(plain))  # under the names that every reader knows
    code, output = verified(capsys, named, plain, "--logits")
    assert code == 0 and "no differences" in output and "largest difference of a logit: 0 " in output
    assert roundtrip.main([str(named), "--work", str(tmp_path)]) == 0


def test_names_that_would_no_longer_be_unique_stay(untied: Path, tmp_path: Path) -> None:
    twice = changed(untied, tmp_path / "model", lambda t: t | {f"_orig_mod.{n}": t[n].clone() for n in t})
    weights = HfWeights(twice)
    assert len(weights.names) == 2 * len(load(untied)) and not weights.renamed
    with pytest.raises(FolderError, match=r"27 tensors do not belong to a qwen2 model, first _orig_mod\."):
        check_folder(weights, ModelFacts.from_folder(twice))


@pytest.mark.parametrize(
    ("rename", "words"),
    [
        (
            lambda n: f"language_model.{n}",
            ["27 tensors", "holds language_model.model.embed_tokens.weight", "'language_model.'"],
        ),
        (lambda n: f"policy.net.{n}", ["holds policy.net.model.embed_tokens.weight", "'policy.net.'", "save"]),
        (
            lambda n: "base_model.model." + n.replace("q_proj.", "q_proj.base_layer."),
            ["adapter (LoRA)", "merge_and_unload()", "save_pretrained()"],
        ),
        (
            lambda n: n.replace("lm_head", "value_head"),
            ["first lm_head.weight", "tie_word_embeddings=false"],
        ),
    ],
)
def test_other_names_are_said(rename: Callable[[str], str], words: list[str], untied: Path, tmp_path: Path, capsys):
    named = changed(untied, tmp_path / "model", lambda tensors: {rename(n): t for n, t in tensors.items()})
    line = refusal(named, capsys)
    assert [word for word in words if word not in line] == [], line


def test_an_adapter_folder_is_named(untied: Path, tmp_path: Path, capsys) -> None:
    folder = Path(shutil.copytree(untied, tmp_path / "model"))
    (folder / SINGLE).rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    assert "is an adapter (LoRA)" in (line := refusal(folder, capsys)) and "merge_and_unload()" in line


# -- types -------------------------------------------------------------------------------------------------------------

MIXES = {
    "norms in float32": lambda name: FP32 if "norm" in name else BF16,
    "the head in float32": lambda name: FP32 if name == "lm_head.weight" else BF16,
    "keys in float16, values in float32": lambda name: FP16 if "k_proj" in name else FP32 if "v_proj" in name else BF16,
    "float32, embedding in bfloat16": lambda name: BF16 if "embed" in name else FP32,
}


@pytest.mark.parametrize("option", ["bf16", "fp32"])
@pytest.mark.parametrize("case", MIXES)
def test_several_types_become_the_one_that_is_asked_for(case, option, untied: Path, tmp_path: Path, capsys) -> None:
    mixed = changed(untied, tmp_path / "model", lambda tensors: {n: t.to(MIXES[case](n)) for n, t in tensors.items()})
    line = refusal(mixed, capsys)
    assert "--dtype bf16 or fp32" in line and "torch.bfloat16" in line and "torch.float32" in line
    target = {"bf16": BF16, "fp32": FP32}[option]
    megatron = there(mixed, tmp_path / "megatron", "--dtype", option)
    returned = back(megatron, tmp_path / "hf")
    assert same_tensors(load(returned), {name: tensor.to(target) for name, tensor in load(mixed).items()})
    # The same folder with itself: --logits reads each tensor in its own type.
    exact = [ids.float() for ids in logits.StreamedModel(mixed).logits([[5, 7, 11]])]
    far = (exact[0] - logits.StreamedModel(returned).logits([[5, 7, 11]])[0]).abs().max()
    assert far == 0 if option == "fp32" else far < 0.05


def test_an_interrupted_conversion_of_several_types_goes_on(untied: Path, tmp_path: Path, monkeypatch) -> None:
    from remax_megatron.convert import copying

    mixed = changed(untied, tmp_path / "model", lambda t: {n: x.to(MIXES["norms in float32"](n)) for n, x in t.items()})
    whole = there(mixed, tmp_path / "whole", "--dtype", "bf16", "--workers", "1")
    original, count = copying._Writer.write, []

    def stops(self, job, progress):
        count.append(job.name)
        if len(count) == 9:
            raise KeyboardInterrupt
        return original(self, job, progress)

    monkeypatch.setattr(copying._Writer, "write", stops)
    options = ["--hf", str(mixed), "--output", str(tmp_path / "out"), "--dtype", "bf16", "--workers", "1"]
    assert hf_to_megatron.main(options) == 130
    monkeypatch.setattr(copying._Writer, "write", original)
    assert hf_to_megatron.main([*options, "--resume"]) == 0
    written = {p.relative_to(whole): p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    assert {p.relative_to(tmp_path / "out"): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == (
        written
    )


# -- failed downloads --------------------------------------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3945426872\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>401</title></head></html>"
INSTEAD = {
    "pointer": (POINTER, ["Git LFS pointer", "git lfs pull"]),
    "web page": (PAGE, ["web page", "download it again"]),
    "proxy's XML": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", ["web page"]),
    "nothing": (b"", ["is empty", "download it again"]),
}


@pytest.mark.parametrize("case", INSTEAD)
@pytest.mark.parametrize("name", [SINGLE, "config.json", "tokenizer.json", "merges.txt", INDEX])
def test_what_lies_there_instead_is_said(name: str, case: str, untied: Path, tmp_path: Path, capsys) -> None:
    content, words = INSTEAD[case]
    folder = Path(shutil.copytree(untied, tmp_path / "model"))
    (folder / name).write_bytes(content)
    line = refusal(folder, capsys)
    assert name in line and [word for word in words if word not in line] == [], line


def test_a_shard_that_is_a_pointer_is_named(tmp_path: Path, capsys) -> None:
    folder = write_model(tmp_path / "model", num_files=3)
    (folder / "model-00002-of-00003.safetensors").write_bytes(POINTER)
    line = refusal(folder, capsys)
    assert "model-00002-of-00003.safetensors" in line and f"git lfs pull` in {folder}" in line


def test_a_download_that_was_cut_is_measured(untied: Path, tmp_path: Path, capsys) -> None:
    folder = Path(shutil.copytree(untied, tmp_path / "model"))
    size = (folder / SINGLE).stat().st_size
    os.truncate(folder / SINGLE, size - 100)
    assert f"cut short, {size - 100} bytes of {size}; copy or download" in refusal(folder, capsys)


def test_a_pickle_under_the_name_of_safetensors_is_named(untied: Path, tmp_path: Path, capsys) -> None:
    folder = Path(shutil.copytree(untied, tmp_path / "model"))
    torch.save(load_file(untied / SINGLE), folder / SINGLE)
    assert "file of torch.save under another name; convert the weights to safetensors" in refusal(folder, capsys)


def test_shards_without_their_index_are_counted(tmp_path: Path, capsys) -> None:
    folder = write_model(tmp_path / "model", num_files=3)
    (folder / INDEX).unlink()
    assert "3 files such as model-00001-of-00003.safetensors are there without it" in refusal(folder, capsys)


def test_a_link_to_nothing_is_named(tmp_path: Path, capsys) -> None:
    folder = write_model(tmp_path / "model", num_files=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    (folder / "model-00002-of-00003.safetensors").symlink_to("../../blobs/0815")
    line = refusal(folder, capsys)
    assert "model-00002-of-00003.safetensors, which is missing (a link to a file that is not there)" in line


def test_unknown_keys_of_config_are_noted_once(untied: Path, tmp_path: Path, capsys) -> None:
    there(untied, tmp_path / "megatron")
    assert capsys.readouterr().out.count("note: config.json has keys that are not known here") == 1
