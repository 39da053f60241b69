"""What the length of an answer does to its reward: answers that the limit cut, and a price for coming near to it."""

from __future__ import annotations

from dataclasses import dataclass

from remax_megatron.types import CUT_ANSWERS, Completion

SCORE, ZERO, MASK = CUT_ANSWERS


@dataclass(frozen=True)
class LengthRules:
    """How rewards of training answers depend on their lengths.

    cut_answers         of an answer that the limit cut: its text so far is scored; it is worth 0; or it is left out of
                        the update, by an advantage of 0
    limit               data.max_response_length, in tokens
    overlong_buffer     the last tokens before the limit, over which the price rises from 0; 0: there is none
    overlong_penalty    the price at the limit, in units of the reward
    """

    cut_answers: str
    limit: int
    overlong_buffer: int = 0
    overlong_penalty: float = 1.0

    def apply(self, answer: Completion) -> None:
        """Change the reward of a scored answer as its length says."""
        if not answer.finished:
            answer.masked = self.cut_answers == MASK
            if self.cut_answers == ZERO:
                answer.reward = 0.0
        answer.reward -= self.price(len(answer.token_ids))

    def price(self, num_tokens: int) -> float:
        """The soft overlong punishment (DAPO, arXiv 2503.14476, equation 13) of an answer of so many tokens.

        Example: LengthRules("score", 100, 20, 0.5).price(90) == 0.25
        """
        inside = num_tokens - (self.limit - self.overlong_buffer)
        if not self.overlong_buffer or inside <= 0:
            return 0.0
        return self.overlong_penalty * min(inside / self.overlong_buffer, 1.0)
