"""Validation: n answers to each validation prompt, scored; what they say of the policy, and where they are written.

`validate` is collective; the rest is pure. Metrics, with n of `actor_rollout_ref.rollout.val_kwargs`:

    val/accuracy            mean reward over all answers (a share of right ones where rewards are 0 or 1)
    val/SOURCE/mean@n       the same over the prompts of one data source
    val/SOURCE/maj@n        mean reward of the answer that the n agree on most       (n > 1)
    val/SOURCE/pass@k       share of prompts that k answers would get right, k = 1, 2, 4, ... up to n      (n > 1)
    val/mean_tokens, val/truncated_share (over answers), val/num_prompts
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from remax_megatron.atomic import replacing, written_for
from remax_megatron.diagnostics import scoring_metrics
from remax_megatron.rewards.boxed import last_boxed
from remax_megatron.rewards.gsm8k import extract_answer
from remax_megatron.types import Completion, Prompt

if TYPE_CHECKING:
    from remax_megatron.rollout.collect import Collector

# What an answer says in the end, by data source; the texts of two answers that mean the same may still differ
# (1/2 and 0.5), and then they are two votes.
EXTRACTORS: dict[str, Callable[[str], str | None]] = {
    "openai/gsm8k": extract_answer,
    "word_problems": extract_answer,
    "DigitalLearningGmbH/MATH-lighteval": last_boxed,
}


def validate(
    collector: Collector, prompts: Sequence[Prompt], *, step: int, batch_size: int | None, dump_dir: str | None
) -> dict[str, float]:
    """Answer, score and measure; see `validation_metrics`. Collective: every rank calls with the same prompts.

    `dump_dir` is for one rank, None on the others: the answers are written to `dump_dir`/STEP.jsonl, whole.
    """
    batch_size = batch_size or len(prompts)
    answers: list[list[Completion]] = []
    with collector.timer.phase("validation"):
        for start in range(0, len(prompts), batch_size):
            answers += collector.validation(prompts[start : start + batch_size])
        collector.check_rewards([answer for group in answers for answer in group])
    if dump_dir is not None:
        texts = collector.engine.tokenizer.batch_decode([list(prompt.token_ids) for prompt in prompts])
        with written_for("trainer.validation_data_dir", dump_dir), replacing(Path(dump_dir) / f"{step}.jsonl") as path:
            path.write_text("".join(line + "\n" for line in dump_lines(step, prompts, texts, answers)))
    return validation_metrics(prompts, answers)


def extracted_answer(data_source: str, text: str) -> str | None:
    """The text that votes: what the extractor of the source finds in `text`, None if no answer is found; the stripped
    text if no extractor exists."""
    extract = EXTRACTORS.get(data_source, str.strip)
    return extract(text)


def validation_metrics(
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[Completion]],
    extract: Callable[[str, str], str | None] = extracted_answer,
) -> dict[str, float]:
    """The metrics named above, of the same number n of scored answers to each prompt.

    `extract` takes (data source, answer text). An answer is right, for pass@k, when its reward is at least 1.
    """
    n = len(answers[0])
    every = [answer for group in answers for answer in group]
    metrics = {"val/accuracy": _mean([answer.reward for answer in every])}
    for source in dict.fromkeys(prompt.data_source for prompt in prompts):
        groups = [group for prompt, group in zip(prompts, answers, strict=True) if prompt.data_source == source]
        rewards = [[answer.reward for answer in group] for group in groups]
        metrics[f"val/{source}/mean@{n}"] = _mean([reward for group in rewards for reward in group])
        if n == 1:
            continue
        votes = [[extract(source, answer.text) for answer in group] for group in groups]
        metrics[f"val/{source}/maj@{n}"] = _mean(list(map(majority_reward, votes, rewards)))
        num_right = [sum(reward >= 1.0 for reward in group) for group in rewards]
        for k in (2**i for i in range(n.bit_length())):
            metrics[f"val/{source}/pass@{k}"] = _mean([pass_at_k(n, right, k) for right in num_right])
    metrics |= {f"val/{name}": value for name, value in scoring_metrics(every).items()}
    return metrics | {
        "val/mean_tokens": _mean([len(answer.token_ids) for answer in every]),
        "val/truncated_share": _mean([not answer.finished for answer in every]),
        "val/num_prompts": len(prompts),
    }


def majority_reward(votes: Sequence[str | None], rewards: Sequence[float]) -> float:
    """The reward of the most frequent vote: of the first answer that gave it, and the first vote among equals.

    Answers in which nothing was found vote for None together. Example: majority_reward(["3", "4", "4"], [1, 0, 0]) == 0
    """
    counts = Counter(votes)  # in the order of first occurrence, which max keeps to
    return rewards[votes.index(max(counts, key=lambda vote: counts[vote]))]


def pass_at_k(n: int, num_right: int, k: int) -> float:
    """The unbiased estimate of P(at least one of k answers is right) from n, 1 <= k <= n, of which `num_right` are.

    1 - C(n - c, k) / C(n, k) of arXiv 2107.03374, in whole numbers up to one division, so rounded only once.
    Example: pass_at_k(4, 1, 2) == 0.5, one of the six pairs in two having the right one.
    """
    assert 1 <= k <= n and 0 <= num_right <= n, (n, num_right, k)
    return (math.comb(n, k) - math.comb(n - num_right, k)) / math.comb(n, k)


def dump_lines(
    step: int, prompts: Sequence[Prompt], texts: Sequence[str], answers: Sequence[Sequence[Completion]]
) -> Iterator[str]:
    """One JSON object per answer, the n answers to a prompt one after the other. `texts` are those of the prompts."""
    for prompt, text, group in zip(prompts, texts, answers, strict=True):
        for answer in group:
            record = {
                "step": step,
                "index": prompt.index,
                "prompt": text,
                "data_source": prompt.data_source,
                "ground_truth": prompt.ground_truth,
                "answer": answer.text,
                "reward": answer.reward,
                "reward_outcome": answer.reward_outcome,
                "scores": answer.scores,
                "notes": answer.notes,
                "finished": answer.finished,
                "num_tokens": len(answer.token_ids),
            }
            yield json.dumps(record, default=str)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
