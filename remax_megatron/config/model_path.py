"""From the setting `actor_rollout_ref.model.path` to the facts of that model: a local folder, or a hub id.

Of a hub model the local cache is asked first; else its config.json alone is downloaded.
"""

from __future__ import annotations

import re
from pathlib import Path

from remax_megatron.config.schema import ConfigError
from remax_megatron.model_facts import ModelFacts

KEY = "actor_rollout_ref.model.path"
HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")


def resolve_model_facts(path: str, prepare_command: str | None = None) -> ModelFacts:
    """Facts for any legal `actor_rollout_ref.model.path`. UserError when they cannot be had.

    `prepare_command` (trainer.prepare_command) is named when there is no such folder.
    """
    if Path(path).expanduser().is_dir():
        return ModelFacts.from_folder(path, setting=KEY)
    if not HUB_ID.fullmatch(path):
        fix = "set it to a folder with config.json and *.safetensors, or to a hub id such as Qwen/Qwen2.5-7B-Instruct"
        if prepare_command is not None:
            fix += f", or make the preset's own with: {prepare_command}"
        raise ConfigError(f"{KEY}={path}: there is no such folder; {fix}")
    return ModelFacts.from_file(_hub_config_file(path), path, setting=KEY)


def _hub_config_file(repo_id: str) -> Path:
    """Path of config.json of the hub model `repo_id`: from the local cache, else downloaded (that one file)."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        cached = try_to_load_from_cache(repo_id, "config.json")
        return Path(cached if isinstance(cached, str) else hf_hub_download(repo_id, "config.json"))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ConfigError(
            f"{KEY}={repo_id} is neither a local folder nor a model on the hub that this account may read;"
            " check the name (and `hf auth login` for a private model), or set it to a local folder"
        ) from error
    except OSError as error:  # huggingface_hub's offline, connection and HTTP errors are OSErrors
        raise ConfigError(
            f"{KEY}={repo_id} is neither a local folder nor in the local hub cache, and its config.json could not be"
            f" downloaded ({type(error).__name__}); connect to the hub, or set it to a local folder"
        ) from error
