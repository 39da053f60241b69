"""What a rule is given, how it registers itself, and words for its messages.

    @rule          def ranks_match_launcher(setup: Setup) -> None                   raises ConfigError
    @model_rule    def policy_tp_fits(setup: Setup, model: ModelFacts) -> None      raises ConfigError
    @remark        def offload_on_cpu(setup: Setup) -> Iterator[str]                yields sentences

A message names the setting, the values that clash, and what to set instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from remax_megatron.config.schema import (
    ACTOR,
    CRITIC,
    Actor,
    Config,
    Megatron,
    RolloutConfig,
    Sides,
    critic_as_actor,
    expects_cpu,
    has_critic,
    sides_of,
)
from remax_megatron.model_facts import ModelFacts


@dataclass(frozen=True)
class Setup:
    """The settings, and the number of ranks that were started."""

    config: Config
    world_size: int

    @property
    def actor(self) -> Actor:
        """Return the settings of the actor."""
        return self.config.actor_rollout_ref.actor

    @property
    def megatron(self) -> Megatron:
        """Return the settings of its Megatron."""
        return self.actor.megatron

    @property
    def rollout(self) -> RolloutConfig:
        """Return the settings of the engine."""
        return self.config.actor_rollout_ref.rollout

    @property
    def tp(self) -> int:
        """Return the policy's tensor-parallel size."""
        return self.megatron.tensor_model_parallel_size

    @property
    def pp(self) -> int:
        """Return the number of pipeline stages."""
        return self.megatron.pipeline_model_parallel_size

    @property
    def sides(self) -> Sides:
        """Return how many ranks train and how many answer."""
        return sides_of(self.config, self.world_size)

    @property
    def mini_batch(self) -> int:
        """Prompts per optimizer step."""
        return self.actor.ppo_mini_batch_size or self.config.data.train_batch_size

    @property
    def has_critic(self) -> bool:
        """Tell whether a critic is trained beside the policy."""
        return has_critic(self.config)

    @property
    def trained(self) -> list[tuple[str, Actor]]:
        """List what is trained, the policy and the critic if there is one: where its settings stand, and these."""
        critic = [(CRITIC, critic_as_actor(self.config))] if self.has_critic else []
        return [(ACTOR, self.actor), *critic]

    @property
    def on_cpu(self) -> bool:
        """Tell whether the run will be on the CPU."""
        return expects_cpu(self.config)

    @property
    def longest_sequence(self) -> int:
        """Count the tokens of the longest prompt and answer together."""
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
    """Return the divisors of `number` in order."""
    return [n for n in range(1, number + 1) if number % n == 0]


def numbers(legal: Iterable[int]) -> str:
    """ "one of 1, 2, 4", for a message."""
    texts = [str(n) for n in legal]
    return one_of(", ".join(texts), len(texts))


def one_of(names: str, count: int) -> str:
    """Write `count` names as a choice."""
    return names if count == 1 else f"one of {names}"
