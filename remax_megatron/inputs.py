"""What a run reads: the model's folder and the prompts, found (or made, or downloaded) and checked.

Inputs are prepared before any process group or engine exists, so that what a user can fix is one `error:` line.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from remax_megatron.config.load import to_yaml
from remax_megatron.config.schema import Config, ConfigError
from remax_megatron.data.dataset import PromptDataset, load_prompts
from remax_megatron.downloads import failed_download
from remax_megatron.model_facts import ModelFacts
from remax_megatron.rewards.sandbox.api import available_protections
from remax_megatron.rewards.scoring import check_data_sources, load_scorer
from remax_megatron.weights.megatron_folder import open_weights


@dataclass
class Inputs:
    """What a run reads: a local model folder (Hugging Face or Megatron), and tokenised prompts."""

    model_folder: str
    tokenizer: object
    stop_token_ids: list[int]
    train_prompts: PromptDataset
    val_prompts: PromptDataset | None


def prepare_inputs(config: Config, facts: ModelFacts) -> Inputs:
    """Find (or make, or download) model and data, and read them. UserError for whatever does not fit."""
    from transformers import AutoTokenizer

    data = config.data
    folder = local_model_folder(config.actor_rollout_ref.model.path)
    open_weights(folder, facts)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:  # what damaged or missing tokenizer files raise
        raise ConfigError(f"actor_rollout_ref.model.path={folder}: the tokenizer cannot be read: {error}") from error
    if not tokenizer.chat_template:
        raise ConfigError(
            f"actor_rollout_ref.model.path={folder}: the tokenizer has no chat template; add one to the folder"
        )

    def load(files) -> PromptDataset:
        return load_prompts(
            [files] if isinstance(files, str) else list(files),
            tokenizer,
            max_prompt_length=data.max_prompt_length,
            filter_overlong_prompts=data.filter_overlong_prompts,
            truncation=data.truncation,
            prompt_key=data.prompt_key,
        )

    train = load(data.train_files)
    if len(train) < data.train_batch_size:
        raise ConfigError(
            f"data.train_batch_size={data.train_batch_size} is more than the {len(train)} usable prompts of "
            f"data.train_files; set it to {len(train)} or less"
        )
    val = load(data.val_files) if data.val_files else None
    if val is not None and data.val_max_samples > 0:
        val = PromptDataset(val.prompts[: data.val_max_samples], val.num_rows, val.num_filtered, val.num_truncated)
    reward = config.custom_reward_function
    if reward.path is None:
        sources = {p.data_source for p in train} | {p.data_source for p in val or ()}
        check_data_sources(sources)
        if "code" in sources:
            available_protections().check()
    else:
        load_scorer(reward.path, reward.name)  # its errors, before anything is started
    return Inputs(folder, tokenizer, end_token_ids(folder, tokenizer), train, val)


def end_token_ids(model_folder: str, tokenizer) -> list[int]:
    """The tokens that end an answer: generation_config.json's, and the tokenizer's own end-of-sequence token.

    ConfigError when there is none, or one that the vocabulary of config.json does not have.
    """
    key = f"actor_rollout_ref.model.path={model_folder}"
    vocab_size = ModelFacts.from_folder(model_folder, setting="actor_rollout_ref.model.path").vocab_size
    ids: set[int] = set()
    own = tokenizer.eos_token_id
    for source, declared in (("tokenizer", own), ("generation_config.json", _declared_end(Path(model_folder), key))):
        for token in declared if isinstance(declared, list) else [] if declared is None else [declared]:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
                raise ConfigError(
                    f"{key}: the {source} says eos_token_id={declared!r}, expected ids from 0 to {vocab_size - 1}, the "
                    f"vocabulary of config.json; set eos_token_id in the {source} to the number of the token that ends "
                    "an answer"
                )
            ids.add(token)
    if not ids:
        raise ConfigError(
            f"{key}: neither generation_config.json nor the tokenizer names an end-of-sequence token; set eos_token_id "
            "in generation_config.json"
        )
    return sorted(ids)


def _declared_end(folder: Path, key: str) -> Any:
    """What generation_config.json in `folder` says as eos_token_id. ConfigError, about `key`, for a broken file."""
    path = folder / "generation_config.json"
    if not path.exists():
        return None
    try:
        declared = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(declared, dict):
            raise ValueError(f"it holds a {type(declared).__name__}, expected an object")
    except (ValueError, OSError, RecursionError) as error:
        why = failed_download(path) or f"cannot be read ({error}); write it again, or remove it"
        raise ConfigError(f"{key}: generation_config.json {why}") from error
    return declared.get("eos_token_id")


def local_model_folder(path: str) -> str:
    """A local folder for `actor_rollout_ref.model.path`: itself, or the hub's snapshot."""
    if Path(path).expanduser().is_dir():
        return str(Path(path).expanduser())
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"])
    except OSError as error:  # huggingface_hub's offline, connection and HTTP errors are OSErrors
        raise ConfigError(
            f"actor_rollout_ref.model.path={path} could not be downloaded ({type(error).__name__}: {error}); connect "
            "to the hub, or set it to a local folder"
        ) from error


def total_steps(config: Config, num_prompts: int) -> int:
    """Steps of a whole run over `num_prompts` training prompts."""
    steps = num_prompts // config.data.train_batch_size * config.trainer.total_epochs
    limit = config.trainer.total_training_steps
    return steps if limit is None else min(steps, limit)


def check_ranks_agree(config: Config, inputs: Inputs) -> str:
    """The digest of the training prompts. ConfigError, on every rank, when ranks would train on other settings or
    prompts than rank 0. Collective."""
    train, val = (
        hashlib.sha256(json.dumps([asdict(p) for p in prompts], sort_keys=True, default=str).encode()).hexdigest()
        for prompts in (inputs.train_prompts, inputs.val_prompts or ())
    )
    mine = hashlib.sha256(repr((to_yaml(config), train, val)).encode()).hexdigest()
    digests: list = [None] * dist.get_world_size()
    dist.all_gather_object(digests, mine)
    if others := [rank for rank, digest in enumerate(digests) if digest != digests[0]]:
        raise ConfigError(
            f"ranks {others} read other settings or data than rank 0; start every node with the same command, "
            "environment and files"
        )
    return train
