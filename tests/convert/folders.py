"""Small folders in the format of Hugging Face, what lies in them, and the converters' commands on them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from remax_megatron.convert import hf_to_megatron, megatron_to_hf, verify
from remax_megatron.model_facts import ModelFacts
from remax_megatron.weights.hf_folder import INDEX, expected_shapes

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


def flip(path: str | Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
