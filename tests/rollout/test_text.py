"""The text of an answer that is scored: what becomes of special tokens."""

from __future__ import annotations

import logging

import pytest
from transformers import AddedToken

from remax_megatron.demo.warm_start import make_tokenizer
from remax_megatron.rollout.engine import Engine


def engine(keep: bool) -> tuple[Engine, list[int]]:
    """An engine with nothing but its tokenizer, to which "####" is a special token; and an answer, ended."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("####", special=True)]})
    bare = object.__new__(Engine)
    bare.set_up_texts(tokenizer, [tokenizer.eos_token_id], keep_special_tokens=keep)
    return bare, [*tokenizer.encode("It is 5. #### 5"), tokenizer.eos_token_id]


@pytest.mark.parametrize(("keep", "text"), [(False, "It is 5.  5"), (True, "It is 5. #### 5")])
def test_special_tokens_are_kept_on_request_but_for_the_end(keep: bool, text: str, caplog) -> None:
    bare, ids = engine(keep)
    with caplog.at_level(logging.WARNING, logger="remax_megatron"):
        assert [bare.text(ids), bare.text(ids)] == [text, text]
    warnings = [record.message for record in caplog.records]
    assert len(warnings) == (not keep)
    assert all("####" in warning and "reward.keep_special_tokens=True" in warning for warning in warnings)


def test_answers_without_special_tokens_are_no_news(caplog) -> None:
    bare, ids = engine(False)
    plain = [i for i in ids if i not in bare.tokenizer.all_special_ids]
    with caplog.at_level(logging.WARNING, logger="remax_megatron"):
        assert bare.text([*plain, ids[-1]]) == bare.text(plain)
    assert not caplog.records
    assert bare.text([]) == ""
