"""The rules that settings have to keep, each one named function. Nothing is started or loaded to check them.

`validate` runs all rules of this package; `validate_files` looks whether files exist, not into them: their columns are
the data loader's to check. A new rule is a function under `@rule`, `@model_rule` or `@remark` (see registry.py) in the
module of its subject; within a module rules run from its top to its end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from remax_megatron.config.rules.registry import MODEL_RULES, REMARKS, RULES, Setup
from remax_megatron.config.schema import Config, ConfigError, as_list
from remax_megatron.config.setting import value_of
from remax_megatron.data_files import SUFFIXES, data_files
from remax_megatron.model_facts import ModelFacts

# Each module registers its rules when it is imported, and the order of these imports is the order of the checks.
# isort: off
from remax_megatron.config.rules import values  # noqa: F401
from remax_megatron.config.rules import ranks  # noqa: F401
from remax_megatron.config.rules import batches  # noqa: F401
from remax_megatron.config.rules import machine  # noqa: F401
from remax_megatron.config.rules import model_fit  # noqa: F401
from remax_megatron.config.rules import remarks  # noqa: F401

# isort: on


def validate(config: Config, world_size: int, model: ModelFacts | None) -> list[str]:
    """Check every rule; returns remarks on settings that have no effect. Rules about the model need `model`."""
    setup = Setup(config, world_size)
    for check in RULES:
        check(setup)
    if model is not None:
        for model_check in MODEL_RULES:
            model_check(setup, model)
    notes = [note for look in REMARKS for note in look(setup)]
    if model is not None and (note := model.note_on_unknown_keys()):
        notes.append(f"actor_rollout_ref.model.path={config.actor_rollout_ref.model.path}: {note}")
    return notes


def validate_files(config: Config) -> None:
    """Data files exist and have a known suffix; the file of a custom reward exists."""
    for key, needed in (("data.train_files", True), ("data.val_files", False)):
        files = as_list(value_of(config, key))
        if needed and not files:
            raise ConfigError(f"{key} is not set; set it to a file or a list of files")
        for file in files:
            _validate_data_file(key, file, config.trainer.prepare_command)
    reward = config.custom_reward_function
    if reward.path is not None and not (Path(reward.path).suffix == ".py" and Path(reward.path).expanduser().is_file()):
        raise ConfigError(
            f"custom_reward_function.path={reward.path} is not a Python file that exists;"
            f" set it to the .py file that defines {reward.name}"
        )
    if not reward.name.isidentifier():
        raise ConfigError(
            f"custom_reward_function.name={reward.name!r} is not the name of a function; an example: compute_score"
        )


def _validate_data_file(key: str, named: Any, prepare_command: str | None) -> None:
    if not isinstance(named, str) or not named:
        raise ConfigError(f"{key} holds {named!r}; set it to a path or a list of paths")
    kinds = ", ".join(SUFFIXES)
    files = data_files(named)
    if not files:
        raise ConfigError(f"{key}={named} holds no file of {kinds}; set it to a file, a folder or a pattern of them")
    for file in files:
        if file.suffix.lower() not in SUFFIXES:
            raise ConfigError(f"{key}={named} has an unknown suffix {file.suffix!r}; set it to a file of {kinds}")
        if not file.is_file():
            fix = "set it to an existing one (GSM8K is written by: python -m remax_megatron.data.gsm8k --local_dir DIR)"
            if prepare_command is not None:
                fix = f"set it to an existing one, or make the preset's own with: {prepare_command}"
            raise ConfigError(f"{key}={named}: there is no such file; {fix}")
