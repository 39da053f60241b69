"""Hugging Face folders of the shapes of Qwen2.5 and Qwen3 with random weights, made on the spot: for benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from remax_megatron.model_facts import ModelFacts
from remax_megatron.weights.hf_folder import INDEX, HfLayout, expected_shapes

Shape = tuple[int, int, int, int, int, int, bool]  # layers, hidden, ffn, heads, KV heads, vocabulary, tied
SHAPES: dict[str, Shape] = {
    "0.5b": (24, 896, 4864, 14, 2, 151936, True),
    "1.5b": (28, 1536, 8960, 12, 2, 151936, True),
    "3b": (36, 2048, 11008, 16, 2, 151936, True),
    "7b": (28, 3584, 18944, 28, 4, 152064, False),
    "14b": (48, 5120, 13824, 40, 8, 152064, False),
    "32b": (64, 5120, 27648, 40, 8, 152064, False),
    "qwen3-4b": (36, 2560, 9728, 32, 8, 151936, True),
    "qwen3-8b": (36, 4096, 12288, 32, 8, 151936, False),
    "qwen3-14b": (40, 5120, 17408, 40, 8, 151936, False),
    "qwen3-32b": (64, 5120, 25600, 64, 8, 151936, False),
}
POOL = 2**24  # random numbers that the weights are drawn from, each tensor at its own place


def family_of(name: str) -> str:
    """The family of a key of SHAPES."""
    return "Qwen3" if name.startswith("qwen3") else "Qwen2"


def config_of(shape: Shape, layers: int | None = None, family: str = "Qwen2") -> dict[str, object]:
    """config.json of a model of those sizes (one of SHAPES' values), or with another number of layers."""
    default, hidden, ffn, heads, kv_heads, vocab, tied = shape
    return {
        "architectures": [f"{family}ForCausalLM"],
        "model_type": family.lower(),
        "num_hidden_layers": layers or default,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "initializer_range": 0.02,
    }


def make_folder(folder: Path, config: dict[str, object], std: float = 0.02) -> int:
    """A Hugging Face folder with bfloat16 weights, norms 1 and the rest normal with deviation `std`, in files of up to
    5 GB, and a tokenizer of two words; returns its bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    _write_tokenizer(folder, int(str(config["vocab_size"])))
    facts = ModelFacts.from_folder(folder)
    layout = HfLayout.planned(facts, torch.bfloat16)
    pool = torch.empty(POOL, dtype=torch.bfloat16).normal_(0, std, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(max(facts.hidden_size, facts.head_dim), dtype=torch.bfloat16)
    shapes = expected_shapes(facts)
    for name, file in layout.files.items():
        with open(folder / name, "wb") as target:
            target.write(file.head)
            for i, tensor in enumerate(file.offsets):
                left = torch.Size(shapes[tensor]).numel()
                values, start = (ones, 0) if "norm" in tensor else (pool, (i + 1) * 7919 % POOL)
                while left:
                    part = values[start : start + left]
                    target.write(part.view(torch.uint8).numpy().data)
                    left, start = left - len(part), 0
    if layout.index is not None:
        (folder / INDEX).write_text(layout.index)
    return sum(path.stat().st_size for path in folder.iterdir())


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    """The least that a peer accepts as a tokenizer."""
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"<unk>": 0, "a": vocab_size - 1}, unk_token="<unk>")).save(
        str(folder / "tokenizer.json")
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"})
    )
