"""The demo's model as a Hugging Face config, 1.1 million parameters; no torch, so that settings are checked without."""

from __future__ import annotations

from typing import Any

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
