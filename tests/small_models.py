"""Small folders with random weights, made by transformers, and the layers that tests run them on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

# actor.megatron.layers in every test that builds a policy; `make test-te` runs them on Transformer Engine's.
LAYERS = os.environ.get("REMAX_TEST_LAYERS", "auto")


# YaRN that acts within a few tokens: a quarter of the lengths of the tests is the original length.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def make_qwen2(folder: Path, *, tied: bool, heads: int = 4, **sizes: Any) -> Path:
    """A Qwen2 with head_dim 32 and random weights, biases and norms included; returns the folder. The other arguments
    are those of `make_model`."""
    return make_model(folder, "Qwen2", tied=tied, heads=heads, hidden=32 * heads, **sizes)


def make_qwen3(
    folder: Path, *, tied: bool, heads: int = 8, head_dim: int = 32, hidden: int = 128, **sizes: Any
) -> Path:
    """A Qwen3 whose heads are together twice as wide as its hidden states, as those of 0.6B are. The other arguments
    are those of `make_model`."""
    return make_model(folder, "Qwen3", tied=tied, heads=heads, hidden=hidden, head_dim=head_dim, **sizes)


def make_critic(folder: Path, family: str = "Qwen2", **sizes: Any) -> Path:
    """A critic with random weights, as a model that classifies tokens with one class; see `make_model`."""
    own = {"Qwen2": {"heads": 4, "hidden": 128}, "Qwen3": {"heads": 8, "hidden": 128, "head_dim": 32}}[family]
    return make_model(folder, family, tied=False, kind="ForTokenClassification", num_labels=1, **own, **sizes)


def make_model(
    folder: Path,
    family: str,
    *,
    tied: bool,
    heads: int,
    hidden: int,
    vocab: int = 211,
    kv: int = 2,
    layers: int = 4,
    seed: int = 0,
    std: float = 0.15,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    rope: dict[str, Any] | None = None,
    kind: str = "ForCausalLM",
    **more: Any,
) -> Path:
    """A model of transformers' classes `family`Config and `family``kind` with random weights, biases and norms
    included; returns the folder. `rope` is added to rope_parameters, `more` to the config."""
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        max_position_embeddings=512 if rope is None else int(rope["factor"] * rope["original_max_position_embeddings"]),
        rope_parameters={"rope_type": "default", "rope_theta": 1e6} | (rope or {}),
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        **more,
    )
    model = getattr(transformers, family + kind)(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
            else:
                parameter.normal_(std=std)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder
