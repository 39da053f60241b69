"""Which settings are fastest on a number of devices, by the planner's own count: a search over what the rules take.

TP x PP x recompute x offload x token budget on one side, the engine's TP and share of memory on the other. The two
sides meet in memory alone: each layout takes the fastest update that fits, and beside what then stays during rollouts
the largest share of the engine. Everything else is the given settings'.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from remax_megatron.config.schema import ACTOR, MEGATRON, ROLLOUT, Config, sides_of
from remax_megatron.config.setting import set_value, value_of
from remax_megatron.model_facts import ModelFacts
from remax_megatron.plan.fitting import GRANULARITY, ROLLOUT_TP, SHARE, TOKENS, TP
from remax_megatron.plan.ledger import BESIDE_THE_UPDATE, OF_THE_ENGINE
from remax_megatron.plan.lengths import DEFAULT, NAMED, Lengths
from remax_megatron.plan.memory import Machine, is_valid, memory
from remax_megatron.plan.parts import Efficiencies
from remax_megatron.plan.step_time import Batch, Model, batch_of

PP = f"{MEGATRON}.pipeline_model_parallel_size"
OFFLOADS = (f"{MEGATRON}.grad_offload", f"{MEGATRON}.optimizer_offload")
RECOMPUTES = ("none", "selective", "full")
BUDGETS = (4096, 8192, 12288, 16384, 24576, 32768, 49152, 65536)  # tokens
SHARES = tuple(round(0.05 * steps, 2) for steps in range(17, 1, -1))  # of a card, the largest first
MOST_STAGES = 16
BEST = 5


@dataclass(frozen=True)
class Suggestion:
    """Settings that fit: what is changed by key, the seconds of a step, and the bytes left in its largest phase."""

    changes: dict[str, Any]
    seconds: float
    headroom: int


@dataclass(frozen=True)
class Search:
    """What is searched for: settings of `config` for a model of `facts` on `world_size` devices of `machine`, with
    answers of these `lengths`, at these `efficiencies`."""

    config: Config
    facts: ModelFacts
    world_size: int
    machine: Machine
    lengths: Lengths
    efficiencies: Efficiencies = Efficiencies()

    def best(self, count: int = BEST) -> list[Suggestion]:
        """Find the `count` fastest settings, each another layout of policy or engine; fewer where fewer fit."""
        config = on_devices(self.config, self.world_size)
        batch = batch_of(config, self.lengths)
        found = [one for layout in self.layouts(config) for one in self.of_layout(config, layout, batch)]
        return sorted(found, key=lambda one: one.seconds)[:count]

    def layouts(self, config: Config) -> Iterator[dict[str, Any]]:
        """TP and PP that the rules take."""
        per_node = config.trainer.n_gpus_per_node
        stages = [pp for pp in range(1, MOST_STAGES + 1) if self.facts.num_layers % pp == 0]
        for tp, pp in product(_divisors(per_node), stages):
            if sides_of(config, self.world_size).policy % (tp * pp) == 0:
                changes: dict[str, Any] = {TP: tp, PP: pp, f"{MEGATRON}.sequence_parallel": tp > 1}
                if value_of(config, f"{MEGATRON}.virtual_pipeline_model_parallel_size") is not None:
                    changes[f"{MEGATRON}.virtual_pipeline_model_parallel_size"] = None
                if is_valid(self._with(config, changes | {TOKENS: _rounded(2**20, tp)}), self.facts, self.world_size):
                    yield changes

    def of_layout(self, config: Config, layout: dict[str, Any], batch: Batch) -> Iterator[Suggestion]:
        """The fastest settings of a layout, one for each engine."""
        trained = [self.training(config, layout, away, batch) for away in self.offloads()]
        for rollout_tp in _divisors(config.trainer.n_gpus_per_node):
            engines = (self.engine(config, one, rollout_tp, batch) for one in trained if one is not None)
            found = [one for one in engines if one is not None]
            if found:
                yield min(found, key=lambda one: one.seconds)

    def offloads(self) -> list[dict[str, Any]]:
        """What leaves the device during rollouts: nothing, the gradients, or the optimizer's state as well."""
        kept = [dict(zip(OFFLOADS, values, strict=True)) for values in ((False, False), (True, False), (True, True))]
        return kept[:1] if self.machine.on_cpu or self.config.trainer.placement == "split" else kept

    def training(
        self, config: Config, layout: dict[str, Any], away: dict[str, Any], batch: Batch
    ) -> tuple[dict[str, Any], float] | None:
        """The fastest recompute and token budget whose updates fit, and the seconds of scoring, update and offload."""
        data, found = config.data, []
        longest = _rounded(data.max_prompt_length + data.max_response_length, layout[TP])
        budgets = [budget for budget in BUDGETS if budget > longest] or [longest]
        for granularity in RECOMPUTES:
            for budget in reversed([longest, *budgets]):
                changes = layout | away | {GRANULARITY: granularity, TOKENS: _rounded(budget, layout[TP])}
                changed = self._with(config, changes)
                made = memory(changed, self.facts, self.world_size, self.machine)
                updates = [
                    name for name in made.made.phases if name.removeprefix(OF_THE_ENGINE) not in BESIDE_THE_UPDATE
                ]
                if max(map(made.made.peak, updates)) > made.limit:
                    continue
                model = Model(changed, self.facts, self.world_size, self.machine.gpu, batch)
                phases = [model.scoring(), model.update()[0], model.offloads()]
                found.append((changes, sum(phase.seconds(self.efficiencies) for phase in phases)))
        return min(found, key=lambda one: one[1], default=None)

    def engine(
        self, config: Config, trained: tuple[dict[str, Any], float], rollout_tp: int, batch: Batch
    ) -> Suggestion | None:
        """The largest share of the engine that fits beside what is `trained`, None where none does."""
        for share in SHARES[-1:] if self.machine.on_cpu else SHARES:
            changes = trained[0] | {ROLLOUT_TP: rollout_tp}
            changes |= {} if self.machine.on_cpu else {SHARE: share}
            changed = self._with(config, changes)
            made = memory(changed, self.facts, self.world_size, self.machine)
            if made.short > 0:
                return None  # and a smaller share has less
            if not made.fits:
                continue
            if not is_valid(changed, self.facts, self.world_size):
                return None
            model = Model(changed, self.facts, self.world_size, self.machine.gpu, batch)
            return Suggestion(changes, model.step().seconds(self.efficiencies), made.headroom)
        return None

    def any_fits(self, config: Config) -> bool:
        """Tell whether some layout fits with the settings that need least memory."""
        longest = config.data.max_prompt_length + config.data.max_response_length
        away = self.offloads()[-1]
        for layout in self.layouts(config):
            changes = layout | away | {GRANULARITY: "full", TOKENS: _rounded(longest, layout[TP])}
            for rollout_tp in _divisors(config.trainer.n_gpus_per_node):
                for share in SHARES[::-1]:
                    changed = self._with(config, changes | {ROLLOUT_TP: rollout_tp, SHARE: share})
                    made = memory(changed, self.facts, self.world_size, self.machine)
                    if made.fits and is_valid(changed, self.facts, self.world_size):
                        return True
        return False

    def _with(self, config: Config, changes: dict[str, Any]) -> Config:
        """A copy of `config`, as deep as the changes go."""
        changed = copy.copy(config)
        changed.actor_rollout_ref = copy.copy(config.actor_rollout_ref)
        changed.actor_rollout_ref.rollout = copy.copy(config.actor_rollout_ref.rollout)
        changed.actor_rollout_ref.actor = actor = copy.copy(config.actor_rollout_ref.actor)
        actor.megatron = copy.copy(actor.megatron)
        actor.megatron.override_transformer_config = copy.copy(actor.megatron.override_transformer_config)
        for key, value in changes.items():
            assert key.startswith((ACTOR, ROLLOUT)), key
            set_value(changed, key, value)
        return changed


def fewest_devices(config: Config, facts: ModelFacts, machine: Machine, most: int = 1024) -> int | None:
    """Find the smallest power of two of devices on which some layout fits with full recompute, all offloads,
    micro-batches of one longest row and a share of the engine that just holds it; None: not even `most`."""
    world_size = 1
    while world_size <= most:
        search = Search(config, facts, world_size, machine, NAMED[DEFAULT])
        if search.any_fits(on_devices(config, world_size)):
            return world_size
        world_size *= 2
    return None


def on_devices(config: Config, world_size: int) -> Config:
    """Give `config` `world_size` devices, on nodes as large as its own where that divides them, and no settings of
    recompute that go with one granularity alone."""
    changed = copy.deepcopy(config)
    per_node = math.gcd(world_size, config.trainer.n_gpus_per_node)
    changed.trainer.n_gpus_per_node, changed.trainer.nnodes = per_node, world_size // per_node
    changed.actor_rollout_ref.rollout.num_ranks = None  # half of the ranks, of a split run
    recompute = changed.actor_rollout_ref.actor.megatron.override_transformer_config
    recompute.recompute_method = recompute.recompute_num_layers = recompute.recompute_modules = None
    return changed


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _rounded(tokens: int, tp: int) -> int:
    """`tokens`, up to a multiple of `tp`."""
    return -(-tokens // tp) * tp
