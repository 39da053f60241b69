"""From prompts to scored answers on every rank: each replica answers and scores its share, then all share all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch.distributed as dist

from remax_megatron.phases import PhaseTimer
from remax_megatron.rewards.length import LengthRules
from remax_megatron.rewards.pool import RewardPool, Scoring, check_failures
from remax_megatron.rewards.scorer import ScoreRequest, ScoreResult
from remax_megatron.rollout.engine import Engine
from remax_megatron.types import Completion, Prompt, Rollout

T = TypeVar("T")


class AnswerScoring:
    """Scores answers while others are still being written (an engine's Listener); `finish` sets all rewards."""

    def __init__(self, scoring: Scoring):
        self._scoring, self._answers = scoring, list[Completion]()

    def add(self, prompt: Prompt, answer: Completion) -> None:
        """Have a finished answer scored."""
        self._answers.append(answer)
        ends = (answer.text, prompt.ground_truth, prompt.extra_info, prompt.turns, answer.token_ids, answer.finished)
        self._scoring.add(ScoreRequest(prompt.data_source, *ends))

    def poll(self) -> None:
        """Let the workers go on."""
        self._scoring.poll()

    def finish(self) -> None:
        """Wait for the scores that are still missing, and set the rewards."""
        for answer, result in zip(self._answers, self._scoring.results(), strict=True):
            answer.reward, answer.scores, answer.notes = result.score, result.extra, result.texts
            answer.reward_outcome, answer.reward_message = result.outcome, result.message


class Collector:
    """Runs the engine and the scorer over a batch of prompts; its calls are collective over all ranks that hold
    an engine."""

    def __init__(
        self,
        engine: Engine,
        pool: RewardPool | None,
        max_failure_share: float,
        timer: PhaseTimer,
        lengths: LengthRules | None = None,
    ):
        """`pool` exists on the ranks that lead a replica; `lengths` change the rewards of rollouts."""
        self.engine, self.pool, self.max_failure_share, self.timer = engine, pool, max_failure_share, timer
        self.lengths = lengths

    def rollouts(self, prompts: Sequence[Prompt], *, step: int, sleeps: bool = True) -> list[Rollout]:
        """The answers to each prompt, scored, in the order of `prompts`, on every rank.

        The engine gives its GPU memory back afterwards, and the next weight sync wakes it, unless it is to answer more
        with the same weights and `sleeps` is False; `sleep` is the caller's then.
        """
        mine = _share(prompts, self.engine.replica, self.engine.num_replicas)
        with self.timer.phase("rollout"):
            scoring = self._scoring(len(mine) * self.engine.num_answers)
            rollouts = self.engine.rollout(mine, step=step, listener=scoring)
            if sleeps:
                self.engine.sleep()
            dist.barrier()  # the phase is as long as the slowest replica's
        with self.timer.phase("reward"):  # what is left of it: most were scored while others were written
            if scoring is not None:
                scoring.finish()
            gathered = self._gather(rollouts)
            answers = [answer for rollout in gathered for answer in rollout.completions]
            self.check_rewards(answers)
            for answer in answers if self.lengths is not None else ():
                self.lengths.apply(answer)
            return gathered

    def sleep(self) -> None:
        """Have the engine give its GPU memory back; every rank calls."""
        with self.timer.phase("rollout"):
            self.engine.sleep()
            dist.barrier()

    def validation(self, prompts: Sequence[Prompt]) -> list[list[Completion]]:
        """The scored validation answers to each prompt, in order, on every rank; `check_rewards` is the caller's."""
        mine = _share(prompts, self.engine.replica, self.engine.num_replicas)
        scoring = self._scoring(len(mine) * self.engine.config.val_kwargs.n)
        answers = self.engine.validation(mine, scoring)
        if scoring is not None:
            scoring.finish()
        return self._gather(answers)

    def close(self) -> None:
        """End the reward workers and the engine; every rank calls."""
        if self.pool is not None:
            self.pool.close()
        self.engine.close()

    def check_rewards(self, answers: Sequence[Completion]) -> None:
        """RewardFailures, on every rank alike, when too many rewards of all replicas' `answers` could not be had."""
        check_rewards(answers, self.max_failure_share)

    def _scoring(self, num_answers: int) -> AnswerScoring | None:
        """What scores this replica's answers, on the rank that leads it; None where there is nothing to score.

        RewardFailures when so many fail here that it would be too many even if all others were sound.
        """
        if self.pool is None or not num_answers:
            return None
        total = num_answers * self.engine.num_replicas  # the shares of replicas differ by a prompt at most
        return AnswerScoring(self.pool.begin(num_answers, max_failure_share=self.max_failure_share, num_answers=total))

    def _gather(self, mine: list[T]) -> list[T]:
        parts: list = [None] * dist.get_world_size()
        dist.all_gather_object(parts, mine if self.engine.leads_replica else [])
        return [item for part in parts for item in part]


def check_rewards(answers: Sequence[Completion], max_share: float) -> None:
    """RewardFailures when more than `max_share` of the rewards of `answers` could not be had."""
    check_failures([ScoreResult(a.reward, a.reward_outcome, a.reward_message) for a in answers], max_share)


def _share(items: Sequence[T], index: int, count: int) -> Sequence[T]:
    """The `index`-th of `count` consecutive parts whose sizes differ by at most one."""
    bounds = [len(items) * i // count for i in range(count + 1)]
    return items[bounds[index] : bounds[index + 1]]
