"""The sizes of a model, read from its config.json alone (no torch, no weights).

A model that this trainer cannot train exactly is refused. What turns the setting of a user (a folder or a hub id) into
these facts is `config/model_path.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from remax_megatron.downloads import failed_download
from remax_megatron.errors import UserError
from remax_megatron.model_keys import noted_keys, refused_key, shortened


class ModelError(UserError):
    """A model folder whose config.json cannot be read, or describes a model that cannot be trained exactly."""


@dataclass(frozen=True)
class ModelFacts:
    """The sizes in a Qwen2 config.json, under Megatron's names where the two differ."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int  # rows of the embedding, not yet padded for tensor parallelism
    tied_embeddings: bool
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    # Keys of config.json that nobody knows and that do not look as if they mattered: worth a note.
    unknown_keys: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def from_folder(cls, path: str | Path, setting: str = "model") -> ModelFacts:
        """Facts of the Hugging Face folder `path`. ModelError: no folder, no readable config.json, not plain Qwen2.

        `setting` is what the user set to `path`; messages name it.
        """
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise ModelError(
                f"{setting}={path}: there is no such folder; set it to a folder with config.json and *.safetensors"
            )
        file = folder / "config.json"
        if not file.is_file():
            raise ModelError(
                f"{setting}={path}: the folder has no config.json; set it to a whole Hugging Face model folder"
            )
        return cls.from_file(file, str(path), setting)

    @classmethod
    def from_file(cls, file: Path, source: str, setting: str = "model") -> ModelFacts:
        """Facts of the config.json `file`; `setting`=`source` names the model in error messages."""
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError) as error:  # not JSON, not UTF-8, not readable
            if why := failed_download(file):
                raise ModelError(f"{setting}={source}: config.json {why}") from error
            raise ModelError(f"{setting}={source}: config.json cannot be read ({error}); {_mend(setting)}") from error
        if not isinstance(config, dict):
            raise ModelError(
                f"{setting}={source}: config.json holds a {type(config).__name__}, expected an object; {_mend(setting)}"
            )
        return cls.from_hf_config(config, source, setting)

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any], source: str, setting: str = "model") -> ModelFacts:
        """Facts from the keys of a Qwen2 config.json; `setting`=`source` names the model in error messages."""
        _refuse_other_architectures(config, source, setting)
        _refuse_unknown_computation(config, source, setting)

        def size(name: str) -> int:
            value = config.get(name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ModelError(
                    f"{setting}={source}: config.json says {name}={value!r}, expected a positive integer;"
                    f" {_mend(setting)}"
                )
            return value

        def number(name: str, value: Any) -> float:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ModelError(
                    f"{setting}={source}: config.json says {name}={value!r}, expected a positive number;"
                    f" {_mend(setting)}"
                )
            return float(value)

        heads, hidden = size("num_attention_heads"), size("hidden_size")
        if hidden % heads:
            raise ModelError(
                f"{setting}={source}: config.json says hidden_size={hidden}, not a multiple of"
                f" num_attention_heads={heads}; {_mend(setting)}"
            )
        if config.get("head_dim") not in (None, hidden // heads):
            raise ModelError(
                f"{setting}={source}: config.json says head_dim={config['head_dim']}, but a Qwen2 model has hidden_size"
                f" / num_attention_heads = {hidden // heads} (vLLM computes with that); {_mend(setting)}"
            )
        rope = config.get("rope_parameters") or {}  # transformers 5; transformers 4 wrote rope_theta at the top
        return cls(
            num_layers=size("num_hidden_layers"),
            hidden_size=hidden,
            ffn_hidden_size=size("intermediate_size"),
            num_attention_heads=heads,
            num_key_value_heads=heads if config.get("num_key_value_heads") is None else size("num_key_value_heads"),
            head_dim=hidden // heads,
            vocab_size=size("vocab_size"),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            max_position_embeddings=size("max_position_embeddings"),
            rms_norm_eps=number("rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
            rope_theta=number("rope_theta", config.get("rope_theta", rope.get("rope_theta", 10000.0))),
            unknown_keys=noted_keys(config),
        )

    def note_on_unknown_keys(self) -> str | None:
        """A sentence that names the keys of config.json that are not read, None when all are known."""
        if not self.unknown_keys:
            return None
        return f"config.json has keys that are not known here and have no effect: {', '.join(self.unknown_keys)}"


def _mend(setting: str) -> str:
    return f"set {setting} to a dense Qwen2 or Qwen2.5 model, for example Qwen2.5-7B-Instruct"


def _refuse_other_architectures(config: Mapping[str, Any], source: str, setting: str) -> None:
    """ModelError for every model whose weights or forward pass differ from plain Qwen2."""
    model_type = config.get("model_type")
    architectures = config.get("architectures") or ["Qwen2ForCausalLM"]
    if not isinstance(architectures, list):
        architectures = [architectures]
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, Mapping) else rope
    quantization = config.get("quantization_config")
    reason = None
    if "moe" in str(model_type).lower() or any("moe" in str(name).lower() for name in architectures):
        reason = f"a mixture-of-experts model (model_type={model_type!r}), which this trainer does not offer"
    elif model_type != "qwen2" or architectures != ["Qwen2ForCausalLM"]:
        reason = (
            f"not a Qwen2 model (model_type={model_type!r}, architectures={architectures}, expected Qwen2ForCausalLM)"
        )
    elif quantization is not None:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else quantization
        reason = f"a quantised model (quantization_config: {method}), whose weights cannot be trained"
    elif config.get("use_sliding_window"):
        reason = "a model with use_sliding_window=true, which this trainer does not offer"
    elif rope_type != "default":
        reason = f"a model with rope scaling ({rope_type}), which this trainer does not offer"
    elif config.get("hidden_act", "silu") != "silu":
        reason = f"a model with hidden_act={config['hidden_act']!r}; Qwen2 uses silu"
    if reason:
        raise ModelError(f"{setting}={source} is {reason}; {_mend(setting)}")


def _refuse_unknown_computation(config: Mapping[str, Any], source: str, setting: str) -> None:
    """ModelError for a key that may change the forward pass and is not read, or has a value that is not offered."""
    if (key := refused_key(config)) is not None:
        raise ModelError(
            f"{setting}={source}: config.json says {key}={shortened(config[key])}, which this trainer does not know and"
            f" which may change what the model computes; remove the key from config.json if the model is right without"
            f" it, or {_mend(setting)}"
        )
    kinds = config.get("layer_types")
    legal = {
        "is_causal": config.get("is_causal") in (None, True),
        "partial_rotary_factor": config.get("partial_rotary_factor") in (None, 1.0),
        "layer_types": kinds is None or (isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)),
    }
    for key, offered in legal.items():
        if not offered:
            raise ModelError(
                f"{setting}={source}: config.json says {key}={shortened(config[key])}, which this trainer does not"
                f" offer; {_mend(setting)}"
            )
