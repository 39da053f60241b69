"""The demo's models as Hugging Face configs; no torch, so that settings are checked without."""

from __future__ import annotations

from typing import Any

# Qwen2, 1.1 million parameters.
MODEL_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 547,  # what `make_tokenizer` arrives at; not a multiple of anything, as in real life
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,  # head_dim 32, the least that vLLM's CPU attention takes
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
# By family. Of Qwen3 the heads are together twice as wide as the hidden states, as in its smallest model: 1.4 million.
MODEL_CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": MODEL_CONFIG,
    "qwen3": MODEL_CONFIG | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 64},
}
