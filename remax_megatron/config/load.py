"""Settings from a preset (YAML) and `key=value` overrides, through Hydra's compose, into the typed `Config`.

    load_config("qwen2_5_7b", ["data.train_batch_size=512", "actor_rollout_ref.actor.optim.lr=5e-7"]).config

Presets hold nested or dotted keys and may build on each other with a Hydra defaults list. Every key must be one of
`schema.Config`: an unknown one is an error that names the nearest known ones, a value of a wrong type an error that
names the type. `+key=value` and `++key=value` set a key as `key=value` does, since every key exists. Below a setting
that holds a mapping any key is legal; a mapping given as a whole is merged, name by name, with what presets and earlier
overrides put there, and null empties it. What Hydra offers beside that (sweeps, config groups, deletion, the `hydra.*`
keys) is refused. verl's keys that are none here are read as others, noted or refused, as the table in `verl` says.
The rules that settings have to keep are in `rules`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from remax_megatron.config.as_written import compose_preset, parse_override, value_as_written
from remax_megatron.config.schema import CRITIC_MEGATRON, GROUPS, MEGATRON, SETTINGS, Config, ConfigError
from remax_megatron.config.setting import set_value, type_words, value_of
from remax_megatron.config.verl import Translated, translate
from remax_megatron.data_files import expanded


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
    composed = _merged(OmegaConf.structured(Config), preset.tree, f" (in the preset {config_name})")
    given = [_read_override(text) for text in overrides]
    _check_said_once(given)
    for override in given:
        composed = _merged(composed, override.tree)
    _check_required(composed)
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere, or to a wrong type
        key = getattr(error, "full_key", None) or "a setting"
        raise ConfigError(
            f"{key}: the interpolation cannot be resolved ({_first_line(error)}); write the value itself"
        ) from error
    assert isinstance(config, Config)
    notes = [note for part in (preset, *given) for note in part.notes]
    return LoadedConfig(config, notes + _settle(config, {key for part in given for key in _dotted(part.tree)}))


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


def nearest_keys(key: str) -> list[str]:
    """Up to three known keys that `key` was probably meant to be, best first: typing errors and forgotten prefixes."""
    depth, last = key.count(".") + 1, key.rpartition(".")[2]

    def likeness(known: str) -> float:
        parts = known.split(".")
        return max(_ratio(key, known), _ratio(key, ".".join(parts[-depth:])), 0.9 * _ratio(last, parts[-1]))

    scored = sorted(((likeness(known), known) for known in SETTINGS), key=lambda pair: -pair[0])
    best = scored[0][0]
    return [known for score, known in scored[:3] if score >= max(0.6, best - 0.05)]


# Presets -------------------------------------------------------------------------------------------------------------


def _read_preset(name: str, folder: Path) -> Translated:
    """The preset with its defaults list composed, as nested dicts whose keys are all known."""
    folder = folder.expanduser().resolve()
    name = name.removesuffix(".yaml")
    if not folder.is_dir():
        raise ConfigError(f"the preset folder {folder} does not exist; set --config-dir to a folder of YAML files")
    if "/" in name or not (folder / f"{name}.yaml").is_file():
        names = ", ".join(list_presets(folder)) or "none"
        raise ConfigError(f"there is no preset {name!r} in {folder}; set --config-name to one of: {names}")
    try:
        composed = compose_preset(name, (folder, presets_dir()))  # presets of others may build on the shipped ones
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"the preset {name} in {folder} cannot be read: {_first_line(error)}") from error
    tree = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(tree, dict)
    return _translated(_nest(tree), f" (in the preset {name})")


def _nest(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """`tree` with dotted keys unfolded, {"a.b": 1} -> {"a": {"b": 1}}, down to the settings that hold a mapping."""
    nested: dict[str, Any] = {}
    for key, value in tree.items():
        whole = f"{prefix}{key}"
        if isinstance(value, Mapping) and whole not in SETTINGS:
            value = _nest(value, f"{whole}.")
        for name in reversed(str(key).split(".")):
            value = {name: value}
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


def _translated(tree: dict[str, Any], where: str) -> Translated:
    """`tree` with verl's keys as what they are read as, before which a setting's own key stands back; `_checked`."""
    found = translate(tree, where)
    read = _nest({key: value for key, (_, value) in found.read_as.items()})
    found.tree = _checked(_overlay(found.tree, read), where)
    return found


def _checked(tree: dict[str, Any], where: str, prefix: str = "") -> dict[str, Any]:
    """`tree` without empty groups (YAML reads `data:` with nothing below as null). ConfigError: an unknown key, or a
    value where a group belongs."""
    kept = {}
    for name, value in tree.items():
        key = prefix + name
        if key in SETTINGS:
            kept[name] = _mapping(key, value, where) if SETTINGS[key].mapping else value
        elif key not in GROUPS:
            raise _unknown_key(f"{key}.{next(_dotted(value))}" if isinstance(value, dict) and value else key, where)
        elif isinstance(value, dict):
            kept[name] = _checked(value, where, f"{key}.")
        elif value is not None:
            raise _not_a_value(key, value, where)
    return kept


def _mapping(key: str, value: Any, where: str) -> Any:
    """`value`. ConfigError unless it is null, an interpolation, or a mapping whose names are texts."""
    if value is None or (isinstance(value, str) and value.startswith("${")):
        return value
    if not isinstance(value, Mapping):
        raise _wrong_type(key, value, where)
    if strange := [name for name in value if not isinstance(name, str)]:
        raise ConfigError(f"{key}{where} has the name {strange[0]!r}, which is not a text; quote it")
    return value


def _merged(below: DictConfig, above: dict[str, Any], where: str = "") -> DictConfig:
    """`below` with the values of `above` on top, each converted to its type."""
    try:
        merged = OmegaConf.merge(below, above)
    except OmegaConfBaseException as error:
        raise _type_error(error, where) from error
    assert isinstance(merged, DictConfig)
    return merged


# Overrides -----------------------------------------------------------------------------------------------------------


def _read_override(text: str) -> Translated:
    """What the override `text` sets, as nested dicts whose keys are all known."""
    try:
        try:
            override = parse_override(text)
        except HydraException:
            # A bare path with ~ or = in it, which Hydra wants quoted.
            key, _, value = text.partition("=")
            if not re.fullmatch(r"[\w./~=:@%+-]+", value):
                raise
            text = f"{key}='{value}'"
            override = parse_override(text)
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
    value = value_as_written(override)
    found = _translated(_nest({key: value}), "")
    if not (found.tree or found.notes):
        raise _not_a_value(key, None, "")
    if value == MISSING and found.tree:  # which a merge would leave out without a word
        raise _not_set(key)
    return found


def _check_said_once(given: Sequence[Translated]) -> None:
    """ConfigError when overrides set a setting and verl's key for it to different values."""
    read_as = {key: said for part in given for key, said in part.read_as.items()}
    for part in given:
        for key in read_as.keys() & set(_dotted(part.tree)):
            (theirs, value), ours = read_as[key], _value_in(part.tree, key)
            if ours != value:
                raise ConfigError(f"{theirs}={value} stands for {key}, which is set to {ours}; set only {key}")


# The resolved settings -----------------------------------------------------------------------------------------------


def _check_required(config: DictConfig) -> None:
    for key, setting in SETTINGS.items():
        group, _, name = key.rpartition(".")
        if setting.example is not None and OmegaConf.is_missing(OmegaConf.select(config, group), name):
            raise _not_set(key)


def _settle(config: Config, set_by_user: set[str]) -> list[str]:
    """Bring settings into the one form the code reads: aliases mapped, switches off that cannot act, `~` expanded."""
    aliases = [(key, setting.alias_of) for key, setting in SETTINGS.items() if setting.alias_of]
    notes = [note for alias, key in aliases if (note := _map_alias(config, alias, key, set_by_user))]
    policy = config.actor_rollout_ref.actor.megatron
    for group in (MEGATRON, CRITIC_MEGATRON):
        cut, virtual = f"{group}.sequence_parallel", f"{group}.virtual_pipeline_model_parallel_size"
        if value_of(config, cut) and policy.tensor_model_parallel_size == 1:
            set_value(config, cut, False)
            notes.append(f"{cut}=True is treated as False: tensor_model_parallel_size is 1")
        if value_of(config, virtual) == 1 and policy.virtual_pipeline_model_parallel_size in (None, 1):
            set_value(config, virtual, None)
            notes.append(f"{virtual}=1 is treated as null: one chunk per stage")
    logger = config.trainer.logger
    config.trainer.logger = [logger] if isinstance(logger, str) else [] if logger is None else logger
    if isinstance(logger, list) and "file" in logger:
        config.trainer.logger = [name for name in logger if name != "file"]
        notes.append("trainer.logger: file is left out, since metrics.jsonl is always written")
    if not isinstance(config.trainer.logger, list):
        raise ConfigError(f"trainer.logger={logger} is not a list of names; set trainer.logger=[console]")
    for key, setting in SETTINGS.items():
        if setting.path:
            set_value(config, key, _expand_user(value_of(config, key)))
    return notes


def _map_alias(config: Config, alias: str, key: str, set_by_user: set[str]) -> str | None:
    value = value_of(config, alias)
    if value is None:
        return None
    if {alias, key} <= set_by_user and value_of(config, key) != value:
        raise ConfigError(f"{alias}={value} stands for {key}, which is set to {value_of(config, key)}; set only {key}")
    if key not in set_by_user or alias in set_by_user:  # the user's own key beats a preset's alias
        set_value(config, key, value)
    set_value(config, alias, None)
    return f"{alias}={value} is read as {key}={value}"


def _expand_user(value: Any) -> Any:
    if isinstance(value, list):
        return [_expand_user(item) for item in value]
    return str(expanded(value)) if isinstance(value, str) and value.startswith("~") else value


# Keys, types and messages --------------------------------------------------------------------------------------------


def _dotted(tree: Mapping[str, Any]) -> Iterator[str]:
    """Dotted keys of the values in nested dicts; an empty dict counts as a value."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from (f"{name}.{rest}" for rest in _dotted(value))
        else:
            yield str(name)


def _value_in(tree: Mapping[str, Any], key: str) -> Any:
    for name in key.split("."):
        tree = tree[name]
    return tree


def _unknown_key(key: str, where: str) -> ConfigError:
    near = nearest_keys(key)
    fix = f"did you mean {' or '.join(near)}?" if near else "--cfg job prints every setting"
    return ConfigError(f"unknown setting {key}{where}; {fix}")


def _by_size(file: Path) -> list[str]:
    """Sorts qwen2_5_7b before qwen2_5_14b."""
    return [part.zfill(4) if part.isdigit() else part for part in re.split(r"(\d+)", file.stem)]


def _ratio(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def _not_a_value(group: str, value: Any, where: str) -> ConfigError:
    example = next(key for key in SETTINGS if key.startswith(f"{group}."))
    return ConfigError(
        f"{group}={value}{where}: {group} is a group of settings; set one of them, for example {example}=..."
    )


def _not_set(key: str) -> ConfigError:
    return ConfigError(f"{key} is not set; set {key}={SETTINGS[key].example or '...'}")


def _wrong_type(key: str, value: Any, where: str) -> ConfigError:
    return ConfigError(f"{key}={value!r}{where} has a wrong type; set it to {type_words(SETTINGS[key].kind)}")


def _type_error(error: OmegaConfBaseException, where: str = "") -> ConfigError:
    key = error.full_key or ""
    if isinstance(error, ValidationError) and key in SETTINGS:
        return _wrong_type(key, error.value, where)
    return ConfigError(f"{key or 'a setting'}{where} cannot be set: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    """`error` in one line: the first of several, but all of YAML's, which says where on the later ones."""
    text = str(error)
    return " ".join(text.split()) if isinstance(error, yaml.YAMLError) else text.partition("\n")[0]
