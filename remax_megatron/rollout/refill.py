"""Answers to a batch of prompts, and to further ones for those that teach nothing (algorithm/refill.py says which).

The batch of a step is the same as without refilling. The further prompts come from a stream of the step's own
(data.dataset.further), so that nothing has to be remembered between steps, and a resumed run draws the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from remax_megatron.algorithm.advantages import are_informative
from remax_megatron.algorithm.estimators import Estimator
from remax_megatron.algorithm.refill import next_round, num_used
from remax_megatron.types import Prompt, Rollout


@dataclass(frozen=True)
class Refilled:
    """The rollouts of a step that count, in the order of the draws, and how many prompts were answered for them."""

    rollouts: list[Rollout]
    num_answered: int


def refill(
    draws: Iterator[Prompt],
    answered: Callable[[Sequence[Prompt]], list[Rollout]],
    estimator: Estimator,
    *,
    wanted: int,
    limit: int,
) -> Refilled:
    """Answer `draws` in rounds until `wanted` prompts are informative or `limit` are drawn.

    `answered` is collective, and gives every rank the same rollouts; so every rank comes to the same decisions.
    """
    rollouts: list[Rollout] = []
    informative: list[bool] = []
    while size := next_round(informative, wanted, limit):
        new = answered(list(islice(draws, size)))
        rollouts += new
        informative += are_informative(new, estimator)
    return Refilled(rollouts[: num_used(informative, wanted, limit)], len(rollouts))
