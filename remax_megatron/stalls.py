"""Whether a run learns anything: batches that teach nothing are counted, and said loudly with the likely cause.

Each of KINDS is counted over steps in a row (metrics `stall/KIND`), warned of once when it reaches PATIENCE, and named
in the run's last line.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from remax_megatron.types import Completion, Rollout

log = logging.getLogger(__name__)

PATIENCE = 3  # steps in a row
KINDS = {
    "equal_rewards": "every reward was equal; look at answers in trainer.rollout_data_dir: the reward may look for a "
    "format that the model does not write, or the ground truths may not be what it compares with",
    "cut_answers": "every answer was cut; raise data.max_response_length, or look at whether the model ends its "
    "answers with a token of generation_config.json's eos_token_id",
    "same_samples": "the answers to a prompt were all the same; raise actor_rollout_ref.rollout.temperature, or look "
    "at whether the model still varies its answers",
    "no_update": "no update was made, since every advantage was 0 or every update had to be skipped",
}


class Stalls:
    """Counts the steps and updates of a run, and the steps in a row that taught nothing."""

    def __init__(self) -> None:
        self.num_steps = self.num_updates = 0
        self.in_a_row = dict.fromkeys(KINDS, 0)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"num_steps": self.num_steps, "num_updates": self.num_updates, "in_a_row": dict(self.in_a_row)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.num_steps, self.num_updates = state["num_steps"], state["num_updates"]
        self.in_a_row |= state["in_a_row"]

    def observe(self, rollouts: Sequence[Rollout], num_updates: int) -> dict[str, float]:
        """Count a step with these rollouts, in which so many updates were made; returns the metrics.

        Warns of each kind once for every time that it lasts.
        """
        self.num_steps += 1
        self.num_updates += num_updates
        answers = [answer for rollout in rollouts for answer in rollout.completions]
        found = {
            "equal_rewards": len({answer.reward for answer in answers}) == 1,
            "cut_answers": not any(answer.finished for answer in answers),
            "same_samples": all(_are_the_same(rollout.completions) for rollout in rollouts),
            "no_update": num_updates == 0,
        }
        for kind, is_so in found.items():
            self.in_a_row[kind] = self.in_a_row[kind] + 1 if is_so else 0
            if self.in_a_row[kind] == PATIENCE:
                log.warning("In each of the last %d steps %s", PATIENCE, KINDS[kind])
        return {f"stall/{kind}": count for kind, count in self.in_a_row.items()}

    def last_word(self) -> str:
        """Say what the run came to: its steps and updates, and what it ended in."""
        if not self.num_steps:
            return "No step was taken: the policy is what it was."
        ended_in = [
            f"in the last {count} steps {KINDS[kind]}"
            for kind, count in self.in_a_row.items()
            if count >= min(PATIENCE, self.num_steps)
        ]
        causes = f": {'; '.join(ended_in)}" if ended_in else ""
        if not self.num_updates:
            return f"NOTHING WAS LEARNED in {self.num_steps} steps, the policy is what it was{causes}."
        return f"{self.num_steps} steps, {self.num_updates} updates{causes}."


def _are_the_same(answers: Sequence[Completion]) -> bool:
    """Whether there are several answers, and all of them the same tokens."""
    return len(answers) > 1 and len({tuple(answer.token_ids) for answer in answers}) == 1
