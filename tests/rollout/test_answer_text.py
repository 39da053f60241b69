"""The text of an answer that is scored: what becomes of special tokens."""

from __future__ import annotations

import logging

import pytest
from transformers import AddedToken

from remax_megatron.demo.warm_start import make_tokenizer
from remax_megatron.rollout.answer_text import AnswerText


def decoder(keep: bool) -> tuple[AnswerText, list[int], set[int]]:
    """One to whose tokenizer "####" is a special token; an answer, ended; and all special tokens."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("####", special=True)]})
    text = AnswerText(tokenizer, [tokenizer.eos_token_id], keep_special_tokens=keep)
    ids = [*tokenizer.encode("It is 5. #### 5"), tokenizer.eos_token_id]
    return text, ids, set(tokenizer.all_special_ids)


@pytest.mark.parametrize(("keep", "text"), [(False, "It is 5.  5"), (True, "It is 5. #### 5")])
def test_special_tokens_are_kept_on_request_but_for_the_end(keep: bool, text: str, caplog) -> None:
    decode, ids, _ = decoder(keep)
    with caplog.at_level(logging.WARNING, logger="remax_megatron"):
        assert [decode(ids), decode(ids)] == [text, text]
    warnings = [record.message for record in caplog.records]
    assert len(warnings) == (not keep)
    assert all("####" in warning and "reward.keep_special_tokens=True" in warning for warning in warnings)


def test_answers_without_special_tokens_are_no_news(caplog) -> None:
    decode, ids, special = decoder(False)
    plain = [i for i in ids if i not in special]
    with caplog.at_level(logging.WARNING, logger="remax_megatron"):
        assert decode([*plain, ids[-1]]) == decode(plain)
    assert not caplog.records
    assert decode([]) == ""
