"""Settings: presets, overrides, rules, and the command line, all without torch, Megatron or vLLM."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from remax_megatron.config import cli
from remax_megatron.config.load import list_presets, load_config, nearest_keys, presets_dir, to_yaml
from remax_megatron.config.model_path import resolve_model_facts
from remax_megatron.config.rules import validate, validate_files
from remax_megatron.config.rules.registry import RULES, Setup
from remax_megatron.config.schema import (
    SETTINGS,
    Actor,
    Config,
    ConfigError,
    critic_as_actor,
    has_critic,
    recompute_of,
    skips_zero_advantage,
)
from remax_megatron.config.setting import set_value, value_of
from remax_megatron.demo import prepare
from remax_megatron.demo.model_config import MODEL_CONFIG, MODEL_CONFIGS
from remax_megatron.model_facts import ModelError, ModelFacts
from remax_megatron.types import Recompute
from tests import ROOT


def qwen2_5(layers: int, hidden: int, ffn: int, heads: int, kv: int, vocab: int, tied: bool) -> ModelFacts:
    return ModelFacts(layers, hidden, ffn, heads, kv, hidden // heads, vocab, tied, max_position_embeddings=32768)


def qwen3(layers: int, hidden: int, ffn: int, heads: int, tied: bool) -> ModelFacts:
    return ModelFacts(layers, hidden, ffn, heads, 8, 128, 151936, tied, 40960, model_type="qwen3")


MODELS = {
    "qwen2_5_3b": qwen2_5(36, 2048, 11008, 16, 2, 151936, tied=True),
    "qwen2_5_7b": qwen2_5(28, 3584, 18944, 28, 4, 152064, tied=False),
    "qwen2_5_14b": qwen2_5(48, 5120, 13824, 40, 8, 152064, tied=False),
    "qwen2_5_32b": qwen2_5(64, 5120, 27648, 40, 8, 152064, tied=False),
    "qwen2_5_32b_split": qwen2_5(64, 5120, 27648, 40, 8, 152064, tied=False),
    "qwen3_4b": qwen3(36, 2560, 9728, 32, tied=True),
    "qwen3_8b": qwen3(36, 4096, 12288, 32, tied=False),
    "qwen3_14b": qwen3(40, 5120, 17408, 40, tied=False),
    "qwen3_32b": qwen3(64, 5120, 25600, 64, tied=False),
}
# The demo's shape where the demo itself is not the point: 4 layers, 4 heads of 32, 2 KV heads.
TINY = ModelFacts(4, 128, 384, 4, 2, 32, 512, True, 512)
DEMO = ModelFacts.from_hf_config(MODEL_CONFIG, "demo")

ACTOR = "actor_rollout_ref.actor"
MEGATRON = f"{ACTOR}.megatron"
RECOMPUTE = f"{MEGATRON}.override_transformer_config"
CORRECTION = "algorithm.rollout_correction"
ROLLOUT = "actor_rollout_ref.rollout"
GAE = "algorithm.adv_estimator=gae"
REJECTS = [f"{CORRECTION}.rollout_rs=geometric", f"{CORRECTION}.rollout_rs_threshold=0.99_1.01"]


@cache
def preset_config(name: str) -> Config:
    return load_config(name).config


def quick_config(preset: str, overrides: Iterable[str]) -> Config:
    """The preset with values set one by one: 0.2 s faster than composing it, for the many tests of rules."""
    config = copy.deepcopy(preset_config(preset))
    parser = OverridesParser.create()
    for text in overrides:
        override = parser.parse_override(text)
        assert override.key_or_group in SETTINGS
        set_value(config, override.key_or_group, override.value())
    return config


def check(
    *overrides: str, preset: str = "demo", world_size: int | None = None, model: ModelFacts | None = TINY
) -> list[str]:
    """Validate the preset with `overrides`; as many ranks as the settings ask for unless told otherwise."""
    config = quick_config(preset, overrides)
    return validate(config, world_size or config.trainer.nnodes * config.trainer.n_gpus_per_node, model)


def load_and_check(*overrides: str, preset: str = "demo", model: ModelFacts = TINY) -> tuple[Config, list[str]]:
    """As `check`, through the real loader; returns its notes too."""
    loaded = load_config(preset, overrides)
    trainer = loaded.config.trainer
    return loaded.config, loaded.notes + validate(loaded.config, trainer.nnodes * trainer.n_gpus_per_node, model)


# Presets and the guide's examples ------------------------------------------------------------------------------------


def test_every_preset_is_listed_with_a_description_and_all_are_tested():
    presets = list_presets()
    assert list(presets) == ["demo", "demo_qwen3", *MODELS]
    assert all(len(text) > 20 for text in presets.values())


@pytest.mark.parametrize("name", MODELS)
def test_gpu_presets_are_valid_for_their_model(name):
    config, notes = load_and_check(preset=name, model=MODELS[name])
    assert notes == []
    assert config.algorithm.adv_estimator == "remax" and not config.algorithm.use_kl_in_reward
    assert config.data.train_files == str(Path("~/data/gsm8k/train.parquet").expanduser())
    assert name.removesuffix("_split").rpartition("_")[2].upper() in config.actor_rollout_ref.model.path


def test_demo_preset_of_the_other_family():
    facts = ModelFacts.from_hf_config(MODEL_CONFIGS["qwen3"], "demo")
    config, notes = load_and_check(preset="demo_qwen3", model=facts)
    assert notes == [] and facts.model_type == "qwen3" and facts.head_dim * facts.num_attention_heads == 256
    assert config.actor_rollout_ref.model.path == str(prepare.FOLDER / "policy_qwen3")
    assert config.trainer.prepare_command.endswith("--family qwen3")


def test_demo_preset_reads_what_its_prepare_command_makes():
    config, notes = load_and_check(model=DEMO)
    assert notes == []
    assert (config.trainer.device, config.trainer.default_local_dir) == ("cpu", "runs/demo")
    made = [f"{prepare.FOLDER}/{name}" for name in ("data/train.parquet", "data/test.parquet", "policy")]
    assert [config.data.train_files, config.data.val_files, config.actor_rollout_ref.model.path] == made
    assert config.trainer.prepare_command == f"python -m {prepare.__name__}"


GUIDE_EXAMPLES = {
    "gsm8k 7B": (
        "qwen2_5_7b",
        [
            "data.train_batch_size=1024",
            f"{ACTOR}.ppo_max_token_len_per_gpu=24000",
            f"{ROLLOUT}.n=4",
            "trainer.total_epochs=10",
        ],
        {"data.train_batch_size": 1024, f"{ACTOR}.ppo_max_token_len_per_gpu": 24000, f"{ROLLOUT}.n": 4},
    ),
    "no KL": (
        "qwen2_5_7b",
        ["data.train_batch_size=1024", "algorithm.use_kl_in_reward=False", "trainer.logger=['console','wandb']"],
        {"algorithm.use_kl_in_reward": False, "trainer.logger": ["console", "wandb"], "trainer.total_epochs": 10},
    ),
    "14B": (
        "qwen2_5_14b",
        [
            "data.train_batch_size=512",
            f"{ACTOR}.optim.lr=5e-7",
            f"{ACTOR}.ppo_max_token_len_per_gpu=16000",
            f"{ROLLOUT}.tensor_model_parallel_size=4",
        ],
        {"data.train_batch_size": 512, f"{ACTOR}.optim.lr": 5e-7, f"{ROLLOUT}.tensor_model_parallel_size": 4},
    ),
    "long": (
        "qwen2_5_7b",
        [
            "data.max_prompt_length=1024",
            "data.max_response_length=2048",
            "data.train_batch_size=512",
            f"{ACTOR}.ppo_max_token_len_per_gpu=12000",
            "trainer.total_epochs=15",
        ],
        {"data.max_response_length": 2048, f"{ACTOR}.ppo_max_token_len_per_gpu": 12000, "trainer.total_epochs": 15},
    ),
    "four nodes": (
        "qwen2_5_7b",
        [
            "data.train_batch_size=2048",
            f"{ACTOR}.ppo_max_token_len_per_gpu=20000",
            f"{ROLLOUT}.tensor_model_parallel_size=2",
            "trainer.nnodes=4",
            "trainer.n_gpus_per_node=8",
        ],
        {"data.train_batch_size": 2048, f"{ACTOR}.ppo_max_token_len_per_gpu": 20000, "trainer.nnodes": 4},
    ),
}


@pytest.mark.parametrize("example", GUIDE_EXAMPLES)
def test_guide_examples_compose_and_are_valid(example):
    preset, overrides, expected = GUIDE_EXAMPLES[example]
    config, _ = load_and_check(*overrides, preset=preset, model=MODELS[preset])
    assert {key: value_of(config, key) for key in expected} == expected


def test_every_key_of_the_guide_is_known():
    names = {
        "data": "train_files,val_files,train_batch_size,max_prompt_length,max_response_length,filter_overlong_prompts,"
        "truncation",
        "actor_rollout_ref.model": "path,use_remove_padding,enable_gradient_checkpointing",
        ACTOR: "optim.lr,ppo_mini_batch_size,use_dynamic_bsz,ppo_max_token_len_per_gpu,use_kl_loss,kl_loss_coef,"
        "kl_loss_type,entropy_coeff,clip_ratio,loss_agg_mode,ppo_epochs,fsdp_config.param_offload,"
        "fsdp_config.optimizer_offload",
        MEGATRON: "tensor_model_parallel_size,pipeline_model_parallel_size,virtual_pipeline_model_parallel_size,"
        "context_parallel_size,sequence_parallel,use_distributed_optimizer,param_offload,grad_offload,optimizer_offload",
        "actor_rollout_ref.ref": "fsdp_config.param_offload",
        ROLLOUT: "name,tensor_model_parallel_size,gpu_memory_utilization,n,temperature,top_p,top_k,val_kwargs.n,"
        "val_kwargs.do_sample,val_kwargs.temperature",
        "algorithm": "adv_estimator,use_kl_in_reward,kl_penalty,kl_ctrl.kl_coef,kl_ctrl.type,kl_ctrl.horizon,"
        "kl_ctrl.target_kl",
        "trainer": "critic_warmup,logger,project_name,experiment_name,n_gpus_per_node,nnodes,save_freq,test_freq,"
        "total_epochs,val_before_train,default_local_dir,resume_mode,validation_data_dir",
        "custom_reward_function": "path,name",
    }
    keys = {f"{group}.{name}" for group, listed in names.items() for name in listed.split(",")}
    assert keys - set(SETTINGS) == set()


# Overrides, types, unknown keys --------------------------------------------------------------------------------------


def test_overrides_as_hydra_users_write_them():
    config = load_config(
        "demo",
        [
            f"+{ACTOR}.clip_ratio=0.3",
            "++trainer.seed=7",
            "trainer.logger=[console,tensorboard]",
            "data={train_batch_size:32,max_prompt_length:64}",
            "trainer.experiment_name=${trainer.project_name}_x",
            f"{ACTOR}.ppo_mini_batch_size=null",
            "data.train_files=['~/a.parquet','b=1.jsonl']",
            "data.val_files=~/x=1/test.parquet",
        ],
    ).config
    assert config.actor_rollout_ref.actor.clip_ratio == 0.3
    assert (config.trainer.seed, config.trainer.logger) == (7, ["console", "tensorboard"])
    assert (config.data.train_batch_size, config.data.max_prompt_length, config.data.max_response_length) == (
        32,
        64,
        32,
    )
    assert config.trainer.experiment_name == f"{config.trainer.project_name}_x"
    home = str(Path.home())
    assert config.data.train_files == [f"{home}/a.parquet", "b=1.jsonl"]
    assert config.data.val_files == f"{home}/x=1/test.parquet"


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("lr", f"{ACTOR}.optim.lr"),
        ("n", f"{ROLLOUT}.n"),
        ("model.path", "actor_rollout_ref.model.path"),
        ("trainer.sed", "trainer.seed"),
        ("trainer.total_epoch", "trainer.total_epochs"),
        ("temperatur", f"{ROLLOUT}.temperature"),
        (f"{MEGATRON}.tensor_parallel_size", f"{MEGATRON}.tensor_model_parallel_size"),
        ("optim.lr", f"{ACTOR}.optim.lr"),
        ("ref.fsdp_config.param_offload", "actor_rollout_ref.ref.fsdp_config.param_offload"),
    ],
)
def test_unknown_key_names_the_nearest(wrong, nearest):
    assert nearest_keys(wrong)[0] == nearest
    for prefix in ("", "+", "++"):
        with pytest.raises(ConfigError, match=rf"unknown setting {wrong}; did you mean {nearest}"):
            load_config("demo", [f"{prefix}{wrong}=1"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.seed=abc", ["trainer.seed='abc'", "an integer"]),
        ("trainer.seed=1.5", ["trainer.seed=1.5", "an integer"]),
        ("trainer.seed=null", ["trainer.seed=None", "an integer"]),
        ("data.val_batch_size=x", ["data.val_batch_size='x'", "an integer or null"]),
        (f"{ACTOR}.optim.lr=fast", ["optim.lr='fast'", "a number"]),
        ("trainer.val_before_train=maybe", ["'maybe'", "True or False"]),
        ("trainer=3", ["trainer=3", "group of settings"]),
        ("data=null", ["data=None", "group of settings"]),
        ("trainer.seed", ["cannot be read", "key=value"]),
        ("trainer.seed=1,2", ["sweep", "[a,b]"]),
        ("~trainer.seed", ["deletes"]),
        ("trainer/x=y", ["config group"]),
        ("data={train_batch_size:8,foo:2}", ["unknown setting data.foo"]),
        ("hydra.run.dir=x", ["unknown setting hydra.run.dir"]),
        ("trainer.seed=${nowhere}", ["trainer.seed", "interpolation", "nowhere"]),
        ("actor_rollout_ref.model.path=???", ["actor_rollout_ref.model.path is not set"]),
        ("data.train_files=???", ["data.train_files is not set"]),
    ],
)
def test_unreadable_override_is_one_clear_error(override, words):
    with pytest.raises(ConfigError) as caught:
        load_config("demo", [override])
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trainer: [", ["cannot be read", "line"]),
        ("- a", ["cannot be read"]),
        ("trainer: {seed: 1}\ntrainer: {seed: 2}", ["cannot be read", "duplicate"]),
        ("defaults: [nowhere, _self_]", ["cannot be read", "nowhere"]),
        ("trainer: {sed: 1}", ["unknown setting trainer.sed (in the preset mine)", "trainer.seed"]),
        ("trainer.sed: 1", ["unknown setting trainer.sed", "trainer.seed"]),
        ("trainer: {seed: abc}", ["trainer.seed='abc' (in the preset mine)", "an integer"]),
        ("trainer: 3", ["trainer=3", "group of settings"]),
        ("optim: {lr: 1}", ["unknown setting optim.lr", "actor.optim.lr"]),
    ],
)
def test_wrong_preset_is_one_clear_error(tmp_path, text, words):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config("mine", config_dir=tmp_path)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_own_preset_builds_on_a_shipped_one_with_nested_and_dotted_keys(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "# Mine.\ndefaults: [qwen2_5_7b, _self_]\n"
        f"data:\n  max_prompt_length: 256\n{ACTOR}.optim.lr: 2e-6\ndata.train_batch_size: 96\ntrainer:\n"
    )
    config = load_config("mine.yaml", ["data.train_batch_size=48"], tmp_path).config
    assert (config.data.max_prompt_length, config.data.train_batch_size) == (256, 48)
    assert config.actor_rollout_ref.actor.optim.lr == 2e-6
    assert config.actor_rollout_ref.model.path == "Qwen/Qwen2.5-7B-Instruct"
    assert list_presets(tmp_path) == {"mine": "Mine."}


@pytest.mark.parametrize("name", ["demo", *MODELS])
def test_yaml_round_trip(tmp_path, name):
    config = load_config(name, ["trainer.logger=[console,wandb]", "data.train_files=[a.parquet,b.parquet]"]).config
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    again = load_config("config", config_dir=tmp_path)
    assert again.config == config and again.notes == []


# Settings that hold a mapping ----------------------------------------------------------------------------------------

KWARGS, REWARD_KWARGS = "data.apply_chat_template_kwargs", "custom_reward_function.reward_kwargs"


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        ([f"+{KWARGS}.enable_thinking=False"], KWARGS, {"enable_thinking": False}),
        ([f"{KWARGS}={{enable_thinking: false}}"], KWARGS, {"enable_thinking": False}),
        (["data={apply_chat_template_kwargs:{a:1}}"], KWARGS, {"a": 1}),
        (
            [f"+{REWARD_KWARGS}.scale=2", f"++{REWARD_KWARGS}.deep.er=[1,{{x:2}}]"],
            REWARD_KWARGS,
            {"scale": 2, "deep": {"er": [1, {"x": 2}]}},
        ),
        ([f"{REWARD_KWARGS}={{a:1,b:2}}", f"{REWARD_KWARGS}={{b:3}}"], REWARD_KWARGS, {"a": 1, "b": 3}),
        ([f"{REWARD_KWARGS}.a=1", f"{REWARD_KWARGS}=null", f"{REWARD_KWARGS}.b=null"], REWARD_KWARGS, {"b": None}),
        ([f"{REWARD_KWARGS}.seed=${{trainer.seed}}"], REWARD_KWARGS, {"seed": 1}),
        ([f"{REWARD_KWARGS}=null"], REWARD_KWARGS, None),
    ],
)
def test_any_name_is_legal_below_a_mapping(overrides, key, value):
    assert value_of(load_config("demo", overrides).config, key) == value


def test_a_preset_s_mapping_keeps_its_names_and_is_merged_with_overrides(tmp_path):
    (tmp_path / "base.yaml").write_text(f"defaults: [demo, _self_]\n{KWARGS}.deep.a: 1\n")
    (tmp_path / "mine.yaml").write_text(
        "defaults: [base, _self_]\ndata:\n  apply_chat_template_kwargs: {x.y: 2, deep: {b: [3]}}\n"
    )
    loaded = load_config("mine", [f"+{KWARGS}.deep.c=4"], tmp_path)
    expected = {"x.y": 2, "deep": {"a": 1, "b": [3], "c": 4}}
    assert loaded.config.data.apply_chat_template_kwargs == expected and loaded.notes == []
    (tmp_path / "config.yaml").write_text(to_yaml(loaded.config))
    assert load_config("config", config_dir=tmp_path).config == loaded.config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (f"{KWARGS}=5", [f"{KWARGS}=5", "a mapping {name: value} or null"]),
        (f"{KWARGS}=x", [f"{KWARGS}='x'", "a mapping {name: value} or null"]),
        (f"{REWARD_KWARGS}=[1]", [f"{REWARD_KWARGS}=[1]", "a mapping {name: value} or null"]),
        (f"{REWARD_KWARGS}={{1:2}}", [REWARD_KWARGS, "the name 1, which is not a text"]),
        ("trainer.seed.x=1", ["trainer.seed={'x': 1}", "an integer"]),
    ],
)
def test_what_is_no_mapping_is_refused(override, words):
    with pytest.raises(ConfigError) as caught:
        load_config("demo", [override])
    assert all(word in str(caught.value) for word in words), str(caught.value)


# Mapped and remarked settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words", "key", "value"),
    [
        (f"{ACTOR}.fsdp_config.param_offload=True", f"is read as {MEGATRON}", f"{MEGATRON}.param_offload", True),
        (
            f"{ACTOR}.fsdp_config.optimizer_offload=True",
            f"is read as {MEGATRON}",
            f"{MEGATRON}.optimizer_offload",
            True,
        ),
        (
            "actor_rollout_ref.ref.fsdp_config.param_offload=True",
            "no KL term asks for a reference policy",
            "actor_rollout_ref.ref.megatron.param_offload",
            True,
        ),
        (f"{MEGATRON}.sequence_parallel=True", "treated as False", f"{MEGATRON}.sequence_parallel", False),
        (
            f"{MEGATRON}.virtual_pipeline_model_parallel_size=1",
            "treated as null",
            f"{MEGATRON}.virtual_pipeline_model_parallel_size",
            None,
        ),
        (f"{MEGATRON}.grad_offload=True", "no effect: the run is on the CPU", f"{MEGATRON}.grad_offload", True),
        (
            "critic.megatron.sequence_parallel=True",
            "critic.megatron.sequence_parallel=True is treated as False",
            "critic.megatron.sequence_parallel",
            False,
        ),
        (
            "critic.megatron.virtual_pipeline_model_parallel_size=1",
            "critic.megatron.virtual_pipeline_model_parallel_size=1 is treated as null",
            "critic.megatron.virtual_pipeline_model_parallel_size",
            None,
        ),
        ("trainer.critic_warmup=5", "adv_estimator=remax has no critic", "trainer.critic_warmup", 5),
        ("critic.model.path=~/c", "remax has no critic", "critic.model.path", str(Path("~/c").expanduser())),
        (f"{ACTOR}.ppo_micro_batch_size_per_gpu=4", "packs by tokens", f"{ACTOR}.ppo_micro_batch_size_per_gpu", 4),
        (f"{ROLLOUT}.val_kwargs.temperature=0.6", "is greedy", f"{ROLLOUT}.val_kwargs.temperature", 0.6),
        (f"{ROLLOUT}.val_kwargs.top_p=0.7", "is greedy", f"{ROLLOUT}.val_kwargs.top_p", 0.7),
        (f"{ROLLOUT}.val_kwargs.top_k=20", "is greedy", f"{ROLLOUT}.val_kwargs.top_k", 20),
        (f"{ACTOR}.optim.min_lr=1e-7", "lr_decay_style=constant", f"{ACTOR}.optim.min_lr", 1e-7),
        (f"{ACTOR}.optim.lr_decay_steps=9", "lr_decay_style=constant", f"{ACTOR}.optim.lr_decay_steps", 9),
        (f"{ROLLOUT}.val_kwargs.temperature=0", None, f"{ROLLOUT}.val_kwargs.temperature", 0.0),
        ("trainer.logger=console", None, "trainer.logger", ["console"]),
    ],
)
def test_mapped_settings(override, words, key, value):
    config, notes = load_and_check(override, f"{MEGATRON}.tensor_model_parallel_size=1")
    assert value_of(config, key) == value
    assert words is None or any(words in note for note in notes), notes


def test_thresholds_are_kept_as_they_are_written():
    """YAML reads 0.5_5 as the number 0.55."""
    threshold = f"{CORRECTION}.rollout_is_threshold"
    for written in ("0.5_5", "0.5_5.0", "2.0", "3"):
        config, _ = load_and_check(f"{threshold}={written}", f"{MEGATRON}.tensor_model_parallel_size=1")
        assert value_of(config, threshold) == written


def test_a_warmup_has_one_length():
    share, steps = f"{ACTOR}.optim.lr_warmup_steps_ratio=0.1", f"{ACTOR}.optim.lr_warmup_steps"
    assert any("lr_warmup_steps=5 goes before it" in note for note in check(share, f"{steps}=5"))
    assert check(share, f"{steps}=-1", f"{ACTOR}.optim.lr_decay_steps=40") == check()  # the share of 40 steps


def test_no_validation_data_is_remarked():
    notes = check("data.val_files=null", "trainer.test_freq=-1")
    assert any("no validation" in note for note in notes)


def test_alias_and_its_key_must_agree():
    with pytest.raises(ConfigError, match="stands for"):
        load_config("demo", [f"{ACTOR}.fsdp_config.param_offload=True", f"{MEGATRON}.param_offload=False"])


def test_offload_on_cuda_is_allowed_without_remark():
    assert check(f"{MEGATRON}.optimizer_offload=True", preset="qwen2_5_7b", model=MODELS["qwen2_5_7b"]) == []


# The critic ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [f"{ROLLOUT}.n=1"],
        ["algorithm.gamma=0.99", "algorithm.lam=0.95"],
        ["algorithm.use_kl_in_reward=True", "algorithm.kl_penalty=full"],
        ["critic.model.path=critic", "critic.optim.lr=2e-5", "critic.ppo_mini_batch_size=16", "critic.ppo_epochs=2"],
        ["critic.megatron.tensor_model_parallel_size=2", "critic.megatron.pipeline_model_parallel_size=1"],
        ["trainer.critic_warmup=4", "trainer.total_training_steps=5"],
    ],
)
def test_ppo_is_valid(overrides):
    assert check(GAE, *overrides) == []
    assert has_critic(quick_config("demo", [GAE])) and not has_critic(preset_config("demo"))


def test_the_critic_is_trained_as_the_actor_is_but_for_its_own_settings():
    base = [f"{ACTOR}.ppo_mini_batch_size=32", f"{ACTOR}.ppo_epochs=3", f"{ACTOR}.loss_agg_mode=seq-mean-token-sum"]
    base += [f"{ACTOR}.ppo_max_token_len_per_gpu=4096", f"{MEGATRON}.optimizer_offload=True"]

    def critic(*overrides: str) -> Actor:
        return critic_as_actor(quick_config("demo", [*base, *overrides]))

    same = critic()
    assert (same.optim.lr, same.optim.weight_decay, same.loss_agg_mode) == (1e-5, 0.01, "token-mean")
    assert (same.ppo_mini_batch_size, same.ppo_epochs, same.ppo_max_token_len_per_gpu) == (32, 3, 4096)
    assert same.megatron == quick_config("demo", base).actor_rollout_ref.actor.megatron
    own = [f"critic.{one}" for one in ("optim.lr=3e-5", "ppo_mini_batch_size=16", "ppo_epochs=1")]
    own += [f"critic.{one}" for one in ("ppo_max_token_len_per_gpu=8192", "ppo_micro_batch_size_per_gpu=2")]
    other = critic(*own, "critic.megatron.optimizer_offload=False", "critic.megatron.param_offload=True")
    assert (other.optim.lr, other.ppo_mini_batch_size, other.ppo_epochs) == (3e-5, 16, 1)
    assert (other.ppo_max_token_len_per_gpu, other.ppo_micro_batch_size_per_gpu) == (8192, 2)
    assert (other.megatron.optimizer_offload, other.megatron.param_offload) == (False, True)
    assert other.megatron.tensor_model_parallel_size == 2


def test_no_row_is_skipped_beside_a_critic():
    assert skips_zero_advantage(preset_config("demo")) and not skips_zero_advantage(quick_config("demo", [GAE]))


@pytest.mark.parametrize(
    ("overrides", "remark"),
    [
        (["algorithm.lam=0.95"], "algorithm.lam=0.95 has no effect: algorithm.adv_estimator=remax has no critic"),
        (
            ["algorithm.adv_estimator=rloo", "trainer.critic_warmup=2", "critic.optim.lr=1e-6"],
            "trainer.critic_warmup=2, critic.optim.lr=1e-06 have no effect: algorithm.adv_estimator=rloo has no critic",
        ),
        (
            [GAE, "critic.megatron.param_offload=True", "critic.megatron.grad_offload=True"],
            "critic.megatron.{param_offload,grad_offload}=True has no effect: the run is on the CPU",
        ),
        (
            [GAE, "critic.ppo_micro_batch_size_per_gpu=4"],
            "critic.ppo_micro_batch_size_per_gpu=4 has no effect: use_dynamic_bsz=True packs by tokens",
        ),
        ([GAE, "critic.optim.min_lr=1e-7"], "critic.optim.min_lr=1e-07 has no effect: lr_decay_style=constant"),
    ],
)
def test_settings_of_the_critic_that_have_no_effect(overrides, remark):
    assert check(*overrides) == [remark]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "has no effect: the canary"),
        ([GAE], "acts on the critic alone: the canary"),
        ([GAE, "critic.megatron.param_offload=False"], "has no effect: the canary"),
    ],
)
def test_weights_that_are_offloaded_on_a_gpu(overrides, words):
    notes = check(f"{MEGATRON}.param_offload=True", *overrides, preset="qwen2_5_7b", model=MODELS["qwen2_5_7b"])
    assert len(notes) == 1 and notes[0].startswith(f"{MEGATRON}.param_offload=True {words}")
    alone = [GAE, "critic.megatron.param_offload=True"]
    assert check(*alone, preset="qwen2_5_7b", model=MODELS["qwen2_5_7b"]) == []


# Rules ---------------------------------------------------------------------------------------------------------------

SPLIT = "trainer.placement=split"
BROKEN = {
    "ranks of an engine that has none of its own": (
        [f"{ROLLOUT}.num_ranks=1"],
        ["num_ranks=1", "trainer.placement=split", "num_ranks=null"],
    ),
    "ahead where engine and policy take turns": ([f"{ROLLOUT}.ahead=1"], ["ahead=1", "placement=split", "ahead=0"]),
    "a split that leaves nothing": ([SPLIT, f"{ROLLOUT}.num_ranks=2"], ["num_ranks=2", "2 were started", "1 to 1"]),
    "a split of one rank": (
        [SPLIT, "trainer.n_gpus_per_node=1", f"{MEGATRON}.tensor_model_parallel_size=1"],
        ["num_ranks=null", "1 were started", "placement=colocated"],
    ),
    "room for an engine that is elsewhere": (
        [SPLIT, f"{MEGATRON}.tensor_model_parallel_size=1", f"{MEGATRON}.grad_offload=True"],
        ["grad_offload=True", "set actor_rollout_ref.actor.megatron.grad_offload=False"],
    ),
    "a policy too wide for its side": ([SPLIT], ["tensor_model_parallel_size=2", "the 1 ranks of the policy"]),
    "an engine too wide for its side": (
        [SPLIT, f"{MEGATRON}.tensor_model_parallel_size=1", f"{ROLLOUT}.tensor_model_parallel_size=2"],
        ["tensor_model_parallel_size=2", "the 1 ranks of the engine", "set it to 1"],
    ),
    "answers of other weights, not corrected": (
        [SPLIT, f"{MEGATRON}.tensor_model_parallel_size=1", f"{ROLLOUT}.ahead=1"],
        ["ahead=1", "rollout_is=token", "bypass_old_logprobs=True"],
    ),
    "ahead is a step or none": ([f"{ROLLOUT}.ahead=2"], ["ahead=2", "0, 1"]),
    "choice": (["data.truncation=middle"], ["data.truncation=middle", "error, left, right"]),
    "device": (["trainer.device=tpu"], ["trainer.device=tpu", "auto, cuda, cpu"]),
    "resume": (["trainer.resume_mode=always"], ["resume_mode=always", "auto, disable, path"]),
    "resume path": (["trainer.resume_mode=path"], ["path needs trainer.resume_from_path", "resume_mode=auto"]),
    "estimator": (["algorithm.adv_estimator=ppo"], ["adv_estimator=ppo", "remax, rloo, grpo, reinforce, gae"]),
    "fsdp": ([f"{ACTOR}.strategy=fsdp"], ["strategy=fsdp", "set it to megatron", "fsdp_config"]),
    "loss mode": ([f"{ACTOR}.loss_agg_mode=batch-mean"], ["loss_agg_mode=batch-mean", "token-mean"]),
    "engine": ([f"{ROLLOUT}.name=sglang"], ["rollout.name=sglang", "vllm"]),
    "dtype": ([f"{MEGATRON}.dtype=float16"], ["dtype=float16", "bfloat16, float32"]),
    "rollout dtype": ([f"{ROLLOUT}.dtype=half"], ["dtype=half", "null, bfloat16, float32"]),
    "positive": (["data.train_batch_size=0"], ["train_batch_size=0", "greater than 0"]),
    "epochs": (["trainer.total_epochs=0"], ["total_epochs=0", "greater than 0"]),
    "samples": ([f"{ROLLOUT}.n=0"], ["rollout.n=0", "greater than 0"]),
    "finite": ([f"{ACTOR}.optim.lr=nan"], ["optim.lr=nan", "greater than 0"]),
    "entropy": ([f"{ACTOR}.entropy_coeff=-0.1"], ["entropy_coeff=-0.1", "0 or greater"]),
    "test_freq": (["trainer.test_freq=-2"], ["test_freq=-2", "-1 for none"]),
    "profiled steps": (["trainer.profile_steps=[3,0]"], ["trainer.profile_steps=[3, 0]", "[3,4]"]),
    "val samples": (["data.val_max_samples=0"], ["val_max_samples=0", "-1"]),
    "beta": ([f"{ACTOR}.optim.beta2=1.0"], ["beta2=1.0", "below 1"]),
    "clip": ([f"{ACTOR}.clip_ratio=1.5"], ["clip_ratio=1.5", "below 1"]),
    "dual clip": ([f"{ACTOR}.clip_ratio_c=1.0"], ["clip_ratio_c=1.0", "above 1"]),
    "memory share": ([f"{ROLLOUT}.gpu_memory_utilization=60"], ["gpu_memory_utilization=60", "at most 1"]),
    "temperature": ([f"{ROLLOUT}.temperature=0"], ["rollout.temperature=0", "0.01 to 2.0"]),
    "temperature that vLLM would raise": ([f"{ROLLOUT}.temperature=0.001"], ["rollout.temperature=0.001", "0.01 to"]),
    "temperature that vLLM refuses": ([f"{ROLLOUT}.temperature=2.5"], ["rollout.temperature=2.5", "0.01 to 2.0"]),
    "hot validation": ([f"{ROLLOUT}.val_kwargs.temperature=2.5"], ["val_kwargs.temperature=2.5", "0.01 to 2.0"]),
    "cold validation": ([f"{ROLLOUT}.val_kwargs.temperature=0.001"], ["val_kwargs.temperature=0.001", "0.01 to 2.0"]),
    "top_p": ([f"{ROLLOUT}.top_p=0.9"], ["top_p=0.9", "renormalised", "top_p=1.0"]),
    "top_k": ([f"{ROLLOUT}.top_k=50"], ["top_k=50", "renormalised", "top_k=-1"]),
    "greedy validation": (
        [f"{ROLLOUT}.val_kwargs.n=4"],
        ["val_kwargs.n=4 with do_sample=False", "val_kwargs.do_sample=True, or n=1"],
    ),
    "validation answers": ([f"{ROLLOUT}.val_kwargs.n=0"], ["val_kwargs.n=0", "greater than 0"]),
    "validation temperature": (
        [f"{ROLLOUT}.val_kwargs.do_sample=True", f"{ROLLOUT}.val_kwargs.temperature=0"],
        ["val_kwargs.temperature=0", "0.01 to 2.0", "do_sample=False"],
    ),
    "validation top_p": ([f"{ROLLOUT}.val_kwargs.top_p=0"], ["val_kwargs.top_p=0", "greater than 0 and at most 1"]),
    "validation top_p above 1": ([f"{ROLLOUT}.val_kwargs.top_p=1.1"], ["val_kwargs.top_p=1.1", "at most 1"]),
    "validation top_k": ([f"{ROLLOUT}.val_kwargs.top_k=-2"], ["val_kwargs.top_k=-2", "-1 or 0 for no limit"]),
    "validation alone": (
        ["trainer.val_only=True", "data.val_files=null", "trainer.test_freq=-1"],
        ["val_only=True", "data.val_files is not set"],
    ),
    "decay style": ([f"{ACTOR}.optim.lr_decay_style=WSD"], ["lr_decay_style=WSD", "constant, linear, cosine"]),
    "warmup": ([f"{ACTOR}.optim.lr_warmup_steps=-2"], ["lr_warmup_steps=-2", "-1 for none"]),
    "warmup share": ([f"{ACTOR}.optim.lr_warmup_steps_ratio=1"], ["lr_warmup_steps_ratio=1", "below 1"]),
    "rate that rises": (
        [f"{ACTOR}.optim.lr_decay_style=linear", f"{ACTOR}.optim.lr=1e-6", f"{ACTOR}.optim.min_lr=1e-5"],
        ["min_lr=1e-05 is above", "lr=1e-06", "min_lr to at most 1e-06"],
    ),
    "decay within the warmup": (
        [f"{ACTOR}.optim.lr_decay_style=cosine", f"{ACTOR}.optim.lr_decay_steps=5", f"{ACTOR}.optim.lr_warmup_steps=5"],
        ["lr_decay_steps=5 counts the warmup", "lr_warmup_steps=5", "or to null"],
    ),
    "gamma": (
        ["algorithm.gamma=0.99"],
        ["gamma=0.99 with algorithm.adv_estimator=remax", "algorithm.gamma=1.0, or algorithm.adv_estimator=gae"],
    ),
    "gamma of nothing": ([GAE, "algorithm.gamma=0"], ["algorithm.gamma=0", "greater than 0 and at most 1"]),
    "lambda": ([GAE, "algorithm.lam=1.1"], ["algorithm.lam=1.1 is out of range", "between 0 and 1"]),
    "value clip": ([GAE, "critic.cliprange_value=0"], ["critic.cliprange_value=0", "greater than 0"]),
    "critic's loss mode": ([GAE, "critic.loss_agg_mode=mean"], ["critic.loss_agg_mode=mean", "token-mean"]),
    "critic's tp": (
        [GAE, "critic.megatron.tensor_model_parallel_size=1"],
        [
            f"critic.megatron.tensor_model_parallel_size=1 is not {MEGATRON}.tensor_model_parallel_size=2: the critic",
            "set critic.megatron.tensor_model_parallel_size=null",
        ],
    ),
    "critic's vpp": (
        [GAE, "critic.megatron.virtual_pipeline_model_parallel_size=2"],
        [f"size=2 is not {MEGATRON}.virtual_pipeline_model_parallel_size=null", "parallel_size=null"],
    ),
    "critic's mini-batch": (
        [GAE, "critic.ppo_mini_batch_size=48"],
        ["critic.ppo_mini_batch_size=48 does not divide data.train_batch_size=64", "set critic.ppo_mini_batch_size=64"],
    ),
    "critic's budget": (
        [GAE, "critic.ppo_max_token_len_per_gpu=60"],
        ["critic.ppo_max_token_len_per_gpu=60 is below", "set critic.ppo_max_token_len_per_gpu to at least 80"],
    ),
    "critic's budget tp": (
        [GAE, "critic.ppo_max_token_len_per_gpu=4095", "critic.megatron.sequence_parallel=True"],
        ["critic.ppo_max_token_len_per_gpu=4095 is not a multiple", "tensor_model_parallel_size=2", "4096"],
    ),
    "critic's rate that rises": (
        [GAE, "critic.optim.lr_decay_style=linear", "critic.optim.min_lr=1e-4"],
        ["critic.optim.min_lr=0.0001 is above critic.optim.lr=1e-05", "min_lr to at most 1e-05"],
    ),
    "critic's warmup to the end": (
        [GAE, "trainer.critic_warmup=5", "trainer.total_training_steps=5"],
        ["critic_warmup=5 leaves the policy none of the trainer.total_training_steps=5", "at most 4"],
    ),
    "gae with another sum of the kl": (
        [GAE, "algorithm.use_kl_in_reward=True", "algorithm.kl_reward_mode=one_step"],
        ["kl_reward_mode=one_step with algorithm.adv_estimator=gae", "gamma and lam", "kl_reward_mode=to_go"],
    ),
    "skip with a critic": (
        [GAE, f"{ACTOR}.skip_zero_advantage=True"],
        ["skip_zero_advantage=True with algorithm.adv_estimator=gae", "every row", "skip_zero_advantage=null"],
    ),
    "refill with a critic": (
        [GAE, "algorithm.refill=True"],
        ["refill=True with algorithm.adv_estimator=gae", "refill=False", "remax, rloo or grpo"],
    ),
    "one answer": (["algorithm.adv_estimator=rloo", f"{ROLLOUT}.n=1"], ["rollout.n=1", "rloo", "at least 2"]),
    "skip kl": (
        [f"{ACTOR}.skip_zero_advantage=True", f"{ACTOR}.use_kl_loss=True"],
        ["would change the gradient", "use_kl_loss=True", "skip_zero_advantage=null"],
    ),
    "skip entropy": (
        [f"{ACTOR}.skip_zero_advantage=True", f"{ACTOR}.entropy_coeff=0.01"],
        ["entropy_coeff=0.01", "skip_zero_advantage=null"],
    ),
    "refill an estimator": (
        ["algorithm.refill=True", "algorithm.adv_estimator=reinforce"],
        ["refill=True with algorithm.adv_estimator=reinforce", "remax, rloo or grpo"],
    ),
    "refill with kl": (
        ["algorithm.refill=True", f"{ACTOR}.use_kl_loss=True"],
        ["use_kl_loss=True; set", "use_kl_loss=False", "refill=False"],
    ),
    "refill mini-batches": (
        ["algorithm.refill=True", f"{ACTOR}.ppo_mini_batch_size=32"],
        ["ppo_mini_batch_size=32", "train_batch_size=64", "ppo_mini_batch_size=null"],
    ),
    "refill in order": (["algorithm.refill=True", "data.shuffle=False"], ["data.shuffle=False; set data.shuffle"]),
    "refill one": (
        ["algorithm.refill=True", "data.train_batch_size=1", f"{ACTOR}.ppo_mini_batch_size=null"],
        ["data.train_batch_size=1; set data.train_batch_size to 2 or more"],
    ),
    "refill limit": (
        ["algorithm.refill=True", "algorithm.refill_limit=63"],
        ["refill_limit=63 is below data.train_batch_size=64", "at least 64"],
    ),
    "bypass and weights": (
        [f"{CORRECTION}.bypass_old_logprobs=True", f"{CORRECTION}.rollout_is=token"],
        ["already the importance weight", "rollout_is=null"],
    ),
    "bypass and rejection": (
        [f"{CORRECTION}.bypass_old_logprobs=True", *REJECTS],
        ["rollout_rs=geometric no log-probabilities", "rollout_rs=null"],
    ),
    "weights without threshold": (
        [f"{CORRECTION}.rollout_is=token", f"{CORRECTION}.rollout_is_threshold=x"],
        ["rollout_is_threshold=x is no threshold", "0.5_5.0"],
    ),
    "threshold upside down": (
        [f"{CORRECTION}.rollout_is_threshold=5.0_0.5"],
        ["rollout_is_threshold=5.0_0.5 is no threshold", "LOWER_UPPER"],
    ),
    "rejection without threshold": (
        [REJECTS[0]],
        ["rollout_rs=geometric with", "rollout_rs_threshold=null", "0.99_1.01", "at least 1"],
    ),
    "rejection of all": (
        [REJECTS[0], f"{CORRECTION}.rollout_rs_threshold=0.5"],
        ["rollout_rs_threshold=0.5, which is no threshold", "at least 1"],
    ),
    "rejection by tokens": ([f"{CORRECTION}.rollout_rs=token_k1"], ["rollout_rs=token_k1", "geometric, seq_mean_k1"]),
    "bypass without ratio": (
        [f"{CORRECTION}.bypass_old_logprobs=True", f"{ACTOR}.policy_loss=reinforce"],
        ["needs a loss with a ratio", "policy_loss=ppo_clip"],
    ),
    "adaptive kl": (
        ["algorithm.use_kl_in_reward=True", "algorithm.kl_ctrl.type=adaptive", "algorithm.kl_ctrl.horizon=50"],
        ["horizon=50", "batches of 256 answers", "above 51.2"],
    ),
    "adaptive from 0": (
        ["algorithm.use_kl_in_reward=True", "algorithm.kl_ctrl.type=adaptive", "algorithm.kl_ctrl.kl_coef=0"],
        ["kl_coef=0 stays 0", "above 0"],
    ),
    "share by varlen": (
        [f"{ACTOR}.share_prompts=True", f"{MEGATRON}.attention_backend=varlen"],
        ["share_prompts=True", "attention_backend=varlen", "attention_backend=auto"],
    ),
    "failure share": (["reward.max_failure_share=1.5"], ["max_failure_share=1.5", "between 0 and 1"]),
    "share by rows": (
        [f"{ACTOR}.share_prompts=True", f"{ACTOR}.use_dynamic_bsz=False", f"{ACTOR}.ppo_micro_batch_size_per_gpu=4"],
        ["share_prompts=True", "use_dynamic_bsz=True"],
    ),
    "save": (["trainer.save_freq=-3"], ["save_freq=-3", "-1 for none"]),
    "padding": (["actor_rollout_ref.model.use_remove_padding=False"], ["always packed", "use_remove_padding=True"]),
    "remote code": (["actor_rollout_ref.model.trust_remote_code=True"], ["never executed", "trust_remote_code=False"]),
    "cp": ([f"{MEGATRON}.context_parallel_size=2"], ["context parallelism is not offered", "context_parallel_size=1"]),
    "replicas": ([f"{MEGATRON}.pipeline_model_parallel_size=2"], ["=2 x pipeline_model_parallel_size=2", "2 ranks"]),
    "rollout ranks": ([f"{ROLLOUT}.tensor_model_parallel_size=4"], ["=4", "2 ranks", "one of 1, 2"]),
    "vpp": ([f"{MEGATRON}.virtual_pipeline_model_parallel_size=2"], ["=2 needs pipeline_model_parallel_size", "=null"]),
    "mini divides": ([f"{ACTOR}.ppo_mini_batch_size=48"], ["ppo_mini_batch_size=48", "train_batch_size=64", "divisor"]),
    "mini larger": ([f"{ACTOR}.ppo_mini_batch_size=128"], ["ppo_mini_batch_size=128", "larger", "train_batch_size=64"]),
    "fixed size": ([f"{ACTOR}.use_dynamic_bsz=False"], ["use_dynamic_bsz=False needs", "ppo_micro_batch_size_per_gpu"]),
    "budget": ([f"{ACTOR}.ppo_max_token_len_per_gpu=60"], ["=60", "=48", "=32", "at least 80"]),
    "budget tp": (
        [f"{ACTOR}.ppo_max_token_len_per_gpu=4095", f"{MEGATRON}.sequence_parallel=True"],
        ["=4095", "multiple", "tensor_model_parallel_size=2", "4096"],
    ),
    "engine step on a CPU": (
        [f"{ROLLOUT}.max_num_batched_tokens=70", f"{ROLLOUT}.max_num_seqs=8"],
        ["max_num_batched_tokens=70", "80"],
    ),
    "engine step": (
        [f"{ROLLOUT}.max_num_batched_tokens=64", f"{ROLLOUT}.max_num_seqs=128"],
        ["max_num_batched_tokens=64", "max_num_seqs=128", "at least 128"],
    ),
    "logger": (["trainer.logger=[console,mlflow]"], ["'mlflow'", "console, wandb, tensorboard"]),
    "no val files": (["data.val_files=null"], ["test_freq=5", "data.val_files is not set"]),
    "folder": (["trainer.default_local_dir="], ["default_local_dir is empty"]),
    "recompute method": (
        [f"{RECOMPUTE}.recompute_granularity=selective", f"{RECOMPUTE}.recompute_method=block"],
        ["recompute_method=block", "is selective here", "recompute_granularity=full"],
    ),
    "recompute layers": (
        [f"{RECOMPUTE}.recompute_num_layers=2"],
        ["recompute_num_layers=2", "is none here", "recompute_granularity=full"],
    ),
    "recompute modules": (
        [f"{RECOMPUTE}.recompute_granularity=selective", f"{RECOMPUTE}.recompute_modules=[moe]"],
        ["recompute_modules=['moe']", "mlp, core_attn, layernorm", "recompute_modules=[mlp]"],
    ),
    "gather without optimizer": (
        [f"{MEGATRON}.overlap_param_gather=True", f"{MEGATRON}.use_distributed_optimizer=False"],
        ["overlap_param_gather=True", "use_distributed_optimizer=True"],
    ),
    "gather without reduce": (
        [f"{MEGATRON}.overlap_param_gather=True", f"{MEGATRON}.overlap_grad_reduce=False"],
        ["overlap_param_gather=True", "overlap_grad_reduce=True"],
    ),
    "backend": ([f"{MEGATRON}.attention_backend=varlen"], ["attention_backend=varlen", "trainer.device=cpu", "auto"]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], Recompute()),
        (["actor_rollout_ref.model.enable_gradient_checkpointing=True"], Recompute("full")),
        (
            ["actor_rollout_ref.model.enable_gradient_checkpointing=True", f"{RECOMPUTE}.recompute_granularity=none"],
            Recompute("none"),
        ),
        ([f"{RECOMPUTE}.recompute_granularity=selective"], Recompute("selective", modules=("mlp",))),
        (
            [f"{RECOMPUTE}.recompute_{x}" for x in ("granularity=full", "method=block", "num_layers=2")],
            Recompute("full", "block", 2),
        ),
    ],
)
def test_what_is_recomputed(overrides, expected):
    config, _ = load_and_check(*overrides, model=DEMO)
    assert recompute_of(config) == expected


@pytest.mark.parametrize("case", BROKEN)
def test_broken_rule_says_setting_values_and_mend(case):
    overrides, words = BROKEN[case]
    with pytest.raises(ConfigError) as caught:
        check(*overrides)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_rule_about_settings_is_broken_by_some_case():
    """No rule without a test: each case is refused by exactly one rule first, and all rules occur."""
    seen = set()
    for overrides, _ in BROKEN.values():
        config = quick_config("demo", overrides)
        for rule in RULES:
            try:
                rule(Setup(config, config.trainer.nnodes * config.trainer.n_gpus_per_node))
            except ConfigError:
                seen.add(rule.__name__)
                break
    seen |= {"ranks_match_launcher", "segments_can_sleep"}  # have their own tests below
    assert {rule.__name__ for rule in RULES} == seen


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_expandable_segments_are_refused_on_gpus(monkeypatch, name):
    monkeypatch.setenv(name, "max_split_size_mb:64,expandable_segments:True")
    assert load_and_check(model=DEMO)  # the demo is on the CPU
    with pytest.raises(ConfigError, match=f"{name}=.*take expandable_segments out of {name}"):
        load_and_check(preset="qwen2_5_7b", model=MODELS["qwen2_5_7b"])


def test_ranks_match_launcher():
    with pytest.raises(ConfigError, match=r"is 2 ranks, but 1 were started; .*--nproc-per-node 2"):
        check(world_size=1)


@pytest.mark.parametrize(
    ("overrides", "model", "words"),
    [
        ([f"{MEGATRON}.pipeline_model_parallel_size=8"], "qwen2_5_7b", ["=8", "28 layers", "1, 2, 4, 7, 14, 28"]),
        (
            [f"{MEGATRON}.pipeline_model_parallel_size=4", f"{MEGATRON}.virtual_pipeline_model_parallel_size=2"],
            "qwen2_5_7b",
            ["=2 x pipeline_model_parallel_size=4", "28 layers", "one of 1, 7"],
        ),
        (
            [f"{MEGATRON}.tensor_model_parallel_size=8"],
            "qwen2_5_7b",
            ["=8", "28 attention heads", "one of 1, 2, 4"],
        ),
        (
            [
                f"{MEGATRON}.tensor_model_parallel_size=7",
                f"{MEGATRON}.sequence_parallel=False",
                "trainer.n_gpus_per_node=7",
            ],
            "qwen2_5_7b",
            ["=7", "4 KV heads"],
        ),
        ([f"{ROLLOUT}.tensor_model_parallel_size=8"], "qwen2_5_7b", ["rollout.tensor_model", "28 attention heads"]),
        (
            ["data.max_response_length=32768", f"{ACTOR}.ppo_max_token_len_per_gpu=40000"],
            "qwen2_5_7b",
            ["33280", "32768"],
        ),
    ],
)
def test_rules_about_the_model(overrides, model, words):
    overrides = [f"{MEGATRON}.tensor_model_parallel_size=1", f"{ROLLOUT}.tensor_model_parallel_size=1", *overrides]
    with pytest.raises(ConfigError) as caught:
        check(*overrides, preset=model, model=MODELS[model])
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_ffn_must_be_cut_evenly():
    model = ModelFacts(4, 128, 383, 4, 2, 32, 512, True, 512)
    with pytest.raises(ConfigError, match="=2 does not divide the model's ffn size 383; .* to 1$"):
        check(model=model)


def test_kv_heads_may_be_fewer_than_ranks():
    """3B has 2 KV heads: TP 8 copies each onto four ranks."""
    tp8 = [f"{MEGATRON}.tensor_model_parallel_size=8", f"{ROLLOUT}.tensor_model_parallel_size=8"]
    check(*tp8, preset="qwen2_5_3b", model=MODELS["qwen2_5_3b"])


def test_narrow_heads_are_refused_on_cpu_only():
    narrow = ModelFacts(4, 64, 128, 4, 2, 16, 512, True, 512)
    with pytest.raises(ConfigError, match="head_dim=16.*at least 32"):
        check(model=narrow)
    check("trainer.device=cuda", model=narrow)


@pytest.mark.parametrize("tp_pp_vpp", [(2, 1, None), (1, 2, None), (1, 1, None), (1, 2, 2)])
def test_demo_layouts_are_valid(tp_pp_vpp):
    tp, pp, vpp = tp_pp_vpp
    check(
        f"{MEGATRON}.tensor_model_parallel_size={tp}",
        f"{MEGATRON}.pipeline_model_parallel_size={pp}",
        f"{MEGATRON}.virtual_pipeline_model_parallel_size={'null' if vpp is None else vpp}",
    )


# Files ---------------------------------------------------------------------------------------------------------------


def test_files_exist_with_a_known_suffix(tmp_path):
    config = load_config("demo").config
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "a.csv").write_text("")
    (tmp_path / "reward.py").write_text("")

    def refused(words: str, **changes):
        changed = copy.deepcopy(config)
        changed.custom_reward_function.path = changes.get("reward")
        changed.custom_reward_function.name = changes.get("name", "compute_score")
        changed.data.train_files = changes.get("train", str(tmp_path / "a.jsonl"))
        changed.data.val_files = changes.get("val")
        if not words:
            return validate_files(changed)
        with pytest.raises(ConfigError, match=words):
            validate_files(changed)

    refused("", train=[str(tmp_path / "a.jsonl")], reward=str(tmp_path / "reward.py"))
    refused("no such file", train=[str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    refused("unknown suffix '.csv'.*parquet", train=str(tmp_path / "a.csv"))
    refused("data.val_files=.*no such file; .* with: python -m remax_megatron.demo.prepare", val="b.jsonl")
    refused("not set", train=None)
    refused("holds", train={"a": 1})
    refused("custom_reward_function.path", reward=str(tmp_path / "none.py"))
    refused("custom_reward_function.path", reward=str(tmp_path / "a.jsonl"))
    refused("custom_reward_function.name", name="not a name")


# The model's folder --------------------------------------------------------------------------------------------------

QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "num_hidden_layers": 4,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "use_sliding_window": False,
}


def test_facts_from_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN2))
    facts = ModelFacts.from_folder(tmp_path)
    assert facts == ModelFacts(4, 128, 384, 4, 2, 32, 512, True, 512, rms_norm_eps=1e-5, rope_theta=1e6)
    assert resolve_model_facts(str(tmp_path)) == facts


def test_facts_of_both_transformers_generations():
    new = {key: value for key, value in QWEN2.items() if key != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    assert ModelFacts.from_hf_config(new, "x").rope_theta == 5e5


QWEN3 = QWEN2 | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 64}


def test_facts_of_qwen3():
    """Heads are as wide as config.json says, 128 where it says nothing; hidden_size need not be a multiple of them."""
    facts = ModelFacts.from_hf_config(QWEN3 | {"hidden_size": 130, "attention_bias": False}, "x")
    assert (facts.model_type, facts.head_dim, facts.hidden_size, facts.num_attention_heads) == ("qwen3", 64, 130, 4)
    assert facts.family.qk_norm and not facts.family.qkv_bias
    assert ModelFacts.from_hf_config({k: v for k, v in QWEN3.items() if k != "head_dim"}, "x").head_dim == 128
    two = ModelFacts.from_hf_config(QWEN2, "x").family
    assert two.qkv_bias and not two.qk_norm


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attention_bias": True}, "attention_bias=true, which this trainer does not offer"),
        ({"head_dim": None}, "head_dim=None, expected a positive integer"),
        ({"head_dim": 33}, "head_dim=33, but the rotary embedding takes heads of an even width"),
        ({"use_sliding_window": True, "sliding_window": 4096}, "no row is longer than sliding_window=4096"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "not a Qwen2 or Qwen3 model.*Qwen3ForSequence"),
    ],
)
def test_other_qwen3_models_are_refused_by_name(change, words):
    with pytest.raises(ModelError, match=f"^DIR=x.*{words}"):
        ModelFacts.from_hf_config(QWEN3 | change, "x", "DIR")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
            "not a Qwen2 or.*llama.*Qwen2ForCausalLM",
        ),
        ({"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"]}, "mixture-of-experts"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "not a Qwen2 or Qwen3 model"),
        ({"model_type": None}, "not a Qwen2 or Qwen3 model"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised model.*gptq"),
        ({"use_sliding_window": True}, "use_sliding_window=true.*whole rows; set it to false if no row"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, r"rope scaling \(linear\)"),
        ({"model_type": "qwen3"}, "not a Qwen2 or Qwen3 model.*qwen3.*Qwen2ForCausalLM"),
        ({"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}, "mixture-of-experts"),
        ({"model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"]}, "vision-language"),
        ({"model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"]}, "vision-language"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3, which does not divide num_attention_heads=4"),
        ({"num_attention_heads": 128}, "head_dim=1, but the rotary embedding takes heads of an even width"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"num_hidden_layers": None}, "num_hidden_layers=None, expected a positive integer"),
        ({"hidden_size": 130}, "hidden_size=130, not a multiple of num_attention_heads=4"),
    ],
)
def test_other_models_are_refused_by_name(tmp_path, change, words):
    (tmp_path / "config.json").write_text(json.dumps(QWEN2 | change))
    with pytest.raises(ModelError, match=words):
        ModelFacts.from_folder(tmp_path)


def test_unusable_folders(tmp_path):
    with pytest.raises(ModelError, match="no config.json"):
        ModelFacts.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        ModelFacts.from_folder(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        resolve_model_facts(str(tmp_path / "missing"))


# The command line ----------------------------------------------------------------------------------------------------


def data_files(folder: Path) -> list[str]:
    """Files that exist, in the place of those of the demo preset."""
    (folder / "data.jsonl").write_text("")
    return [f"data.{name}_files={folder}/data.jsonl" for name in ("train", "val")]


def run(*argv: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "remax_megatron.config.cli", *argv],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_cfg_job_prints_the_resolved_settings(tmp_path):
    done = run("--config-name", "qwen2_5_14b", "--cfg", "job", "trainer.seed=5")
    assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / "config.yaml").write_text(done.stdout)
    config = load_config("config", config_dir=tmp_path).config
    assert config == load_config("qwen2_5_14b", ["trainer.seed=5"]).config
    assert "runs/remax_gsm8k/qwen2_5_14b" in done.stdout


def test_help_teaches():
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "torchrun --nproc-per-node" in done.stdout and "--cfg job" in done.stdout
    for name, description in list_presets().items():
        assert f"  {name}" in done.stdout and description in done.stdout
    for line in done.stdout.splitlines():  # each setting that the help shows exists
        if line.startswith(("  actor", "  data", "  trainer")):
            for word in line.split():
                assert "=" not in word or word.partition("=")[0] in SETTINGS, word


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["lr=1"], "did you mean actor_rollout_ref.actor.optim.lr or critic.optim.lr?"),
        (["trainer.seed=abc"], "an integer"),
        ([f"{ACTOR}.ppo_max_token_len_per_gpu=60"], "at least 80"),
        (["actor_rollout_ref.model.path=/nowhere/model"], "no such folder"),
        (["data.train_files=/nowhere/train.parquet"], "no such file"),
        (["--config-name", "nope"], "one of: demo, demo_qwen3, qwen2_5_3b"),
        (["--config-dir", "/nowhere"], "does not exist"),
        (["--cfg", "hydra"], "invalid choice"),
        (["--frobnicate"], "--frobnicate"),
        (["trainer.seed=${nowhere}"], "interpolation"),
    ],
)
def test_bad_input_is_one_error_line_and_exit_code_2(argv, words, tmp_path, capfd):
    with pytest.raises(SystemExit) as exit_:
        cli.main([*data_files(tmp_path), *argv])
    out, err = capfd.readouterr()
    assert (exit_.value.code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_offline_hub_id_is_one_error_line(tmp_path):
    data = data_files(tmp_path)
    done = run(*data, "actor_rollout_ref.model.path=some-org/some-model", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert (
        "error: actor_rollout_ref.model.path=some-org/some-model" in done.stderr
        and "could not be downloaded" in done.stderr
    )


def test_cached_hub_config_needs_no_network(tmp_path, monkeypatch):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(QWEN2))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, name: str(config))
    assert resolve_model_facts("some-org/some-model").num_layers == 4


def test_other_ranks_leave_the_first_one_the_word(monkeypatch, capfd):
    waits = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("time.sleep", waits.append)
    with pytest.raises(SystemExit):
        cli.main(["lr=1"])
    assert waits == [cli.OTHER_RANKS_WAIT_S] and capfd.readouterr().err.count("error:") == 1


def test_loading_and_checking_imports_no_torch(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN2))
    data = data_files(tmp_path)
    code = (
        "import sys; from remax_megatron.config import cli\n"
        f"assert cli.main(['actor_rollout_ref.model.path={tmp_path}', *{data}]) == 0\n"
        "heavy = {'torch', 'vllm', 'transformers', 'megatron'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "the settings are valid" in done.stdout


def test_presets_dir_is_the_repository_s():
    assert presets_dir() == ROOT / "conf"
