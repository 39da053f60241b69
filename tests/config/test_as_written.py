"""Settings that are texts keep what was typed, on the command line and in presets."""

from __future__ import annotations

import pytest

from remax_megatron.config.load import load_config, to_yaml
from remax_megatron.config.schema import SETTINGS, ConfigError

# What YAML or Hydra would read as a number, a truth value or a time of day.
TEXTS = [
    "2024_10_01",
    "007",
    "1e3",
    "true",
    "2024-10-01",
    "12:30",
    "yes",
    "off",
    "0x1F",
    "1_000.5",
    "1.10",
    "-5",
    "nan",
]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_stay_as_typed_on_the_command_line(text):
    config = load_config(
        "demo",
        [
            f"trainer.experiment_name={text}",
            f"data={{train_files: {text}, prompt_key: {text}}}",
            f"data.val_files=[{text},a.parquet]",
            f"+actor_rollout_ref.model.path={text}",
        ],
    ).config
    assert config.trainer.experiment_name == config.actor_rollout_ref.model.path == text
    assert (config.data.train_files, config.data.prompt_key) == (text, text)
    assert config.data.val_files == [text, "a.parquet"]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_stay_as_typed_in_presets(tmp_path, text):
    folder = tmp_path / "it's a folder"
    folder.mkdir()
    (folder / "mine.yaml").write_text(
        f"defaults: [demo, trainer: named, _self_]\ndata.train_files: {text}\ndata:\n  val_files: [{text}, a.parquet]\n"
        f"trainer:\n  <<: &names {{project_name: {text}}}\n  seed: 1_0\n"
    )
    (folder / "trainer").mkdir()
    (folder / "trainer" / "named.yaml").write_text(f"experiment_name: {text}\n")
    config = load_config("mine", config_dir=folder).config
    assert (config.trainer.experiment_name, config.trainer.project_name, config.trainer.seed) == (text, text, 10)
    assert (config.data.train_files, config.data.val_files) == (text, [text, "a.parquet"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config("config", config_dir=tmp_path).config == config


@pytest.mark.parametrize(
    ("text", "value"), [("'1e3'", "1e3"), ('"a=b c"', "a=b c"), ("null", None), ("'null'", "null")]
)
def test_quotes_and_null(tmp_path, text, value):
    (tmp_path / "mine.yaml").write_text(f"defaults: [demo, _self_]\ntrainer.rollout_data_dir: {text}\n")
    assert load_config("mine", config_dir=tmp_path).config.trainer.rollout_data_dir == value
    assert load_config("demo", [f"trainer.rollout_data_dir={text}"]).config.trainer.rollout_data_dir == value


def test_null_is_no_text_where_it_is_not_legal():
    with pytest.raises(ConfigError, match="trainer.experiment_name=None has a wrong type; set it to a text"):
        load_config("demo", ["trainer.experiment_name=null"])


def test_what_is_no_text_is_read_as_before(tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [demo, _self_]\ncustom_reward_function.reward_kwargs: {a: 1_0}\n")
    overrides = ["custom_reward_function.reward_kwargs.b=1e3", "trainer.seed=int(7)", "data.shuffle=no"]
    config = load_config("mine", [*overrides, "trainer.profile_steps=[1_0]"], tmp_path).config
    assert config.custom_reward_function.reward_kwargs == {"a": 10, "b": 1000.0}
    assert (config.trainer.seed, config.data.shuffle, config.trainer.profile_steps) == (7, False, [10])


def test_which_settings_are_texts():
    texts = {key for key, setting in SETTINGS.items() if setting.is_text}
    assert {"trainer.experiment_name", "trainer.resume_from_path", "data.train_files", "data.truncation"} <= texts
    assert not texts & {"trainer.seed", "trainer.logger", "trainer.profile_steps", "data.apply_chat_template_kwargs"}
