"""Tokenizers that cannot be used are refused by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from remax_megatron.config.schema import ConfigError
from remax_megatron.demo.warm_start import make_tokenizer
from remax_megatron.inputs import chat_template, read_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    return tmp_path


def test_a_whole_one_is_read(folder: Path) -> None:
    assert len(read_tokenizer(str(folder))) == len(make_tokenizer())


@pytest.mark.parametrize("missing", [["tokenizer.json"], ["tokenizer.json", "tokenizer_config.json"]], ids=len)
def test_one_without_a_vocabulary_is_refused(missing: list[str], folder: Path) -> None:
    for name in missing:
        (folder / name).unlink()
    with pytest.raises(ConfigError, match="the tokenizer (has no vocabulary|cannot be read).*tokenizer.json"):
        read_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", "[]"),
        ("tokenizer.json", '{"version": "1'),
        ("tokenizer.json", "version https://git-lfs"),
    ],
)
def test_damaged_files_are_named(name: str, content: str, folder: Path) -> None:
    (folder / name).write_text(content)
    with pytest.raises(ConfigError, match=r"the tokenizer cannot be read: .*look at tokenizer\.json"):
        read_tokenizer(str(folder))


def test_templates_as_text_and_as_file(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    assert chat_template(str(tmp_path / "chat.jinja")) == chat_template("{{ messages }}") == "{{ messages }}"
    with pytest.raises(ConfigError, match="custom_chat_template is empty"):
        chat_template(" ")
    with pytest.raises(ConfigError, match=r"custom_chat_template=nowhere\.jinja is neither a template"):
        chat_template("nowhere.jinja")
    shutil.rmtree(tmp_path)
