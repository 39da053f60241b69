"""The trainer draws further prompts: which, in which rounds, the same after a resume; and the engine sleeps once."""

from __future__ import annotations

from typing import Any

from remax_megatron.config.load import load_config
from remax_megatron.data.dataset import PromptDataset, batches, further
from remax_megatron.rollout.batches import WrittenHere
from remax_megatron.trainer import Trainer
from remax_megatron.types import Completion, Prompt, Rollout

NUM_PROMPTS, SIZE = 40, 4


class Collector:
    """Answers prompts so that every fourth index is informative, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.num_sleeps = 0

    def rollouts(self, prompts: list[Prompt], *, step: int, sleeps: bool = True) -> list[Rollout]:
        self.asked.append([prompt.index for prompt in prompts])
        self.num_sleeps += sleeps
        greedy = Completion([1], [-1.0], True, 0)
        return [Rollout(p, [Completion([1], [-1.0], True, 0, reward=float(p.index % 4 == 0))], greedy) for p in prompts]

    def sleep(self) -> None:
        self.num_sleeps += 1


def trainer(*overrides: str, start_step: int = 0) -> Any:
    config = load_config("demo", [f"data.train_batch_size={SIZE}", *overrides]).config
    parts: dict[str, Any] = dict.fromkeys(("learner", "bridge", "val_prompts", "timer", "flops", "writer", "saver"))
    prompts = PromptDataset([Prompt(i, (1,), "s", "") for i in range(NUM_PROMPTS)], NUM_PROMPTS)
    collector: Any = Collector()
    written = WrittenHere(collector, prompts, config)
    rest = {"train_prompts": prompts, "prompts_digest": "", "start_step": start_step}
    rest |= {"collector": collector, "batches": written}
    return Trainer(config=config, **parts, **rest)  # type: ignore[arg-type]


def drawn(run: Any) -> list[list[int]]:
    """What the steps that are left train on."""
    taken = (run.batches.take(step, run._batch(step)) for step, _ in run._steps())
    return [[one.prompt.index for one in answered.rollouts] for answered in taken]


def test_further_prompts_follow_those_of_the_step() -> None:
    run = trainer("algorithm.refill=True", "algorithm.refill_limit=40")
    seed = run.config.trainer.seed
    batch = batches(NUM_PROMPTS, SIZE, seed, epoch=1)[0]
    order = [*batch, *further(NUM_PROMPTS, batch, seed, step=1)]
    answered = run.batches.take(1, batch)
    found, metrics = [one.prompt.index for one in answered.rollouts], answered.metrics
    assert found == order[: len(found)] and found[-1] % 4 == 0 and sum(i % 4 == 0 for i in found) == SIZE
    asked = [index for part in run.collector.asked for index in part]
    assert asked == order[: len(asked)] and metrics == {"refill/answered_prompts": len(asked)}
    assert len(run.collector.asked[0]) == SIZE and len(run.collector.asked) > 1 and run.collector.num_sleeps == 1


def test_a_resumed_run_draws_the_same() -> None:
    refill = "algorithm.refill=True"
    whole = drawn(trainer(refill))
    assert len({len(one) for one in whole}) > 1 and all(len(one) <= 4 * SIZE for one in whole)
    assert drawn(trainer(refill, start_step=3)) == whole[3:]


def test_without_it_a_step_has_its_own_prompts() -> None:
    run = trainer()
    seed = run.config.trainer.seed
    per_epoch = [batches(NUM_PROMPTS, SIZE, seed, epoch) for epoch in range(1, run.num_epochs + 1)]
    assert drawn(run) == [batch for epoch in per_epoch for batch in epoch][: run.num_steps]
    assert run.collector.num_sleeps == run.num_steps
