"""Sizes of the published models that the presets name: their config.json without the hub, so that a plan needs none."""

from __future__ import annotations

from pathlib import Path

from remax_megatron.config.model_path import resolve_model_facts
from remax_megatron.model_facts import ModelFacts

# layers, hidden, ffn, heads, key-value heads, head_dim, vocabulary, tied, positions
PUBLISHED = {
    "Qwen/Qwen2.5-0.5B-Instruct": ModelFacts(24, 896, 4864, 14, 2, 64, 151936, True, 32768),
    "Qwen/Qwen2.5-1.5B-Instruct": ModelFacts(28, 1536, 8960, 12, 2, 128, 151936, True, 32768),
    "Qwen/Qwen2.5-3B-Instruct": ModelFacts(36, 2048, 11008, 16, 2, 128, 151936, True, 32768),
    "Qwen/Qwen2.5-7B-Instruct": ModelFacts(28, 3584, 18944, 28, 4, 128, 152064, False, 32768),
    "Qwen/Qwen2.5-14B-Instruct": ModelFacts(48, 5120, 13824, 40, 8, 128, 152064, False, 32768),
    "Qwen/Qwen2.5-32B-Instruct": ModelFacts(64, 5120, 27648, 40, 8, 128, 152064, False, 32768),
    "Qwen/Qwen3-4B": ModelFacts(36, 2560, 9728, 32, 8, 128, 151936, True, 40960, model_type="qwen3"),
    "Qwen/Qwen3-8B": ModelFacts(36, 4096, 12288, 32, 8, 128, 151936, False, 40960, model_type="qwen3"),
    "Qwen/Qwen3-14B": ModelFacts(40, 5120, 17408, 40, 8, 128, 151936, False, 40960, model_type="qwen3"),
    "Qwen/Qwen3-32B": ModelFacts(64, 5120, 25600, 64, 8, 128, 151936, False, 40960, model_type="qwen3"),
}


def sizes_of(path: str, prepare_command: str | None = None) -> ModelFacts:
    """Find the sizes of `actor_rollout_ref.model.path`: of a folder its config.json, of a hub id those of PUBLISHED,
    else what the trainer would find. UserError when they cannot be had; `prepare_command` is named then."""
    if path in PUBLISHED and not Path(path).expanduser().is_dir():
        return PUBLISHED[path]
    return resolve_model_facts(path, prepare_command)
