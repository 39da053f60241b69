"""Sizes of the models that the presets name, and of two small ones: config.json without the hub."""

from __future__ import annotations

import re

from remax_megatron.config.model_path import resolve_model_facts
from remax_megatron.model_facts import ModelFacts

FACTS = {
    # layers, hidden, ffn, heads, key-value heads, head_dim, vocabulary, tied, positions
    "tiny": ModelFacts(4, 128, 96, 4, 2, 32, 211, True, 512),
    "tiny-untied": ModelFacts(4, 256, 96, 8, 4, 32, 211, False, 512),
    "0.5b": ModelFacts(24, 896, 4864, 14, 2, 64, 151936, True, 32768),
    "1.5b": ModelFacts(28, 1536, 8960, 12, 2, 128, 151936, True, 32768),
    "3b": ModelFacts(36, 2048, 11008, 16, 2, 128, 151936, True, 32768),
    "7b": ModelFacts(28, 3584, 18944, 28, 4, 128, 152064, False, 32768),
    "14b": ModelFacts(48, 5120, 13824, 40, 8, 128, 152064, False, 32768),
    "32b": ModelFacts(64, 5120, 27648, 40, 8, 128, 152064, False, 32768),
    "qwen3-4b": ModelFacts(36, 2560, 9728, 32, 8, 128, 151936, True, 40960, model_type="qwen3"),
    "qwen3-8b": ModelFacts(36, 4096, 12288, 32, 8, 128, 151936, False, 40960, model_type="qwen3"),
    "qwen3-14b": ModelFacts(40, 5120, 17408, 40, 8, 128, 151936, False, 40960, model_type="qwen3"),
    "qwen3-32b": ModelFacts(64, 5120, 25600, 64, 8, 128, 151936, False, 40960, model_type="qwen3"),
}


def facts_of(model_path: str) -> ModelFacts:
    """Facts of `actor_rollout_ref.model.path`: those above for Qwen/Qwen2.5-* and Qwen/Qwen3-*, else as the
    trainer finds them."""
    name = re.search(r"/Qwen(2\.5|3)-([\d.]+b)", model_path, re.IGNORECASE)
    known = FACTS.get(("qwen3-" if name[1] == "3" else "") + name[2].lower()) if name else None
    return known or resolve_model_facts(model_path)
