"""verify: what it compares and finds, its logits, and the command that converts there and back."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor

from remax_megatron.convert import copying, hf_to_megatron, logits, megatron_to_hf, roundtrip, verify
from remax_megatron.model_facts import ModelFacts
from remax_megatron.weights.shards import to_megatron
from tests.convert.folders import (
    BF16,
    FP32,
    HEADS,
    SMALL_VOCAB,
    as_bytes,
    check_same_files,
    contents,
    flip,
    load,
    there,
    there_and_back,
    verified,
    write_model,
)
from tests.small_models import YARN, make_qwen2, make_qwen3


def test_equal_checkpoints(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, megatron, returned = models / "source", models / "megatron", models / "hf"
    other = there(source, tmp_path / "other")
    for a, b in [(source, returned), (source, megatron), (megatron, source), (megatron, other), (source, source)]:
        code, output = verified(capsys, a, b)
        assert code == 0 and "27 tensors, no differences" in output
    assert verified(capsys, megatron / "iter_0000000", source)[0] == 0


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


def transformers_logits(folder: Path, prompts: list[list[int]]) -> list[Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=FP32).eval()
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0] for ids in prompts]


def largest_difference(a: Iterable[Tensor], b: Iterable[Tensor]) -> float:
    return max((left - right).abs().max().item() for left, right in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("make", "tied", "dtype", "rope"),
    [
        *((make_qwen2, tied, dtype, None) for dtype in (FP32, BF16) for tied in (True, False)),
        *((make_qwen3, tied, FP32, None) for tied in (True, False)),
        (make_qwen2, True, FP32, YARN),
        (make_qwen3, False, BF16, YARN),
    ],
)
def test_streamed_logits_are_those_of_transformers(
    make, tied: bool, dtype: torch.dtype, rope: dict | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logits, "HEAD_ROWS", 500)  # 1187 rows in three blocks
    sizes = dict(vocab=SMALL_VOCAB, heads=HEADS, kv=2, layers=2, dtype=dtype, rope=rope)
    source = make(tmp_path / "source", tied=tied, **sizes)
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


def test_logits_show_a_wrong_weight_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both directions of the converters use the table, and so does every digest; `--logits` does not."""
    source = make_qwen2(tmp_path / "source", tied=False)

    def swapped(entry, parts, *args):  # up before gate
        names = entry.hf_names[::-1] if entry.kind == "gate_up" else entry.hf_names
        mixed = {name: parts[other] for name, other in zip(entry.hf_names, names, strict=True)}
        return to_megatron(entry, mixed, *args)

    monkeypatch.setattr("remax_megatron.weights.shards.to_megatron", swapped)
    hf_to_megatron.convert(source, tmp_path / "megatron")
    assert verify.compare(source, tmp_path / "megatron").differences == []
    assert logits.max_logit_difference(source, tmp_path / "megatron") > 1e-3


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
