"""Answers that were written ahead come out of a checkpoint as they went in."""

from __future__ import annotations

import pytest

from remax_megatron.checkpoint.pending import PENDING, pending_files, read_pending
from remax_megatron.checkpoint.state import CheckpointError
from remax_megatron.rollout.batches import AnsweredBatch
from remax_megatron.types import Completion, Prompt, Rollout

PROMPTS = [Prompt(index, (1, 2, index), "source", "5") for index in range(4)]


def batch(greedy: bool) -> AnsweredBatch:
    def answer(seed: int) -> Completion:
        answer = Completion([seed, 7], [-0.1 * seed, -1e-17], seed % 2 == 0, 3, f"tëxt\n{seed}", reward=0.1 + seed)
        answer.scores, answer.notes, answer.masked = {"flexible": 1 / 3}, {"why": "so"}, seed == 2
        return answer

    rollouts = [Rollout(PROMPTS[i], [answer(i), answer(i + 1)], answer(i + 2) if greedy else None) for i in (3, 1)]
    return AnsweredBatch(rollouts, {"refill/answered_prompts": 2, "time/rollout_s": 1 / 7}, 1764440000.123456, 2.5)


@pytest.mark.parametrize("greedy", [True, False])
def test_equal_to_the_last_bit(greedy, tmp_path):
    for name, content in pending_files(batch(greedy)).items():
        (tmp_path / name).write_bytes(content)
    assert read_pending(tmp_path, PROMPTS) == batch(greedy)
    assert batch(greedy).weight_version == 3


def test_nothing_is_written_without_one_and_damage_is_named(tmp_path):
    assert pending_files(None) == {} and read_pending(tmp_path, PROMPTS) is None
    content = pending_files(batch(True))[PENDING]
    for damaged in (content[:-20], b"", b"[]\n", content.replace(b'"prompt": 3', b'"prompt": 9')):
        (tmp_path / PENDING).write_bytes(damaged)
        with pytest.raises(CheckpointError, match="pending.jsonl is damaged"):
            read_pending(tmp_path, PROMPTS)
