"""What the estimators that compare the answers of one prompt with each other share."""

from __future__ import annotations

from collections.abc import Sequence

from remax_megatron.errors import UserError


def require_two(name: str, rewards: Sequence[Sequence[float]]) -> None:
    """UserError when a prompt has fewer than two answers, so that estimator `name` has nothing to compare."""
    for number, group in enumerate(rewards):
        if len(group) < 2:
            raise UserError(
                f"algorithm.adv_estimator={name} compares the answers of one prompt and needs at least 2, but prompt "
                f"{number} of the batch has {len(group)}: set actor_rollout_ref.rollout.n to 2 or more, or "
                "algorithm.adv_estimator to remax"
            )


def summed_differences(group: Sequence[float]) -> list[float]:
    """d_i = sum_j (r_i - r_j) = n (r_i - mean): exactly 0 where all rewards are equal, which r_i - mean is not (the
    mean of three times 0.1 is not 0.1 in floats); an advantage that is 0 by rounding only could not be left out.

    n^2 subtractions: about 10 ms for 1024 prompts of 16 answers.
    """
    return [sum([one - other for other in group]) for one in group]
