"""What a run reads: the model's folder and the prompts, found (or made, or downloaded) and checked.

Inputs are prepared before any process group or engine exists, so that what a user can fix is one `error:` line.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch.distributed as dist

from remax_megatron.config.load import to_yaml
from remax_megatron.config.rules.model_fit import check_critic
from remax_megatron.config.schema import Config, ConfigError, has_critic
from remax_megatron.data.dataset import PromptDataset, as_it_is, load_prompts
from remax_megatron.downloads import failed_download
from remax_megatron.model_facts import ModelFacts
from remax_megatron.parallel.link import Link
from remax_megatron.rewards.pool import RewardPool
from remax_megatron.rewards.sandbox.api import available_protections
from remax_megatron.rewards.scoring import built_in_ground_truth
from remax_megatron.run_folder import refuse_inputs_inside
from remax_megatron.types import Prompt
from remax_megatron.weights.critic_folder import open_critic
from remax_megatron.weights.megatron_folder import model_folder, open_weights


@dataclass(frozen=True)
class CriticInputs:
    """The local folder that PPO's critic starts from, and its sizes."""

    folder: str
    facts: ModelFacts


@dataclass
class Inputs:
    """What a run reads: a local model folder (Hugging Face or Megatron), tokenised prompts, and a critic's folder."""

    model_folder: str
    tokenizer: object
    stop_token_ids: list[int]
    train_prompts: PromptDataset
    val_prompts: PromptDataset | None
    critic: CriticInputs | None = None

    @property
    def notes(self) -> list[str]:
        """Return what was read otherwise than it was written, and what of it may not be meant."""
        notes, val = list(self.train_prompts.notes), self.val_prompts
        if val is not None:
            trained = {prompt.token_ids for prompt in self.train_prompts}
            if shared := sum(prompt.token_ids in trained for prompt in val):
                notes.append(f"{shared} of {len(val)} prompts of data.val_files are in data.train_files as well")
            notes += val.notes
        return notes


def prepare_inputs(config: Config, facts: ModelFacts) -> Inputs:
    """Find (or make, or download) model and data, and read them. UserError for whatever does not fit."""
    refuse_inputs_inside(config)
    folder = local_model_folder(config.actor_rollout_ref.model.path)
    open_weights(folder, facts)
    tokenizer = read_tokenizer(folder)
    template = config.actor_rollout_ref.model.custom_chat_template
    if template is not None:
        tokenizer.chat_template = chat_template(template)
    if not tokenizer.chat_template:
        raise ConfigError(
            f"actor_rollout_ref.model.path={folder}: the tokenizer has no chat template; add one to the folder, or set "
            "actor_rollout_ref.model.custom_chat_template"
        )
    train, val = read_prompts(config, tokenizer, facts.vocab_size)
    check_rewards(config, {*train.sources, *(val.sources if val else ())})
    critic = read_critic(config, facts) if has_critic(config) else None
    return Inputs(folder, tokenizer, end_token_ids(folder, tokenizer), train, val, critic)


def read_critic(config: Config, policy: ModelFacts) -> CriticInputs:
    """The critic of critic.model.path, or one with the layers of the policy. UserError when it does not fit it."""
    path = config.critic.model.path
    key = "actor_rollout_ref.model.path" if path is None else "critic.model.path"
    folder = local_model_folder(path or config.actor_rollout_ref.model.path, key)
    facts = ModelFacts.from_folder(model_folder(folder), key, critic=True).as_critic()
    if facts.vocab_size < policy.vocab_size:
        raise ConfigError(
            f"{key}={folder} has a vocabulary of {facts.vocab_size}, and the policy one of {policy.vocab_size}; set it "
            "to a model with the policy's tokenizer, or to null for the policy's own layers"
        )
    check_critic(config, facts)
    open_critic(folder, facts)
    return CriticInputs(folder, facts)


def read_tokenizer(folder: str) -> Any:
    """The tokenizer in the model's folder. ConfigError when it cannot be read, or has no vocabulary."""
    from transformers import AutoTokenizer

    key = f"actor_rollout_ref.model.path={folder}"
    files = "tokenizer.json (or vocab.json and merges.txt), and tokenizer_config.json"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        knows_words = bool(set(tokenizer.encode("What is 2 + 3?")) - set(tokenizer.all_special_ids))
    except Exception as error:  # damaged or missing files raise many things, also some of the tokenizers' own
        raise ConfigError(
            f"{key}: the tokenizer cannot be read: {error} ({type(error).__name__}); look at {files}, or download the "
            "folder again"
        ) from error
    if not knows_words:
        raise ConfigError(f"{key}: the tokenizer has no vocabulary; the folder needs {files}")
    return tokenizer


def read_prompts(config: Config, tokenizer: Any, vocab_size: int) -> tuple[PromptDataset, PromptDataset | None]:
    """The prompts of training and validation. UserError, naming up to ten rows, when any cannot be used."""
    data, own_reward = config.data, config.custom_reward_function.path is not None

    def load(files: Any) -> PromptDataset:
        return load_prompts(
            [files] if isinstance(files, str) else list(files),
            tokenizer,
            max_prompt_length=data.max_prompt_length,
            filter_overlong_prompts=data.filter_overlong_prompts,
            truncation=data.truncation,
            prompt_key=data.prompt_key,
            continue_final_message=data.continue_final_message,
            template_kwargs=data.apply_chat_template_kwargs,
            vocab_size=vocab_size,
            ground_truth=as_it_is if own_reward else built_in_ground_truth,
        )

    train = load(data.train_files).at_most(data.train_max_samples)
    if len(train) < data.train_batch_size:
        raise ConfigError(
            f"data.train_batch_size={data.train_batch_size} is more than the {len(train)} usable prompts of "
            f"data.train_files; set it to {len(train)} or less"
        )
    return train, load(data.val_files).at_most(data.val_max_samples) if data.val_files else None


def summary(config: Config, inputs: Inputs) -> list[str]:
    """Lines on what a run uses: rows of each source, lengths of prompts, the reward, the steps."""
    steps = total_steps(config, len(inputs.train_prompts))
    reward = config.custom_reward_function
    own = f"{reward.path}, {reward.name}"
    lines = [f"data.train_files: {inputs.train_prompts.summary()}: {steps} steps"]
    if inputs.val_prompts is not None:
        lines.append(f"data.val_files: {inputs.val_prompts.summary()}")
    return [*lines, f"reward: {'the built-in rules of these sources' if reward.path is None else own}"]


def check_rewards(config: Config, sources: set[str]) -> None:
    """RewardError when the user's scorer cannot be loaded, or the sandbox of programs cannot be had.

    The user's file is tried in a process of its own, by the first rank of each node.
    """
    if config.custom_reward_function.path is None:
        if "code" in sources:
            available_protections().check()
    elif os.environ.get("LOCAL_RANK", "0") == "0":
        with reward_pool(config, 1) as pool:
            pool.load()


def reward_pool(config: Config, num_workers: int) -> RewardPool:
    """The processes that score as `config` says."""
    custom, reward = config.custom_reward_function, config.reward
    return RewardPool(
        num_workers,
        reward.timeout_s,
        path=custom.path,
        name=custom.name,
        kwargs=custom.reward_kwargs,
        memory_gib=reward.memory_gib,
        async_concurrency=reward.async_concurrency,
    )


def chat_template(setting: str) -> str:
    """The template that actor_rollout_ref.model.custom_chat_template is, or is the file of."""
    if "{" in setting:
        return setting
    if not setting.strip():
        raise ConfigError("actor_rollout_ref.model.custom_chat_template is empty; set it to null, a template or a file")
    try:
        return Path(setting).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"actor_rollout_ref.model.custom_chat_template={setting} is neither a template (it has no '{{') nor a file "
            f"that can be read ({error}); set it to one of them"
        ) from error


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


def local_model_folder(path: str, key: str = "actor_rollout_ref.model.path") -> str:
    """A local folder for `path`, the value of the setting `key`: itself, or the hub's snapshot."""
    if Path(path).expanduser().is_dir():
        return str(Path(path).expanduser())
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"])
    except OSError as error:  # huggingface_hub's offline, connection and HTTP errors are OSErrors
        raise ConfigError(
            f"{key}={path} could not be downloaded ({type(error).__name__}: {error}); connect "
            "to the hub, or set it to a local folder"
        ) from error


def total_steps(config: Config, num_prompts: int) -> int:
    """Steps of a whole run over `num_prompts` training prompts."""
    steps = num_prompts // config.data.train_batch_size * config.trainer.total_epochs
    limit = config.trainer.total_training_steps
    return steps if limit is None else min(steps, limit)


def steps_out_of_reach(config: Config, num_prompts: int) -> list[str]:
    """A note when trainer.total_training_steps asks for more than the epochs over `num_prompts` prompts give."""
    trainer, per_epoch = config.trainer, num_prompts // config.data.train_batch_size
    asked, steps = trainer.total_training_steps, total_steps(config, num_prompts)
    if asked is None or asked <= steps:
        return []
    return [
        f"trainer.total_training_steps={asked} has no effect: trainer.total_epochs={trainer.total_epochs} of "
        f"{per_epoch} step(s) each give {steps} ({num_prompts} prompts, data.train_batch_size="
        f"{config.data.train_batch_size}); for {asked} set trainer.total_epochs={-(-asked // per_epoch)}"
    ]


def check_ranks_agree(config: Config, inputs: Inputs, link: Link | None = None) -> str:
    """The digest of the training prompts. ConfigError, on every rank, when ranks would train on other settings or
    prompts than rank 0. Collective over all ranks of the run, those at the other end of `link` included."""
    train, val = (
        hashlib.sha256(json.dumps([_identity(p) for p in prompts], sort_keys=True, default=str).encode()).hexdigest()
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
    if link is not None and len({link.share(mine, source=first) for first in link.first_ranks}) > 1:
        raise ConfigError(
            "the ranks of the engine read other settings or data than those of the policy; start every node with the "
            "same command, environment and files"
        )
    return train


def _identity(prompt: Prompt) -> dict[str, Any]:
    """What makes a prompt the same in a resumed run; its turns are in its tokens."""
    return {field.name: getattr(prompt, field.name) for field in fields(prompt) if field.name != "turns"}
