"""A run that learns nothing says so: while it lasts, in the metrics, and in its last line."""

from __future__ import annotations

import ast
import logging

import pytest

from remax_megatron.stalls import PATIENCE, Stalls
from remax_megatron.types import Completion, Prompt, Rollout
from tests import ROOT


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


# -- every way to end with exit code 0 and no update ---------------------------------------------------------------

MASKED = batch()
for masked in MASKED[0].samples:
    masked.masked = True
WAYS = {  # what every step was like
    "every advantage was 0": [(batch((0.0, 0.0)), 0)] * 4,
    "every sample tied with the greedy answer of its prompt": [
        (batch((0.0, 0.0)) + [Rollout(Prompt(1, (1,), "s", "1"), [answer([7], 1.0)], answer([8], 1.0))], 0)
    ]
    * 4,
    "every answer was left out": [(MASKED, 0)] * 4,
    "every update was skipped because it was not finite": [(LEARNS, 0)] * 2,
    "a stop before the third step": [(batch((0.0, 0.0)), 0)] * 2,
    "one step": [(LEARNS, 0)],
}


@pytest.mark.parametrize("steps", WAYS.values(), ids=WAYS.keys())
def test_a_run_without_an_update_says_so_in_its_last_line(steps: list) -> None:
    stalls = Stalls()
    for step in steps:
        stalls.observe(*step)
    assert stalls.last_word().startswith(f"NOTHING WAS LEARNED in {len(steps)} steps, the policy is what it was: ")
    assert "no update was made" in stalls.last_word()


def test_every_end_with_exit_code_0_has_a_last_line() -> None:
    """What `_lead` returns is printed before the process ends with 0 (`_serve`, on an engine's ranks, says nothing, for
    the first rank prints). A complete run and trainer.val_only, which take no
    step, say so in words of their own (test_resume.py, test_end_to_end.py)."""
    source = ast.parse((ROOT / "remax_megatron" / "run.py").read_text())
    functions = {node.name: node for node in source.body if isinstance(node, ast.FunctionDef)}
    ends = [ast.unparse(node.value) for node in ast.walk(functions["_lead"]) if isinstance(node, ast.Return)]
    assert sorted(end.partition("(")[0][:24] for end in ends) == [
        "_validate",
        "f'The run is complete: {",
        "trainer.learner.stalls.l",
    ]
    (validated,) = [node.value for node in ast.walk(functions["_validate"]) if isinstance(node, ast.Return)]
    assert "nothing is trained" in ast.unparse(validated)
    leaves = [node for node in ast.walk(source) if isinstance(node, ast.Call) and ast.unparse(node.func) == "_leave"]
    assert [ast.unparse(leave) for leave in leaves] == ["_leave(last_word)"]
