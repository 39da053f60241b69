"""The sizes of a model, read from its config.json alone (no torch, no weights).

A model that this trainer cannot train exactly is refused. What turns the setting of a user (a folder or a hub id) into
these facts is `config/model_path.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from remax_megatron.downloads import failed_download
from remax_megatron.errors import UserError
from remax_megatron.model_family import FAMILIES, Family
from remax_megatron.model_keys import noted_keys, refused_key, shortened


class ModelError(UserError):
    """A model folder whose config.json cannot be read, or describes a model that cannot be trained exactly."""


@dataclass(frozen=True)
class Yarn:
    """Rotary embedding stretched to longer sequences (arXiv 2309.00071), under transformers' names."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    @property
    def attention_factor(self) -> float:
        """What queries and keys are multiplied by, each."""
        return 0.1 * math.log(self.factor) + 1.0


@dataclass(frozen=True)
class ModelFacts:
    """The sizes in a config.json, under Megatron's names where the two differ."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int  # rows of the embedding, not yet padded for tensor parallelism
    tied_embeddings: bool
    max_position_embeddings: int  # that the rotary embedding reaches
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    model_type: str = "qwen2"
    yarn: Yarn | None = None
    value_head: bool = False  # a critic: a value for every token in place of the words
    # Keys of config.json that nobody knows and that do not look as if they mattered: worth a note.
    unknown_keys: tuple[str, ...] = field(default=(), compare=False)

    @property
    def family(self) -> Family:
        """Return what the model shares with its family."""
        return FAMILIES[self.model_type]

    def as_critic(self) -> ModelFacts:
        """Return the sizes of a critic with the layers of this model."""
        return replace(self, value_head=True, tied_embeddings=False)

    @classmethod
    def from_folder(cls, path: str | Path, setting: str = "model", *, critic: bool = False) -> ModelFacts:
        """Facts of the Hugging Face folder `path`. ModelError: no folder, no readable config.json, no offered model.

        `setting` is what the user set to `path`; messages name it. With `critic` it may be one, and `value_head` tells.
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
        return cls.from_file(file, str(path), setting, critic=critic)

    @classmethod
    def from_file(cls, file: Path, source: str, setting: str = "model", *, critic: bool = False) -> ModelFacts:
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
        return cls.from_hf_config(config, source, setting, critic=critic)

    @classmethod
    def from_hf_config(
        cls, config: Mapping[str, Any], source: str, setting: str = "model", *, critic: bool = False
    ) -> ModelFacts:
        """Facts from the keys of a config.json; `setting`=`source` names the model in error messages."""
        reader = _Reader(config, source, setting)
        family = reader.family(critic)
        has_values = reader.architectures(family) == [family.critic]
        reader.refuse_other_computation(family)
        heads = reader.size("num_attention_heads")
        positions = reader.size("max_position_embeddings")
        rope_theta, yarn = reader.rope(positions)
        if yarn is not None:  # the engine has no angles beyond these
            positions = min(positions, int(yarn.original_max_position_embeddings * yarn.factor))
        return cls(
            num_layers=reader.size("num_hidden_layers"),
            hidden_size=reader.size("hidden_size"),
            ffn_hidden_size=reader.size("intermediate_size"),
            num_attention_heads=heads,
            num_key_value_heads=heads if config.get("num_key_value_heads") is None else reader.groups(heads),
            head_dim=reader.head_dim(family, heads),
            vocab_size=reader.size("vocab_size"),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)) and not has_values,
            value_head=has_values,
            max_position_embeddings=positions,
            rms_norm_eps=reader.number("rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
            rope_theta=rope_theta,
            model_type=family.model_type,
            yarn=yarn,
            unknown_keys=noted_keys(config),
        )

    def note_on_unknown_keys(self) -> str | None:
        """A sentence that names the keys of config.json that are not read, None when all are known."""
        if not self.unknown_keys:
            return None
        return f"config.json has keys that are not known here and have no effect: {', '.join(self.unknown_keys)}"


def _mend(setting: str) -> str:
    examples = " or ".join(family.example for family in FAMILIES.values())
    return f"set {setting} to a dense Qwen2, Qwen2.5 or Qwen3 model, for example {examples}"


ROPE_KEYS = frozenset(("rope_type", "type", "rope_theta", "partial_rotary_factor"))
YARN_KEYS = frozenset(
    (
        *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate"),
        *("attention_factor", "mscale", "mscale_all_dim"),
    )
)


class _Reader:
    """Reads a config.json, and refuses with one line what is not offered. `setting`=`source` names the model."""

    def __init__(self, config: Mapping[str, Any], source: str, setting: str):
        self.config, self.source, self.setting = config, source, setting

    def refuse(self, what: str) -> NoReturn:
        """ModelError: config.json says `what`, and the mend; a mend in `what` comes first."""
        join = ", or " if "; " in what else "; "
        raise ModelError(f"{self.setting}={self.source}: config.json says {what}{join}{_mend(self.setting)}")

    def size(self, name: str, values: Mapping[str, Any] | None = None) -> int:
        """The positive whole number `name`."""
        value = (self.config if values is None else values).get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.refuse(f"{name}={value!r}, expected a positive integer")
        return value

    def number(self, name: str, value: Any, least: float = 0.0) -> float:
        """`value` of `name`, a number over 0 and of at least `least`."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf or value < least:
            at_least = f"number of at least {least:g}" if least else "positive number"
            self.refuse(f"{name}={value!r}, expected a {at_least}")
        return float(value)

    def groups(self, heads: int) -> int:
        """The number of KV heads."""
        groups = self.size("num_key_value_heads")
        if heads % groups:
            self.refuse(f"num_key_value_heads={groups}, which does not divide num_attention_heads={heads}")
        return groups

    def head_dim(self, family: Family, heads: int) -> int:
        """The width of a head, by the rule of the family."""
        hidden, said = self.size("hidden_size"), self.config.get("head_dim")
        if family.head_dim is not None:
            width = family.head_dim if "head_dim" not in self.config else self.size("head_dim")
        else:
            if hidden % heads:
                self.refuse(f"hidden_size={hidden}, not a multiple of num_attention_heads={heads}")
            width = hidden // heads
            if said not in (None, width):
                self.refuse(
                    f"head_dim={said}, but a {family.model_type} model has hidden_size / num_attention_heads = {width} "
                    "(vLLM computes with that)"
                )
        if width % 2:
            self.refuse(f"head_dim={width}, but the rotary embedding takes heads of an even width")
        return width

    def architectures(self, family: Family | None) -> list[Any]:
        """What config.json names; where it names nothing, the causal language model of `family`."""
        named = self.config.get("architectures") or ([family.architecture] if family else [])
        return named if isinstance(named, list) else [named]

    def family(self, critic: bool) -> Family:
        """The family that config.json names; ModelError for every other architecture. With `critic` it may be one."""
        model_type = self.config.get("model_type")
        family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
        architectures = self.architectures(family)
        names = [str(name).lower() for name in (model_type, *architectures)]
        what = f"(model_type={model_type!r}, architectures={architectures})"
        reason = None
        if any("moe" in name for name in names):
            reason = f"a mixture-of-experts model {what}, which this trainer does not offer"
        elif any("vl" in name or "vision" in name for name in names):
            reason = f"a vision-language model {what}, which this trainer does not offer"
        elif family is None or architectures not in ([family.architecture], [family.critic][: int(critic)]):
            offered = [one.architecture for one in FAMILIES.values()]
            offered += [one.critic for one in FAMILIES.values() if critic]
            expected = " or ".join(offered)
            reason = f"not a Qwen2 or Qwen3 model {what}, expected {expected}"
        if reason:
            raise ModelError(f"{self.setting}={self.source} is {reason}; {_mend(self.setting)}")
        assert family is not None
        return family

    def refuse_other_computation(self, family: Family) -> None:
        """ModelError for what changes the forward pass and is not offered, or not known."""
        config, method = self.config, self.config.get("quantization_config")
        reason = None
        if method is not None:
            method = method.get("quant_method", "unknown") if isinstance(method, Mapping) else method
            reason = f"a quantised model (quantization_config: {method}), whose weights cannot be trained"
        elif config.get("use_sliding_window"):
            reason = (
                "a model with use_sliding_window=true, which this trainer does not offer: the policy attends to whole "
                f"rows; set it to false if no row is longer than sliding_window={config.get('sliding_window')}"
            )
        elif config.get("hidden_act", "silu") != "silu":
            reason = f"a model with hidden_act={config['hidden_act']!r}; {family.model_type} uses silu"
        if reason:
            raise ModelError(f"{self.setting}={self.source} is {reason}; {_mend(self.setting)}")
        if (key := refused_key(config)) is not None:
            self.refuse(
                f"{key}={shortened(config[key])}, which this trainer does not know and which may change what the model "
                "computes; remove the key from config.json if the model is right without it"
            )
        kinds = config.get("layer_types")
        legal = {
            "attention_bias": config.get("attention_bias") in (None, False, family.qkv_bias),
            "is_causal": config.get("is_causal") in (None, True),
            "partial_rotary_factor": config.get("partial_rotary_factor") in (None, 1.0),
            "layer_types": kinds is None
            or (isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)),
        }
        for key, offered in legal.items():
            if not offered:
                self.refuse(f"{key}={shortened(config[key])}, which this trainer does not offer")

    def rope(self, positions: int) -> tuple[float, Yarn | None]:
        """(rope_theta, YaRN), as transformers 4 (`rope_scaling`, `rope_theta`) or 5 (`rope_parameters`) wrote them."""
        config = self.config
        old, new = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}
        if not isinstance(old, Mapping) or not isinstance(new, Mapping):
            self.refuse(f"rope scaling {shortened(old or new)}, expected an object")
        rope = old or new  # transformers reads them in this order
        kinds = {
            str(values[key]) for values in (old, new) for key in ("rope_type", "type") if values.get(key) is not None
        }
        if len(kinds) > 1 or {**new, **old} != {**old, **new}:
            self.refuse("two different kinds of rope scaling (rope_scaling and rope_parameters, or type and rope_type)")
        thetas = [values["rope_theta"] for values in (old, new, config) if values.get("rope_theta") is not None]
        if any(theta != thetas[0] for theta in thetas):
            self.refuse(f"two values of rope_theta, {thetas[0]} and {next(t for t in thetas if t != thetas[0])}")
        kind = kinds.pop() if kinds else "default"
        if kind not in ("default", "yarn"):
            self.refuse(f"rope scaling ({kind}), which this trainer does not offer: it offers yarn")
        legal = ROPE_KEYS if kind == "default" else ROPE_KEYS | YARN_KEYS
        if unknown := [key for key, value in rope.items() if key not in legal and value is not None]:
            self.refuse(f"{unknown[0]}={shortened(rope[unknown[0]])} in rope scaling ({kind}), which is not known here")
        if rope.get("partial_rotary_factor") not in (None, 1.0):
            self.refuse(f"partial_rotary_factor={rope['partial_rotary_factor']}, which this trainer does not offer")
        theta = self.number("rope_theta", thetas[0] if thetas else 10000.0)
        return theta, self._yarn(rope, positions) if kind == "yarn" else None

    def _yarn(self, rope: Mapping[str, Any], positions: int) -> Yarn:
        original = "original_max_position_embeddings"
        truncate = rope.get("truncate", True)
        if not isinstance(truncate, bool):
            self.refuse(f"truncate={truncate!r} in rope scaling (yarn), expected true or false")
        yarn = Yarn(
            factor=self.number("factor", rope.get("factor"), least=1.0),
            original_max_position_embeddings=positions if rope.get(original) is None else self.size(original, rope),
            beta_fast=self.number("beta_fast", rope.get("beta_fast", 32)),
            beta_slow=self.number("beta_slow", rope.get("beta_slow", 1)),
            truncate=truncate,
        )
        said = rope.get("attention_factor")
        if said is None and rope.get("mscale") and rope.get("mscale_all_dim"):
            top, bottom = (0.1 * rope[name] * math.log(yarn.factor) + 1 for name in ("mscale", "mscale_all_dim"))
            said = top / bottom
        if said is not None and not math.isclose(self.number("attention_factor", said), yarn.attention_factor):
            # vLLM 0.24 (yarn_scaling_rope.py) reads none of attention_factor, mscale and mscale_all_dim.
            self.refuse(
                f"an attention factor of {said:g} in rope scaling (yarn), but vLLM computes with 0.1 ln(factor) + 1 = "
                f"{yarn.attention_factor:g}; remove attention_factor, mscale and mscale_all_dim there to train so"
            )
        return yarn
