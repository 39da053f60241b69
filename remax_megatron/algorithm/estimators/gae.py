"""PPO's estimator (arXiv 1707.06347, 1506.02438): an advantage for every token, from a critic's values.

What is here is the outcome that it starts from: the reward of the answer, A_i = r_i. The learner makes advantages of it
with the values of the critic, see algorithm/gae.py and docs/algorithm.md.

Assumes a critic, trained beside the policy: a second model of about its size, with its gradients and optimizer.
Degenerate cases. n = 1: works. A critic that knows nothing (all values 0) leaves REINFORCE, whitened.
"""

from __future__ import annotations

from collections.abc import Sequence


def advantages(rewards: Sequence[Sequence[float]], greedy: Sequence[float] | None = None) -> list[list[float]]:
    """[prompts][n] outcomes of rewards [prompts][n]; `greedy` is not used."""
    return [list(group) for group in rewards]
