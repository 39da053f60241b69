"""Small Qwen2 folders with random weights, made by transformers, and the layers that tests run them on."""

from __future__ import annotations

import os
from pathlib import Path

import torch

# actor.megatron.layers in every test that builds a policy; `make test-te` runs them on Transformer Engine's.
LAYERS = os.environ.get("REMAX_TEST_LAYERS", "auto")


def make_qwen2(
    folder: Path,
    *,
    tied: bool,
    vocab: int = 211,
    kv: int = 2,
    heads: int = 4,
    layers: int = 4,
    seed: int = 0,
    std: float = 0.15,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
) -> Path:
    """A Qwen2 with head_dim 32 and random weights, biases and norms included; returns the folder."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=32 * heads,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = Qwen2ForCausalLM(config).float()
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
