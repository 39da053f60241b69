"""Validation's numbers by hand, the text that votes, and the file of answers."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from itertools import combinations
from types import SimpleNamespace

import pytest

from remax_megatron.evaluation import (
    EXTRACTORS,
    extracted_answer,
    majority_reward,
    pass_at_k,
    validate,
    validation_metrics,
)
from remax_megatron.rewards.scoring import BUILT_IN
from remax_megatron.types import Completion, Prompt

# -- pass@k --------------------------------------------------------------------------------------------------------


def test_pass_at_k_counts_the_choices_of_k_answers() -> None:
    for n in range(1, 7):
        for right in range(n + 1):
            for k in range(1, n + 1):
                choices = list(combinations([True] * right + [False] * (n - right), k))
                assert pass_at_k(n, right, k) == sum(map(any, choices)) / len(choices)


def test_pass_at_k_is_exact_for_many_answers() -> None:
    assert pass_at_k(4, 1, 2) == 0.5
    assert pass_at_k(10**4, 1, 4096) == 0.4096  # one right: k / n
    assert pass_at_k(10**4, 1, 1) == 1e-4  # 1 - 0.9999 is 9.999999999998899e-05
    assert pass_at_k(10**4, 0, 4096) == 0.0 and pass_at_k(10**4, 10**4, 4096) == 1.0
    # The product form of the paper: 1 - prod (1 - k / i), i from n - c + 1 to n.
    product = 1 - math.prod(1 - 16 / i for i in range(200 - 7 + 1, 200 + 1))
    assert pass_at_k(200, 7, 16) == pytest.approx(product, rel=1e-12)


def test_pass_at_k_is_unbiased() -> None:
    """Over all outcomes of 5 answers, each right with probability 0.3: the mean is the chance of a hit in 2."""
    chance = [math.comb(5, c) * 0.3**c * 0.7 ** (5 - c) for c in range(6)]
    assert sum(p * pass_at_k(5, c, 2) for c, p in enumerate(chance)) == pytest.approx(1 - 0.7**2)


# -- the majority --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("votes", "rewards", "reward"),
    [
        (["3", "4", "4"], [1.0, 0.0, 0.0], 0.0),
        (["3", "4", "3", "5"], [1.0, 0.0, 1.0, 0.0], 1.0),
        (["4", "3", "3", "4"], [0.0, 1.0, 1.0, 0.0], 0.0),  # a tie: the first
        (["3", "4"], [1.0, 0.0], 1.0),
        ([None, None, "3"], [0.0, 0.0, 1.0], 0.0),  # no answer is an answer
        ([None, "3", "3"], [0.5, 1.0, 1.0], 1.0),
        (["3", "3"], [0.9, 0.8], 0.9),  # the same text, other rewards: the first
    ],
)
def test_majority(votes, rewards, reward) -> None:
    assert majority_reward(votes, rewards) == reward


def test_the_text_that_votes() -> None:
    assert extracted_answer("openai/gsm8k", "2 + 2 = 4\n#### 1,004") == "1004"
    assert extracted_answer("word_problems", "so it is 4") is None
    assert extracted_answer("DigitalLearningGmbH/MATH-lighteval", r"so \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert extracted_answer("mine", " yes\n") == "yes"
    assert EXTRACTORS.keys() <= BUILT_IN.keys()


# -- the metrics ---------------------------------------------------------------------------------------------------


def answer(text: str, reward: float, num_tokens: int = 2, finished: bool = True) -> Completion:
    return Completion([7] * num_tokens, [-1.0] * num_tokens, finished, 0, text, reward)


def prompt(index: int, source: str) -> Prompt:
    return Prompt(index, (index, 5), source, "4")


PROMPTS = [prompt(0, "a"), prompt(1, "b"), prompt(2, "a")]
ANSWERS = [
    [answer("4", 1.0), answer("3", 0.0), answer("4", 1.0), answer("", 0.0, 6, finished=False)],
    [answer("9", 0.0), answer("9", 0.0), answer("4", 1.0), answer("8", 0.5)],
    [answer("1", 0.0), answer("1", 0.0), answer("2", 0.0), answer("3", 0.0)],
]


SOUND = {f"val/reward/{outcome}_share": 0.0 for outcome in ("error", "timeout", "crash")}


def test_metrics_of_four_answers_by_hand() -> None:
    assert validation_metrics(PROMPTS, ANSWERS) == {
        "val/accuracy": 3.5 / 12,
        "val/a/mean@4": 2 / 8,
        "val/a/maj@4": 1 / 2,  # "4" is right; "1" is wrong
        "val/a/pass@1": (2 / 4 + 0) / 2,
        "val/a/pass@2": (5 / 6 + 0) / 2,  # of six pairs one has neither of the two right answers
        "val/a/pass@4": 1 / 2,
        "val/b/mean@4": 1.5 / 4,
        "val/b/maj@4": 0.0,
        "val/b/pass@1": 1 / 4,  # a reward of 0.5 is not right
        "val/b/pass@2": 1 / 2,
        "val/b/pass@4": 1.0,
        "val/mean_tokens": 28 / 12,
        "val/truncated_share": 1 / 12,
        "val/num_prompts": 3,
        **SOUND,
    }


def test_metrics_of_one_answer() -> None:
    metrics = validation_metrics(PROMPTS[:2], [group[:1] for group in ANSWERS[:2]])
    assert metrics == {
        "val/accuracy": 0.5,
        "val/a/mean@1": 1.0,
        "val/b/mean@1": 0.0,
        "val/mean_tokens": 2.0,
        "val/truncated_share": 0.0,
        "val/num_prompts": 2,
        **SOUND,
    }


def test_k_are_the_powers_of_two_up_to_n() -> None:
    def ks(n: int) -> list[str]:
        metrics = validation_metrics([prompt(0, "a")], [[answer("4", 1.0)] * n])
        return [name.removeprefix("val/a/pass@") for name in metrics if "pass@" in name]

    assert [ks(n) for n in (1, 2, 3, 7, 8)] == [[], ["1", "2"], ["1", "2"], ["1", "2", "4"], ["1", "2", "4", "8"]]


def test_the_extractor_is_the_callers() -> None:
    def parity(source: str, text: str) -> str:
        return f"{source} {int(text or 0) % 2}"

    assert validation_metrics(PROMPTS, ANSWERS, parity)["val/b/maj@4"] == 0.0  # 9 9 4 8: a tie, the odd ones come first
    swapped = [ANSWERS[0], ANSWERS[1][::-1], ANSWERS[2]]
    assert validation_metrics(PROMPTS, swapped, parity)["val/b/maj@4"] == 0.5  # 8 4 9 9: the even ones, and 8 first


# -- the file ------------------------------------------------------------------------------------------------------


class Collector:
    """Hands out the answers above, and notes how it was asked."""

    def __init__(self) -> None:
        self.timer = SimpleNamespace(phase=lambda name: nullcontext())
        self.engine = SimpleNamespace(tokenizer=SimpleNamespace(batch_decode=lambda ids: [f"prompt {i}" for i in ids]))
        self.sizes: list[int] = []

    def validation(self, prompts):
        self.sizes.append(len(prompts))
        return [ANSWERS[prompt.index] for prompt in prompts]

    def check_rewards(self, answers):
        self.checked = len(answers)


def test_answers_are_written_one_per_line_and_whole(tmp_path) -> None:
    collector = Collector()
    metrics = validate(collector, PROMPTS, step=3, batch_size=2, dump_dir=str(tmp_path / "new"))
    assert metrics == validation_metrics(PROMPTS, ANSWERS)
    assert collector.sizes == [2, 1] and collector.checked == 12  # once, over all of them
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["3.jsonl"]
    lines = [json.loads(line) for line in (tmp_path / "new" / "3.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == [0] * 4 + [1] * 4 + [2] * 4
    assert lines[3] == {
        "step": 3,
        "index": 0,
        "prompt": "prompt [0, 5]",
        "data_source": "a",
        "ground_truth": "4",
        "answer": "",
        "scores": {},
        "notes": {},
        "reward_outcome": "ok",
        "reward": 0.0,
        "finished": False,
        "num_tokens": 6,
    }


def test_ranks_without_a_folder_write_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    collector = Collector()
    validate(collector, PROMPTS, step=3, batch_size=None, dump_dir=None)
    assert collector.sizes == [3] and not list(tmp_path.iterdir())
