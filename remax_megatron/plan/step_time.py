"""How long a step takes, phase by phase, and what binds each: counted work over rates that are assumed or calibrated.

    made = step_time(config, facts, world_size, gpu, lengths)
    made.phases["update"].seconds(efficiencies)      the sum of its parts
    made.phases["update"].bound(efficiencies)        the name of the largest part

A part is work in seconds at the data sheet's rate, which one of the `Efficiencies` divides, or a count, which one of
them (its name ends in _s) multiplies. So every phase is linear in a few numbers, and calibrate.py can fit them.

The work is that of the code that runs: micro-batches of batching/schedule.py on lengths that were drawn, FLOPs of
flops.py, bytes of weights/buckets.py. Pure, no torch. No time that this gives was ever checked on a GPU.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from remax_megatron.algorithm.estimators import get_estimator
from remax_megatron.batching.schedule import Schedule, row_cost, schedule_by_rows, schedule_by_tokens
from remax_megatron.config.schema import (
    Config,
    critic_as_actor,
    has_critic,
    needs_reference,
    recompute_of,
    sides_of,
)
from remax_megatron.flops import ForwardFlops, RowGroup, UpdateFlops
from remax_megatron.model_facts import ModelFacts
from remax_megatron.plan.engine_time import (
    Decoded,
    cache_tokens,
    decode,
    engine_step_parts,
    prefill_part,
    replicas,
)
from remax_megatron.plan.gpus import Gpu
from remax_megatron.plan.ledger import BYTES, GRADIENT, MIB, parameters
from remax_megatron.plan.lengths import Lengths
from remax_megatron.plan.parts import Efficiencies, Part, Phase
from remax_megatron.rollout.memory import CANARY_TOKENS, NUM_CANARIES, NUM_GENERATED
from remax_megatron.types import Recompute
from remax_megatron.weights.buckets import num_stream_elements, plan_buckets
from remax_megatron.weights.weight_table import weight_table

# Bytes per parameter of Adam's step: reads gradient, master and two moments, writes master, moments and the weight.
ADAM_TRAFFIC = 4 * 7 + 2
UNIT = 1024  # tokens of a row by which flops.py is asked
COPIES = 4  # times a weight crosses the memory: gathered, put together, copied to the new module, copied over the old
PASSES_OF_LAYER = {"none": 3, "selective": 3, "full": 4}  # forward, backward at twice its kernels, recompute


@dataclass(frozen=True)
class StepTime:
    """The phases of a step in order, under the names of metrics.jsonl, and what is said about them.

    num_tokens      of prompts and answers that are trained, as `batch/num_tokens`
    num_answered    tokens that the engine writes, greedy answers included
    microbatches    per data-parallel rank and update
    imbalance       share of the update in which the mean data-parallel rank waits for the busiest
    bubble          share of the update's passes in which a stage waits for the pipeline
    tail            share of the engine's steps at the end in which few answers still write
    ahead           the engine, on ranks of its own, writes the next step's answers while this one trains
    """

    phases: dict[str, Phase]
    num_tokens: int
    num_answered: int
    microbatches: int
    imbalance: float
    bubble: float
    tail: float
    ahead: bool = False

    def seconds(self, efficiencies: Efficiencies) -> float:
        """Compute the seconds of the step."""
        of = {name: phase.seconds(efficiencies) for name, phase in self.phases.items()}
        written = sum(of.pop(name, 0.0) for name in ("rollout", "reward"))
        if not self.ahead:
            return written + sum(of.values())
        sync = of.pop("sync")
        return max(written, sum(of.values())) + sync


class Batch(NamedTuple):
    """What a step works on: prompts with all their answers, of which the first is greedy if there is one, and the
    sampled answers as they are packed."""

    requests: tuple[tuple[int, tuple[int, ...]], ...]
    groups: tuple[RowGroup, ...]


class Pass(NamedTuple):
    """Seconds of passes over micro-batches at the peak rate, on the busiest rank: `compute`, of which it works the
    share `imbalance` longer than the mean rank, and the pipeline's `bubble`; the `last` micro-batch's; how many there
    are, and their tokens."""

    compute: float
    bubble: float
    imbalance: float
    last: float
    microbatches: int
    tokens: int


def step_time(
    config: Config, facts: ModelFacts, world_size: int, gpu: Gpu, lengths: Lengths, trained_share: float = 1.0
) -> StepTime:
    """Model the time of a step.

    config         the settings
    facts          the sizes of the model
    world_size     devices, each of them a `gpu`
    lengths        prompts and answers are drawn from them
    trained_share  share of the rows that are trained: those without a gradient may be left out
    """
    return Model(config, facts, world_size, gpu, batch_of(config, lengths), trained_share).step()


@cache
def _drawn(lengths: Lengths, num_prompts: int, answers: int, longest: tuple[int, int]) -> tuple:
    drawn = lengths.draw(num_prompts, answers, longest)
    return tuple((prompt, tuple(of_prompt)) for prompt, of_prompt in drawn)


def batch_of(config: Config, lengths: Lengths) -> Batch:
    """Draw a step's prompts and answers, and pack the sampled ones as the trainer does."""
    data, n, actor = config.data, config.actor_rollout_ref.rollout.n, config.actor_rollout_ref.actor
    greedy = int(get_estimator(config.algorithm.adv_estimator).needs_greedy)
    longest = (data.max_prompt_length, data.max_response_length)
    requests = _drawn(lengths, data.train_batch_size, n + greedy, longest)
    return Batch(requests, _packed(requests, greedy, actor.ppo_max_token_len_per_gpu if actor.share_prompts else 0))


@cache
def _packed(requests: tuple, first: int, shared_within: int) -> tuple[RowGroup, ...]:
    """Sampled answers each behind its prompt, or behind one copy of it where they fit `shared_within` tokens."""
    groups = []
    for prompt, answers in requests:
        sampled = answers[first:]
        if shared_within and prompt + sum(sampled) <= shared_within:
            groups.append(RowGroup(prompt, sampled))
        else:
            groups += [RowGroup(prompt, (answer,)) for answer in sampled]
    return tuple(groups)


@cache
def _schedule(tokens: tuple[int, ...], dp: int, budget: int, rows: int, multiple: int, facts: ModelFacts) -> Schedule:
    """The trainer's: by `budget` tokens, or by `rows` per micro-batch where that is not 0. tokens, dp and multiple are
    those of `schedule_by_tokens`; facts give the cost of a row."""
    if rows:
        return schedule_by_rows(len(tokens), dp, rows, multiple)
    return schedule_by_tokens(tokens, dp, budget, multiple, row_cost(facts))


class _Rows(NamedTuple):
    """Rows as they are packed, the model that computes them, and what it computes again."""

    groups: tuple[RowGroup, ...]
    facts: ModelFacts
    recompute: Recompute
    chunks: int


@cache
def _sizes(groups: tuple[RowGroup, ...]) -> np.ndarray:
    """[3, groups]: tokens, squares, and scored positions."""
    return np.array([(g.tokens, g.squares, sum(g.response_tokens)) for g in groups], dtype=float).reshape(-1, 3).T


@cache
def _flops(rows: _Rows) -> np.ndarray:
    """[3, groups]: layers forward, layers of an update with what is recomputed, and the head forward.

    Counts of flops.py are linear in tokens, squares and scored positions; two rows of prompt alone tell both slopes.
    """
    forward, update = ForwardFlops.of(rows.facts), UpdateFlops(rows.facts, rows.recompute, num_chunks=rows.chunks)
    tokens, squares, scored = _sizes(rows.groups)

    def of_layers(count: Callable[[Sequence[RowGroup]], int]) -> np.ndarray:
        short, twice = count([RowGroup(UNIT, ())]), count([RowGroup(2 * UNIT, ())])
        of_square = (twice - 2 * short) / (2 * UNIT**2)
        return (short / UNIT - of_square * UNIT) * tokens + of_square * squares

    return np.stack([of_layers(forward.layers), of_layers(update.hardware), forward.head * scored])


@cache
def _pass(rows: _Rows, tp: int, pp: int, vpp: int, dp: int, budget: int, by_rows: int, forward_only: bool) -> Pass:
    """FLOPs in place of seconds of the stage that has most.

    rows             what is computed
    tp, pp, vpp, dp  the layout
    budget, by_rows  those of `_schedule`
    forward_only     nothing goes backward
    """
    tokens = _sizes(rows.groups)[0].astype(np.int64)
    schedule = _schedule(tuple(tokens.tolist()), dp, budget, by_rows, pp if vpp > 1 else 1, rows.facts)
    forward, update, head = _flops(rows)
    of_row = (forward / pp + head if forward_only else update / pp + 4 * head) / tp
    count, flat = len(schedule[0]), [batch for rank in schedule for batch in rank]
    where = np.repeat(np.arange(len(flat)), [len(batch) for batch in flat])
    order = np.array([row for batch in flat for row in batch], dtype=np.int64)
    flops = np.bincount(where, of_row[order], len(flat)).reshape(dp, count)
    held = np.bincount(where, tokens[order], len(flat)).reshape(dp, count).sum(1)
    totals = flops.sum(1)
    busiest = flops[int(totals.argmax())]
    bubble = (pp - 1) / vpp * float(busiest[0] + busiest[-1]) / 2
    waits = 1 - float(totals.mean() / totals.max()) if totals.max() else 0.0
    return Pass(float(totals.max()), bubble, waits, float(busiest[-1]), count, int(held.max()))


class Model:
    """One setting: its sizes, and the parts of each phase. The arguments are those of `step_time`, and the batch."""

    def __init__(
        self,
        config: Config,
        facts: ModelFacts,
        world_size: int,
        gpu: Gpu,
        batch: Batch,
        trained_share: float = 1.0,
    ) -> None:
        self.config, self.facts, self.world_size, self.gpu, self.batch = config, facts, world_size, gpu, batch
        self.sides = sides_of(config, world_size)
        self.trained_share = trained_share
        self.actor, self.rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
        self.megatron = self.actor.megatron
        self.on_cpu = config.trainer.device == "cpu"
        self.tp = self.megatron.tensor_model_parallel_size
        self.pp = self.megatron.pipeline_model_parallel_size
        self.vpp = self.megatron.virtual_pipeline_model_parallel_size or 1
        self.dp = self.sides.policy // (self.tp * self.pp)
        self.element, self.state = BYTES[self.megatron.dtype]
        self.count = max(parameters(facts, self.tp, self.pp, self.vpp))
        self.per_node = config.trainer.n_gpus_per_node

    def step(self) -> StepTime:
        """Model all phases."""
        update, passes = self.update()
        rollout, decoded = self.answers()
        phases = {"rollout": rollout, "reward": self.rewards(), "score": self.scoring()}
        if has_critic(self.config):
            phases["critic"] = self.critic()
        phases |= {"update": update, "offload": self.offloads(), "sync": self.sync()}
        total = passes.compute + passes.bubble
        return StepTime(
            {name: phase for name, phase in phases.items() if phase.parts},
            num_tokens=sum(group.tokens for group in self.batch.groups),
            num_answered=sum(sum(answers) for _, answers in self.batch.requests),
            microbatches=passes.microbatches,
            imbalance=passes.imbalance * passes.compute / total if total else 0.0,
            bubble=passes.bubble / total if total else 0.0,
            tail=decoded.tail_steps / max(1, decoded.num_steps),
            ahead=self.rollout.ahead == 1,
        )

    # -- links ---------------------------------------------------------------------------------------------------------

    def ring_rate(self, size: int, stride: int) -> float:
        """Bytes/s and rank of a ring of `size` ranks that lie `stride` apart: within a node its links; over nodes the
        adapters of all its ranks on a node together, as NCCL lays one ring through each."""
        if size * stride <= self.per_node:
            return self.gpu.node_rate
        on_node = max(1, self.per_node // stride)
        return min(self.gpu.node_rate, on_node * self.gpu.network_rate)

    def link_rate(self) -> float:
        """Bytes/s from the first of the policy's ranks to the engine's, of a split run."""
        far = self.world_size > self.per_node
        return self.gpu.network_rate if far else self.gpu.node_rate

    def gathering(self, size: int, stride: int, num_bytes: float) -> float:
        """Seconds of an all-gather or a reduce-scatter of `num_bytes` in all."""
        return num_bytes * (size - 1) / size / self.ring_rate(size, stride)

    # -- rollout -------------------------------------------------------------------------------------------------------

    def answers(self) -> tuple[Phase, Decoded]:
        """The slower of the replicas that can be the last."""
        room = cache_tokens(self.config, self.facts, self.gpu, self.on_cpu)
        tp, assumed = self.rollout.tensor_model_parallel_size, Efficiencies()
        found = []
        for requests in replicas(self.batch.requests, self.sides.engine // tp):
            made = decode(requests, self.rollout.max_num_seqs, max(room, 1))
            per_prompt = max(1, len(self.batch.requests[0][1]))
            prompts = [prompt for prompt, _ in requests[::per_prompt]]
            parts = [prefill_part(self.facts, self.gpu, tp, prompts)]
            parts += engine_step_parts(self.config, self.facts, self.gpu, made)
            if not self.on_cpu and not self.sides.is_split:
                parts.append(Part("sleeping and waking", 1, "sleep_s"))
            found.append((Phase.of(parts), made))
        return max(found, key=lambda one: one[0].seconds(assumed))

    def rewards(self) -> Phase:
        """Of one replica's answers, by its processes."""
        engines = self.sides.engine // self.rollout.tensor_model_parallel_size
        answers = -(-len(self.batch.requests) // engines) * len(self.batch.requests[0][1])
        count = answers / self.config.reward.num_workers
        return Phase.of([Part("scoring of answers", count, "reward_s")])

    # -- passes over micro-batches -------------------------------------------------------------------------------------

    def passes(self, groups: tuple[RowGroup, ...], forward_only: bool) -> Pass:
        """The arithmetic of the stage that has most, of all its micro-batches."""
        by_rows = 0 if self.actor.use_dynamic_bsz else (self.actor.ppo_micro_batch_size_per_gpu or 1)
        recompute, budget = recompute_of(self.config), self.actor.ppo_max_token_len_per_gpu
        chunks = self.pp * self.vpp if recompute.method == "block" else 1  # of which only `block` depends
        rows = _Rows(groups, self.facts, recompute, chunks)
        made = _pass(rows, self.tp, self.pp, self.vpp, self.dp, budget, by_rows, forward_only)
        peak = self.gpu.peak_flops
        return made._replace(compute=made.compute / peak, bubble=made.bubble / peak, last=made.last / peak)

    def pass_parts(self, made: Pass, forward_only: bool, times: float = 1.0) -> Iterator[Part]:
        """Parts of `times` such passes."""
        kernels = 1 if forward_only else PASSES_OF_LAYER[recompute_of(self.config).granularity]
        layers = self.facts.num_layers / self.pp * kernels
        count = made.microbatches + (self.pp - 1) / self.vpp
        yield Part("arithmetic", times * made.compute * (1 - made.imbalance), "update_flops")
        yield Part("waiting for the busiest rank", times * made.compute * made.imbalance, "update_flops")
        yield Part("pipeline bubble", times * made.bubble, "update_flops")
        yield Part("exchanges of TP", times * self.tp_seconds(made, forward_only), "exchange_bandwidth")
        yield Part("latency of exchanges", times * self.num_exchanges(made, forward_only), "collective_s")
        yield Part("messages of PP", times * self.pp_seconds(made, forward_only), "exchange_bandwidth")
        # Each pass reads the weights, and float32 sums of gradients are read and written.
        per_batch = self.element * kernels + 2 * GRADIENT * (not forward_only)
        traffic = per_batch * made.microbatches * self.count / self.gpu.memory_rate
        yield Part("weights and gradients per micro-batch", times * traffic, "optimizer_bandwidth")
        yield Part("layers beside arithmetic", times * layers * count, "layer_s")
        yield Part("micro-batches", times * count, "microbatch_s")

    def num_gathers(self, forward_only: bool) -> float:
        """Of all layers of a stage: forward two all-reduces of a layer's hidden states, or the gathers and scatters
        that are the same; as many backward, and under sequence parallelism its inputs once more for the gradients."""
        if self.tp == 1:
            return 0.0
        gathers = 4 if forward_only else 8 + 2 * self.megatron.sequence_parallel
        gathers += 4 * (not forward_only and recompute_of(self.config).granularity == "full")
        return gathers * self.facts.num_layers / self.pp

    def tp_seconds(self, made: Pass, forward_only: bool) -> float:
        """The bytes of `num_gathers`, at the rate of the ranks' links."""
        size = self.element * self.facts.hidden_size * made.tokens * self.num_gathers(forward_only)
        return self.gathering(self.tp, 1, size) if self.tp > 1 else 0.0

    def num_exchanges(self, made: Pass, forward_only: bool) -> float:
        """Collectives of TP (an all-reduce is two) and messages of PP, of all micro-batches."""
        messages = (1 if forward_only else 2) * self.vpp * (self.pp > 1)
        return made.microbatches * (self.num_gathers(forward_only) + messages)

    def pp_seconds(self, made: Pass, forward_only: bool) -> float:
        """A micro-batch's hidden states to the next stage, and their gradient back."""
        if self.pp == 1:
            return 0.0
        far = self.sides.policy > self.per_node
        cut = self.tp if self.megatron.sequence_parallel else 1
        size = self.element * self.facts.hidden_size * made.tokens * self.vpp * (1 if forward_only else 2) / cut
        return size / (self.gpu.network_rate if far else self.gpu.node_rate)

    # -- update --------------------------------------------------------------------------------------------------------

    def num_updates(self) -> int:
        """Optimizer steps of a rollout batch."""
        size = self.config.data.train_batch_size
        return size // (self.actor.ppo_mini_batch_size or size) * self.actor.ppo_epochs

    def mini_batch(self) -> tuple[RowGroup, ...]:
        """The rows of the first update."""
        groups, parts = self.batch.groups, self.num_updates() // self.actor.ppo_epochs
        return groups[: math.ceil(self.trained_share * len(groups) / parts)]

    def update(self) -> tuple[Phase, Pass]:
        """All optimizer steps of a batch, and the passes of one of them."""
        times = self.num_updates()
        made = self.passes(self.mini_batch(), forward_only=False)
        parts = [*self.pass_parts(made, False, times), *self.exchange_parts(made, times)]
        shard = self.count / (self.dp if self.megatron.use_distributed_optimizer else 1)
        traffic = (ADAM_TRAFFIC * shard + 2 * GRADIENT * self.count) / self.gpu.memory_rate
        parts.append(Part("Adam", times * traffic, "optimizer_bandwidth"))
        parts.append(Part("optimizer steps", times, "optimizer_step_s"))
        return Phase.of(parts), made

    def exchange_parts(self, made: Pass, times: float) -> Iterator[Part]:
        """Gradients are scattered in float32 and weights gathered, less what one micro-batch's passes hide of each."""
        if self.dp == 1:
            return
        overlap = self.megatron.overlap_grad_reduce
        overlap = not self.on_cpu if overlap is None else overlap
        assumed = Efficiencies()
        hidden = made.last / assumed.update_flops * assumed.exchange_bandwidth * overlap
        scattered = self.gathering(self.dp, self.tp, GRADIENT * self.count)
        gathered = self.gathering(self.dp, self.tp, self.element * self.count)
        if not self.megatron.use_distributed_optimizer:
            scattered, gathered = 2 * scattered, 0.0
        yield Part("exchange of gradients", times * max(0.0, scattered - 2 / 3 * hidden), "exchange_bandwidth")
        yield Part("gathering of weights", times * max(0.0, gathered - 1 / 3 * hidden), "exchange_bandwidth")

    def scoring(self) -> Phase:
        """Forward passes for the reference and, where a ratio can differ from 1 or a KL is in the reward, the old
        log-probabilities."""
        algorithm = self.config.algorithm
        ratios = self.num_updates() > 1 and self.actor.policy_loss == "ppo_clip"
        ratios &= not algorithm.rollout_correction.bypass_old_logprobs
        times = int(ratios or algorithm.use_kl_in_reward) + int(needs_reference(self.config))
        if has_critic(self.config):
            times += 1
        if not times:
            return Phase(())
        return Phase.of(self.pass_parts(self.passes(self.batch.groups, True), True, times))

    def critic(self) -> Phase:
        """The updates of PPO's critic."""
        settings = copy.copy(self.config)
        settings.actor_rollout_ref = copy.copy(self.config.actor_rollout_ref)
        settings.actor_rollout_ref.actor = critic_as_actor(self.config)
        model = Model(settings, self.facts.as_critic(), self.world_size, self.gpu, self.batch)
        return model.update()[0]

    def offloads(self) -> Phase:
        """The optimizer's state to the host and back, once each in a step."""
        moved = 0.0
        if not self.on_cpu and self.megatron.optimizer_offload:
            shards = self.dp if self.megatron.use_distributed_optimizer else 1
            moved = 2 * self.count * self.state / shards / self.gpu.host_rate
        return Phase.of([Part("copies of the optimizer", moved, "host_bandwidth")])

    # -- sync ----------------------------------------------------------------------------------------------------------

    def sync(self) -> Phase:
        """The stream of weights.buckets, and the canary."""
        element = BYTES[self.rollout.dtype or self.megatron.dtype][0]
        whole = element * num_stream_elements(self.facts)
        buckets = plan_buckets(self.facts, self.tp, self.pp, self.vpp, element, self.rollout.sync_bucket_mb * MIB)
        shares = element * sum(bucket.numel for bucket in buckets)
        stages = shares / self.ring_rate(self.pp, self.tp * self.dp) if self.pp > 1 else 0.0
        gathered = self.gathering(self.tp, 1, shares * self.tp) if self.tp > 1 else 0.0
        num_tensors = sum(len(entry.hf_names) for entry in weight_table(self.facts))
        return Phase.of(
            [
                Part("gathering of shards", gathered + stages, "exchange_bandwidth"),
                *(
                    [Part("sending to the engine", whole / self.link_rate(), "exchange_bandwidth")]
                    * self.sides.is_split
                ),
                Part("copies into the engine", COPIES * whole / self.gpu.memory_rate, "stream_bandwidth"),
                Part("tensors of the stream", num_tensors, "tensor_s"),
                *self.canary(),
            ]
        )

    def canary(self) -> Sequence[Part]:
        """Its prompts are scored and continued by the engine."""
        longest = min(CANARY_TOKENS, self.config.data.max_prompt_length)
        made = decode(((longest, NUM_GENERATED),) * NUM_CANARIES, self.rollout.max_num_seqs, 2**62)
        steps = engine_step_parts(self.config, self.facts, self.gpu, made)
        return [part._replace(name="canary") for part in steps]
