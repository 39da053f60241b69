"""A run that learns nothing says so: while it lasts, in the metrics, and in its last line."""

from __future__ import annotations

import logging

import pytest

from remax_megatron.stalls import PATIENCE, Stalls
from remax_megatron.types import Completion, Prompt, Rollout


def answer(tokens: list[int], reward: float, finished: bool = True) -> Completion:
    return Completion(tokens, [-1.0] * len(tokens), finished, 0, reward=reward)


def batch(rewards=(1.0, 0.0), finished: bool = True, same: bool = False) -> list[Rollout]:
    """A prompt with a sample per reward, and a greedy answer of reward 0."""
    samples = [answer([7] if same else [7, i], reward, finished) for i, reward in enumerate(rewards)]
    return [Rollout(Prompt(0, (1,), "s", "1"), samples, answer([7], 0.0, finished))]


LEARNS = batch()
# What a step without learning is like -> the words that the warning and the last line have for it.
NOTHING = {
    "equal_rewards": (batch((0.0, 0.0)), 0, "every reward was equal"),
    "cut_answers": (batch(finished=False), 1, "every answer was cut; raise data.max_response_length"),
    "same_samples": (batch(same=True), 1, "the answers to a prompt were all the same"),
    "no_update": (LEARNS, 0, "no update was made"),
}


@pytest.mark.parametrize("kind", NOTHING)
def test_each_kind_is_counted_warned_of_once_and_named_in_the_last_line(kind: str, caplog) -> None:
    rollouts, num_updates, words = NOTHING[kind]
    stalls = Stalls()
    with caplog.at_level(logging.WARNING, logger="remax_megatron"):
        counts = [stalls.observe(rollouts, num_updates)[f"stall/{kind}"] for _ in range(PATIENCE + 2)]
    assert counts == list(range(1, PATIENCE + 3))
    said = [record.message for record in caplog.records if words in record.message]
    assert len(said) == 1 and said[0].startswith(f"In each of the last {PATIENCE} steps ")
    assert words in stalls.last_word()
    assert stalls.last_word().startswith("NOTHING WAS LEARNED") == (num_updates == 0)
    assert stalls.observe(LEARNS, 1)[f"stall/{kind}"] == 0 and words not in stalls.last_word()


def test_the_last_line_of_short_and_good_runs() -> None:
    assert Stalls().last_word() == "No step was taken: the policy is what it was."
    stalls = Stalls()
    assert set(stalls.observe(LEARNS, 2).values()) == {0}
    assert stalls.last_word() == "1 steps, 2 updates."
    stalls = Stalls()
    stalls.observe(batch((0.0, 0.0)), 0)
    assert stalls.last_word().startswith(
        "NOTHING WAS LEARNED in 1 steps, the policy is what it was: in the last 1 steps every reward was equal"
    )


def test_a_resumed_run_counts_on() -> None:
    whole, first, second = Stalls(), Stalls(), Stalls()
    steps = [(batch((0.0, 0.0)), 0)] * 5
    in_one_go = [whole.observe(*step) for step in steps]
    parts = [first.observe(*step) for step in steps[:2]]
    second.load_state_dict(first.state_dict())
    assert parts + [second.observe(*step) for step in steps[2:]] == in_one_go
    assert second.last_word() == whole.last_word()
