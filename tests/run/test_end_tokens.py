"""The tokens that end an answer: from the tokenizer and generation_config.json, each checked against the vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from remax_megatron.config.schema import ConfigError
from remax_megatron.demo.model_config import MODEL_CONFIG
from remax_megatron.inputs import end_token_ids

VOCAB = MODEL_CONFIG["vocab_size"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(MODEL_CONFIG))
    return tmp_path


def ids(folder: Path, declared: object, own: int | None = 3) -> list[int]:
    """The end tokens where generation_config.json holds `declared` (bytes: literally) and the tokenizer says `own`."""
    text = declared if isinstance(declared, bytes) else json.dumps(declared).encode()
    (folder / "generation_config.json").write_bytes(text)
    return end_token_ids(str(folder), SimpleNamespace(eos_token_id=own))


def test_both_sources_are_joined(folder: Path) -> None:
    assert end_token_ids(str(folder), SimpleNamespace(eos_token_id=3)) == [3]
    assert ids(folder, {"eos_token_id": [7, 3, 0]}) == [0, 3, 7]
    assert ids(folder, {"eos_token_id": VOCAB - 1}) == [3, VOCAB - 1]
    assert ids(folder, {"temperature": 0.7}) == ids(folder, {"eos_token_id": None}) == [3]
    assert ids(folder, {"eos_token_id": [5]}, own=None) == [5]


@pytest.mark.parametrize("declared", ["1", ["1"], True, [True], 1.5, -1, [3, VOCAB], VOCAB, {"id": 1}])
def test_ids_that_the_model_does_not_have(declared: object, folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"model\.path=.*generation_config\.json says eos_token_id=.*from 0 to 546"
    ) as e:
        ids(folder, {"eos_token_id": declared})
    assert "\n" not in str(e.value) and repr(declared) in str(e.value)


@pytest.mark.parametrize("own", [VOCAB, -1])
def test_an_id_of_the_tokenizer_that_the_model_does_not_have(own: int, folder: Path) -> None:
    with pytest.raises(ConfigError, match=rf"the tokenizer says eos_token_id={own}, expected ids from 0 to 546"):
        ids(folder, {}, own=own)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[]", "holds a list, expected an object"),
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_a_broken_file_is_one_line(content: bytes, words: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=rf"model\.path=.*: generation_config\.json .*{words}") as e:
        ids(folder, content)
    assert "\n" not in str(e.value)


def test_no_end_at_all(folder: Path) -> None:
    with pytest.raises(ConfigError, match="neither generation_config.json nor the tokenizer names an end-of-sequence"):
        ids(folder, {}, own=None)
