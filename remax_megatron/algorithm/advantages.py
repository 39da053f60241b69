"""ReMax's advantage (arXiv 2310.10505, eq. 8): the reward of a sample minus that of the policy's greedy answer.

No critic, no group statistics, no normalisation. The baseline does not depend on the sampled actions, so the
gradient stays unbiased; it must come from the same weights as the samples.
"""

from __future__ import annotations

from collections.abc import Sequence

from remax_megatron.types import Rollout, Row


def remax_advantages(rollouts: Sequence[Rollout]) -> list[list[float]]:
    """[prompts][n]: reward of each sample minus the reward of its prompt's greedy answer.

    ValueError when a sample and its baseline come from different weights.
    """
    advantages = []
    for rollout in rollouts:
        for sample in rollout.samples:
            if sample.weight_version != rollout.greedy.weight_version:
                raise ValueError(
                    f"prompt {rollout.prompt.index}: the baseline comes from weight version "
                    f"{rollout.greedy.weight_version}, a sample from {sample.weight_version}"
                )
        advantages.append([sample.reward - rollout.greedy.reward for sample in rollout.samples])
    return advantages


def training_rows(rollouts: Sequence[Rollout]) -> list[Row]:
    """One row per sample, prompts in order, the advantage on every response token (undiscounted reward to go)."""
    return [
        Row(
            prompt_ids=rollout.prompt.token_ids,
            response_ids=sample.token_ids,
            advantages=[advantage] * len(sample.token_ids),
            rollout_logprobs=sample.logprobs,
        )
        for rollout, row in zip(rollouts, remax_advantages(rollouts), strict=True)
        for sample, advantage in zip(rollout.samples, row, strict=True)
    ]
