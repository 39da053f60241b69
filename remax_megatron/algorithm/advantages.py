"""From scored rollouts to the rows of an update, under any estimator of `algorithm.estimators`."""

from __future__ import annotations

from collections.abc import Sequence

from remax_megatron.algorithm.estimators import Estimator
from remax_megatron.types import Rollout, Row


def advantages(rollouts: Sequence[Rollout], estimator: Estimator) -> list[list[float]]:
    """[prompts][n]. ValueError when a baseline is missing or comes from other weights than its samples."""
    greedy = None
    if estimator.needs_greedy:
        greedy = [_baseline(rollout, estimator.name) for rollout in rollouts]
    return estimator.advantages([[sample.reward for sample in rollout.samples] for rollout in rollouts], greedy)


def training_rows(rollouts: Sequence[Rollout], estimator: Estimator) -> list[Row]:
    """One row per sample, prompts in order, the advantage on every response token (undiscounted reward to go)
    or 0 where the sample is masked."""
    return [
        Row(
            prompt_ids=rollout.prompt.token_ids,
            response_ids=sample.token_ids,
            advantages=[0.0 if sample.masked else advantage] * len(sample.token_ids),
            rollout_logprobs=sample.logprobs,
            masked=sample.masked,
        )
        for rollout, row in zip(rollouts, advantages(rollouts, estimator), strict=True)
        for sample, advantage in zip(rollout.samples, row, strict=True)
    ]


def are_informative(rollouts: Sequence[Rollout], estimator: Estimator) -> list[bool]:
    """Whether each prompt has a gradient: an answer with tokens that is not masked and whose advantage is not 0."""
    return [
        any(a and answer.token_ids and not answer.masked for a, answer in zip(row, rollout.samples, strict=True))
        for row, rollout in zip(advantages(rollouts, estimator), rollouts, strict=True)
    ]


def _baseline(rollout: Rollout, name: str) -> float:
    """The reward of the greedy answer, after checking that the samples' weights wrote it."""
    if rollout.greedy is None:
        raise ValueError(f"prompt {rollout.prompt.index}: {name} needs the greedy answer, which was not generated")
    for sample in rollout.samples:
        if sample.weight_version != rollout.greedy.weight_version:
            raise ValueError(
                f"prompt {rollout.prompt.index}: the baseline comes from weight version "
                f"{rollout.greedy.weight_version}, a sample from {sample.weight_version}"
            )
    return rollout.greedy.reward
