"""ReMax (arXiv 2310.10505, eq. 8): the reward of an answer minus that of the policy's own greedy answer.

    A_i = r_i - b,   b = reward of the greedy answer to the same prompt

Assumes that the greedy answer comes from the same weights as the samples. Then b depends on the prompt and on the
weights only, not on the sampled answers, and the gradient is unbiased for every n, also n = 1. No critic, no group
statistics, no normalisation.

Degenerate cases. n = 1: works. All rewards of a prompt equal: A is 0 only if the greedy answer's reward is the same
one. There is no division, so no standard deviation to vanish. With rewards of 0 and 1, A is -1, 0 or 1.
"""

from __future__ import annotations

from collections.abc import Sequence


def advantages(rewards: Sequence[Sequence[float]], greedy: Sequence[float] | None) -> list[list[float]]:
    """[prompts][n] advantages of rewards [prompts][n] with greedy [prompts].

    ValueError when the greedy rewards are missing or are not one per prompt.
    """
    if greedy is None:
        raise ValueError("remax needs the reward of each prompt's greedy answer, and got none")
    if len(greedy) != len(rewards):
        raise ValueError(f"remax needs one greedy reward per prompt: {len(rewards)} prompts, {len(greedy)} rewards")
    return [[reward - baseline for reward in group] for group, baseline in zip(rewards, greedy, strict=True)]
