"""The text of an answer, which is what rewards read."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

log = logging.getLogger(__name__)


class AnswerText:
    """Decodes answers without special tokens or, on request, without the one that ends them alone.

    Warns once when a special token is lost that does not end an answer.
    """

    def __init__(self, tokenizer: Any, stop_token_ids: Sequence[int], *, keep_special_tokens: bool):
        self._tokenizer, self._stop, self._keeps = tokenizer, frozenset(stop_token_ids), keep_special_tokens
        special = frozenset(getattr(tokenizer, "all_special_ids", ())) - self._stop
        self._unsaid = frozenset() if keep_special_tokens else special  # whose loss has not been said yet

    def __call__(self, token_ids: Sequence[int]) -> str:
        """The text of the answer `token_ids`."""
        ids = list(token_ids)
        if ids and ids[-1] in self._stop:
            ids.pop()
        if lost := self._unsaid.intersection(ids):
            self._unsaid = frozenset()
            log.warning(
                "special tokens of answers, %s among them, are not in the text that is scored; a reward that looks for "
                "them needs reward.keep_special_tokens=True",
                ", ".join(self._tokenizer.convert_ids_to_tokens(sorted(lost))),
            )
        return str(self._tokenizer.decode(ids, skip_special_tokens=not self._keeps))
