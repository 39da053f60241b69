"""REINFORCE without a baseline (Williams 1992; for language models see arXiv 2402.14740).

    A_i = r_i

Assumes nothing; unbiased for every n. Its variance is the highest of all estimators here unless rewards are centred
on 0 by themselves: a reference to measure the others by.

Degenerate cases. n = 1: works. All rewards equal to c: A = c, a push of all sampled answers alike, which is 0 in
expectation but not in a batch. With rewards of 0 and 1 only correct answers are trained on.
"""

from __future__ import annotations

from collections.abc import Sequence


def advantages(rewards: Sequence[Sequence[float]], greedy: Sequence[float] | None = None) -> list[list[float]]:
    """[prompts][n] advantages of rewards [prompts][n]; `greedy` is not used."""
    return [list(group) for group in rewards]
