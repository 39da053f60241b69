"""Settings from a preset (YAML) and `key=value` overrides, through Hydra's compose, into the typed `Config`.

    load_config("qwen2_5_7b", ["data.train_batch_size=512", "actor_rollout_ref.actor.optim.lr=5e-7"]).config

Presets hold nested or dotted keys and may build on each other with a Hydra defaults list. Every key must be one of
`schema.Config`: an unknown one is an error that names the nearest known ones, a value of a wrong type an error that
names the type. `+key=value` and `++key=value` set a key as `key=value` does, since every key exists. What Hydra offers
beside that (sweeps, config groups, deletion, the `hydra.*` keys) is refused. The rules between settings are in `rules`.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from remax_megatron.config.rules import value_of
from remax_megatron.config.schema import Config, ConfigError

HYDRA_VERSION = "1.3"
STORE_NAME = "remax_megatron_settings"
REQUIRED = {
    "data.train_files": "data.train_files=DIR/train.parquet",
    "actor_rollout_ref.model.path": "actor_rollout_ref.model.path=FOLDER",
}
PATHS = (
    "data.train_files",
    "data.val_files",
    "actor_rollout_ref.model.path",
    "trainer.default_local_dir",
    "trainer.rollout_data_dir",
    "trainer.validation_data_dir",
    "trainer.resume_from_path",
    "trainer.stop_file",
    "custom_reward_function.path",
)
ACTOR = "actor_rollout_ref.actor"
ALIASES = {
    f"{ACTOR}.fsdp_config.param_offload": f"{ACTOR}.megatron.param_offload",
    f"{ACTOR}.fsdp_config.optimizer_offload": f"{ACTOR}.megatron.optimizer_offload",
    "actor_rollout_ref.ref.fsdp_config.param_offload": "actor_rollout_ref.ref.megatron.param_offload",
}
TYPE_NAMES = {int: "an integer", float: "a number", bool: "True or False", str: "a text", type(None): "null"}


@dataclass(frozen=True)
class LoadedConfig:
    """The resolved settings, and a sentence for each one that was mapped onto another."""

    config: Config
    notes: list[str]


def load_config(
    config_name: str = "demo", overrides: Sequence[str] = (), config_dir: Path | None = None
) -> LoadedConfig:
    """The settings of the preset `config_name`, from `config_dir` or the shipped ones, with `overrides` applied.

    ConfigError: no such preset, an unreadable one, an unknown key, a value of a wrong type, or a required key not set.
    """
    preset = _read_preset(config_name, Path(config_dir) if config_dir else presets_dir())
    base = _typed(preset, config_name)
    cleaned = [_clean_override(text) for text in overrides]
    composed = _apply_overrides(base, [text for text, _ in cleaned])
    _require_paths(composed)
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere, or to a wrong type
        key = getattr(error, "full_key", None) or "a setting"
        raise ConfigError(
            f"{key}: the interpolation cannot be resolved ({_first_line(error)}); write the value itself"
        ) from error
    assert isinstance(config, Config)
    return LoadedConfig(config, _settle(config, {key for _, keys in cleaned for key in keys}))


def to_yaml(config: Config) -> str:
    """All settings as YAML; loading it as a preset gives an equal `Config`."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def presets_dir() -> Path:
    """The folder of the shipped presets: inside the installed package, else beside it in the repository."""
    package = Path(__file__).resolve().parents[1]
    packaged = package / "conf"
    return packaged if packaged.is_dir() else package.parent / "conf"


def list_presets(config_dir: Path | None = None) -> dict[str, str]:
    """Name -> description (the file's first comment) of each preset. Files with a leading _ are parts of others."""
    described = {}
    for file in sorted((config_dir or presets_dir()).glob("[!_]*.yaml"), key=_by_size):
        first = file.read_text(encoding="utf-8").partition("\n")[0]
        described[file.stem] = first.lstrip("# ").strip() if first.startswith("#") else ""
    return described


@cache
def known_keys() -> dict[str, Any]:
    """Every dotted key -> its type."""
    return dict(_leaves(Config, ""))


def nearest_keys(key: str) -> list[str]:
    """Up to three known keys that `key` was probably meant to be, best first: typing errors and forgotten prefixes."""
    depth, last = key.count(".") + 1, key.rpartition(".")[2]

    def likeness(known: str) -> float:
        parts = known.split(".")
        return max(_ratio(key, known), _ratio(key, ".".join(parts[-depth:])), 0.9 * _ratio(last, parts[-1]))

    scored = sorted(((likeness(known), known) for known in known_keys()), key=lambda pair: -pair[0])
    best = scored[0][0]
    return [known for score, known in scored[:3] if score >= max(0.6, best - 0.05)]


# Presets -------------------------------------------------------------------------------------------------------------


def _read_preset(name: str, folder: Path) -> dict[str, Any]:
    """The preset with its defaults list composed, as nested dicts whose keys are all known."""
    folder = folder.expanduser().resolve()
    name = name.removesuffix(".yaml")
    if not folder.is_dir():
        raise ConfigError(f"the preset folder {folder} does not exist; set --config-dir to a folder of YAML files")
    if "/" in name or not (folder / f"{name}.yaml").is_file():
        names = ", ".join(list_presets(folder)) or "none"
        raise ConfigError(f"there is no preset {name!r} in {folder}; set --config-name to one of: {names}")
    try:
        with initialize_config_dir(str(folder), version_base=HYDRA_VERSION):
            # Presets of other folders may build on the shipped ones.
            composed = compose(name, overrides=[f"hydra.searchpath=['file://{presets_dir()}']"])
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"the preset {name} in {folder} cannot be read: {_first_line(error)}") from error
    tree = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(tree, dict)
    return _checked(_nest(tree), f" (in the preset {name})")


def _nest(tree: Mapping[Any, Any]) -> dict[str, Any]:
    """`tree` with dotted keys unfolded: {"a.b": 1} -> {"a": {"b": 1}}."""
    nested: dict[str, Any] = {}
    for key, value in tree.items():
        for name in reversed(str(key).split(".")):
            value = {name: _nest(value) if isinstance(value, Mapping) else value}
        nested = _overlay(nested, value)
    return nested


def _overlay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts merged; `above` wins where both hold a value."""
    both = {
        name: _overlay(below[name], above[name])
        for name in below.keys() & above.keys()
        if isinstance(below[name], dict) and isinstance(above[name], dict)
    }
    return below | above | both


def _checked(tree: dict[str, Any], where: str, prefix: str = "") -> dict[str, Any]:
    """`tree` without empty groups (YAML reads `data:` with nothing below as null). ConfigError: an unknown key, or a
    value where a group belongs."""
    kept = {}
    for name, value in tree.items():
        key = prefix + name
        if key in known_keys():
            kept[name] = value
        elif key not in _groups():
            raise _unknown_key(f"{key}.{next(_dotted(value))}" if isinstance(value, dict) and value else key, where)
        elif isinstance(value, dict):
            kept[name] = _checked(value, where, f"{key}.")
        elif value is not None:
            raise _not_a_value(key, value, where)
    return kept


def _typed(preset: dict[str, Any], source: str) -> DictConfig:
    """The schema's defaults with `preset` on top, every value converted to its type."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), preset)
    except OmegaConfBaseException as error:
        raise _type_error(error, f" (in the preset {source})") from error
    assert isinstance(merged, DictConfig)
    return merged


# Overrides -----------------------------------------------------------------------------------------------------------


def _clean_override(text: str) -> tuple[str, list[str]]:
    """`text` as Hydra takes it for a key that exists, and the keys that it sets."""
    parser = OverridesParser.create()
    try:
        try:
            override = parser.parse_override(text)
        except HydraException:
            # A bare path with ~ or = in it, which Hydra wants quoted.
            key, _, value = text.partition("=")
            if not re.fullmatch(r"[\w./~=:@%+-]+", value):
                raise
            text = f"{key}='{value}'"
            override = parser.parse_override(text)
    except HydraException as error:
        raise ConfigError(
            f"the override {text!r} cannot be read; write key=value, with special characters quoted: key='\"value\"'"
        ) from error
    key = override.key_or_group
    if override.is_delete():
        raise ConfigError(
            f"the override {text!r} deletes a setting, which is not offered; set {key}=null or another value"
        )
    if override.is_sweep_override():
        raise ConfigError(f"the override {text!r} is a sweep, which is not offered; for a list write {key}=[a,b]")
    if override.package is not None or "/" in key:
        raise ConfigError(
            f"the override {text!r} names a config group or package, which is not offered; write key=value"
        )
    tree = _checked(_nest({key: override.value()}), "")
    if not tree:
        raise _not_a_value(key, None, "")
    return "++" + text.lstrip("+"), list(_dotted(tree))


def _apply_overrides(base: DictConfig, overrides: list[str]) -> DictConfig:
    ConfigStore.instance().store(name=STORE_NAME, node=base)
    try:
        with initialize(config_path=None, version_base=HYDRA_VERSION):
            return compose(STORE_NAME, overrides=overrides)
    except HydraException as error:
        cause = error.__cause__
        if isinstance(cause, OmegaConfBaseException):
            raise _type_error(cause) from error
        raise ConfigError(f"the overrides cannot be applied: {_first_line(error)}") from error


# The resolved settings -----------------------------------------------------------------------------------------------


def _require_paths(config: DictConfig) -> None:
    for key, example in REQUIRED.items():
        group, _, name = key.rpartition(".")
        node = OmegaConf.select(config, group)
        if OmegaConf.is_missing(node, name):
            raise ConfigError(f"{key} is not set; set {example}")


def _settle(config: Config, set_by_user: set[str]) -> list[str]:
    """Bring settings into the one form the code reads: aliases mapped, switches off that cannot act, `~` expanded."""
    notes = [note for alias, key in ALIASES.items() if (note := _map_alias(config, alias, key, set_by_user))]
    megatron = config.actor_rollout_ref.actor.megatron
    if megatron.sequence_parallel and megatron.tensor_model_parallel_size == 1:
        megatron.sequence_parallel = False
        notes.append(f"{ACTOR}.megatron.sequence_parallel=True is treated as False: tensor_model_parallel_size is 1")
    if megatron.virtual_pipeline_model_parallel_size == 1:
        megatron.virtual_pipeline_model_parallel_size = None
        notes.append(f"{ACTOR}.megatron.virtual_pipeline_model_parallel_size=1 is treated as null: one chunk per stage")
    logger = config.trainer.logger
    config.trainer.logger = [logger] if isinstance(logger, str) else [] if logger is None else logger
    if not isinstance(config.trainer.logger, list):
        raise ConfigError(f"trainer.logger={logger} is not a list of names; set trainer.logger=[console]")
    for key in PATHS:
        _set(config, key, _expand_user(value_of(config, key)))
    return notes


def _map_alias(config: Config, alias: str, key: str, set_by_user: set[str]) -> str | None:
    value = value_of(config, alias)
    if value is None:
        return None
    if {alias, key} <= set_by_user and value_of(config, key) != value:
        raise ConfigError(f"{alias}={value} stands for {key}, which is set to {value_of(config, key)}; set only {key}")
    if key not in set_by_user or alias in set_by_user:  # the user's own key beats a preset's alias
        _set(config, key, value)
    _set(config, alias, None)
    return f"{alias}={value} is read as {key}={value}"


def _expand_user(value: Any) -> Any:
    if isinstance(value, list):
        return [_expand_user(item) for item in value]
    return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~") else value


def _set(config: Config, key: str, value: Any) -> None:
    group, _, name = key.rpartition(".")
    setattr(value_of(config, group), name, value)


# Keys, types and messages --------------------------------------------------------------------------------------------


def _leaves(group: type, prefix: str) -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(group)
    for field in dataclasses.fields(group):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from _leaves(typing.cast(type, kind), f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", kind


@cache
def _groups() -> frozenset[str]:
    return frozenset(key[: dot.start()] for key in known_keys() for dot in re.finditer(r"\.", key))


def _dotted(tree: Mapping[str, Any]) -> Iterator[str]:
    """Dotted keys of the values in nested dicts; an empty dict counts as a value."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from (f"{name}.{rest}" for rest in _dotted(value))
        else:
            yield str(name)


def _unknown_key(key: str, where: str) -> ConfigError:
    near = nearest_keys(key)
    mend = f"did you mean {' or '.join(near)}?" if near else "--cfg job prints every setting"
    return ConfigError(f"unknown setting {key}{where}; {mend}")


def _by_size(file: Path) -> list[str]:
    """Sorts qwen2_5_7b before qwen2_5_14b."""
    return [part.zfill(4) if part.isdigit() else part for part in re.split(r"(\d+)", file.stem)]


def _ratio(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def _not_a_value(group: str, value: Any, where: str) -> ConfigError:
    example = next(key for key in known_keys() if key.startswith(f"{group}."))
    return ConfigError(
        f"{group}={value}{where}: {group} is a group of settings; set one of them, for example {example}=..."
    )


def _type_error(error: OmegaConfBaseException, where: str = "") -> ConfigError:
    key = error.full_key or ""
    if isinstance(error, ValidationError) and key in known_keys():
        return ConfigError(f"{key}={error.value!r}{where} has a wrong type; set it to {_type_name(known_keys()[key])}")
    return ConfigError(f"{key or 'a setting'}{where} cannot be set: {_first_line(error)}")


def _type_name(kind: Any) -> str:
    if isinstance(kind, types.UnionType):
        return " or ".join(_type_name(part) for part in typing.get_args(kind))
    return TYPE_NAMES.get(kind, str(kind))


def _first_line(error: Exception) -> str:
    """`error` in one line: the first of several, but all of YAML's, which says where on the later ones."""
    text = str(error)
    return " ".join(text.split()) if isinstance(error, yaml.YAMLError) else text.partition("\n")[0]
