"""What a rule is given, how it registers itself, and words for its messages.

    @rule          def ranks_match_launcher(setup: Setup) -> None                   raises ConfigError
    @model_rule    def policy_tp_fits(setup: Setup, model: ModelFacts) -> None      raises ConfigError
    @remark        def offload_on_cpu(setup: Setup) -> Iterator[str]                yields sentences

A message names the setting, the values that clash, and what to set instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from remax_megatron.config.schema import Actor, Config, Megatron, RolloutConfig, expects_cpu
from remax_megatron.model_facts import ModelFacts


@dataclass(frozen=True)
class Setup:
    """The settings, and the number of ranks that were started."""

    config: Config
    world_size: int

    @property
    def actor(self) -> Actor:
        return self.config.actor_rollout_ref.actor

    @property
    def megatron(self) -> Megatron:
        return self.actor.megatron

    @property
    def rollout(self) -> RolloutConfig:
        return self.config.actor_rollout_ref.rollout

    @property
    def tp(self) -> int:
        return self.megatron.tensor_model_parallel_size

    @property
    def pp(self) -> int:
        return self.megatron.pipeline_model_parallel_size

    @property
    def mini_batch(self) -> int:
        """Prompts per optimizer step."""
        return self.actor.ppo_mini_batch_size or self.config.data.train_batch_size

    @property
    def on_cpu(self) -> bool:
        return expects_cpu(self.config)

    @property
    def longest_sequence(self) -> int:
        return self.config.data.max_prompt_length + self.config.data.max_response_length


Rule = Callable[[Setup], None]
ModelRule = Callable[[Setup, ModelFacts], None]
Remark = Callable[[Setup], Iterator[str]]

RULES: list[Rule] = []
MODEL_RULES: list[ModelRule] = []
REMARKS: list[Remark] = []


def rule(check: Rule) -> Rule:
    """Registers a rule between settings and the number of ranks; it runs after those that are registered."""
    RULES.append(check)
    return check


def model_rule(check: ModelRule) -> ModelRule:
    """Registers a rule between settings and the model; it runs once the model's facts are known."""
    MODEL_RULES.append(check)
    return check


def remark(look: Remark) -> Remark:
    """Registers a remark on legal settings that have no effect here."""
    REMARKS.append(look)
    return look


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def numbers(legal: Iterable[int]) -> str:
    """ "one of 1, 2, 4", for a message."""
    texts = [str(n) for n in legal]
    return one_of(", ".join(texts), len(texts))


def one_of(names: str, count: int) -> str:
    return names if count == 1 else f"one of {names}"
