"""Sizes of the models that the presets name, and of three small ones: config.json without the hub."""

from __future__ import annotations

import re

from remax_megatron.config.model_path import resolve_model_facts
from remax_megatron.model_facts import ModelFacts
from remax_megatron.plan.models import PUBLISHED

FACTS = {
    # layers, hidden, ffn, heads, key-value heads, head_dim, vocabulary, tied, positions
    "tiny": ModelFacts(4, 128, 96, 4, 2, 32, 211, True, 512),
    "tiny-untied": ModelFacts(4, 256, 96, 8, 4, 32, 211, False, 512),
    "27m": ModelFacts(8, 512, 1408, 8, 2, 64, 4096, False, 1024),
    **{
        name.removeprefix("Qwen/Qwen2.5-").removesuffix("-Instruct").replace("Qwen/Qwen3", "qwen3").lower(): facts
        for name, facts in PUBLISHED.items()
    },
}


def facts_of(model_path: str) -> ModelFacts:
    """Facts of `actor_rollout_ref.model.path`: those above for Qwen/Qwen2.5-* and Qwen/Qwen3-*, else as the
    trainer finds them."""
    name = re.search(r"/Qwen(2\.5|3)-([\d.]+b)", model_path, re.IGNORECASE)
    known = FACTS.get(("qwen3-" if name[1] == "3" else "") + name[2].lower()) if name else None
    return known or resolve_model_facts(model_path)
