"""What a rank holds in the memory of its device, phase by phase: counted from the settings and the model's sizes.

    counted = ledger(config, facts, world_size)
    counted.phases["update"]        {"weights": 7615616512, "gradients": ..., "saved for backward": ..., ...}
    counted.peak("update")          the sum, in bytes

Phases: `update` (forward and backward), `optimizer` (its step), `sync` (weights into the engine), `canary`, `rollout`;
and `critic`, the update of PPO's critic, and `critic's optimizer`. Where the engine has ranks of its own
(trainer.placement=split) these phases are of the policy's ranks, which hold none, and `engine's sync`, `engine's
canary` and `engine's rollout` are of the others.
The rank is one of the pipeline stage that needs most; all its tensor- and data-parallel peers hold the same.

Every term says where it comes from. In the comments e is the bytes of an element, T the tokens of a micro-batch, s is
TP under sequence parallelism and else 1, and H, A, K, F are the widths of the hidden states, of all query heads, of
all key heads, and of the MLP. The moments of a backward pass were read from megatron-core 0.19.2 and Transformer
Engine 2.19, and compared with counted allocations of the same code (tests/fake_cuda/test_ledger.py).

Nothing is measured. Not counted: CUDA contexts, NCCL's buffers, what the allocator cannot use for its fragments, and
what vLLM keeps while it sleeps.
"""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from remax_megatron.config.schema import (
    Config,
    critic_as_actor,
    has_critic,
    needs_reference,
    recompute_of,
    sides_of,
)
from remax_megatron.model_facts import ModelFacts
from remax_megatron.rollout.memory import CANARY_TOKENS, NUM_CANARIES, NUM_GENERATED, canary_bytes, largest_module_bytes
from remax_megatron.weights.buckets import peak_elements, plan_buckets
from remax_megatron.weights.weight_table import EMBEDDING, owner, padded_vocab_size, shard_shape, weight_table

# Bytes of one parameter: its weight; Adam's two moments, and the fp32 master where the weight is not its own.
BYTES = {"float32": (4, 8), "bfloat16": (2, 12)}
GRADIENT = 4  # bytes, of either
ASSUMED_CARD = 80 * 10**9  # bytes, where there is no GPU to ask
MORE_CHECKPOINTS = 2  # beside max_ckpt_to_keep: the best, and the one being written
CARD_MARGIN = 0.9  # of a card; what the ledger does not count needs the rest
BESIDE_THE_UPDATE = ("rollout", "sync", "canary")  # phases in which nothing is trained
OF_THE_ENGINE = "engine's "  # begins the phases that ranks of its own have in a split run
MIB = 2**20
HEAD_TILE, HEAD_TILE_ON_CPU = 64 * MIB, 8 * MIB  # bytes of a tile of float32 logits; algorithm.logprob
CUBLAS_WORKSPACE = 32 * MIB  # Transformer Engine's, on sm90: cpp_extensions/gemm.py


@dataclass(frozen=True)
class Ledger:
    """Bytes by phase and term, of a rank of pipeline stage `stage`."""

    phases: dict[str, dict[str, int]]
    stage: int

    def peak(self, phase: str | None = None) -> int:
        """Bytes of `phase`; None: of the phase that needs most."""
        return sum(self.phases[phase or self.worst].values())

    @property
    def worst(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))


@dataclass(frozen=True)
class MicroBatch:
    """Tokens of a full micro-batch, how many of them are scored, and how many micro-batches an update has per rank."""

    tokens: int
    scored: int
    count: int


@dataclass(frozen=True)
class Stack:
    """What computes: `layers` is transformer_engine or local, `attention` a backend of model.attention, `fused_adam`
    whether Adam makes its step without temporaries."""

    layers: str
    attention: str
    fused_adam: bool
    on_cpu: bool = False


def ledger(
    config: Config,
    facts: ModelFacts,
    world_size: int,
    *,
    card: int = ASSUMED_CARD,
    on_cpu: bool = False,
    batch: MicroBatch | None = None,
    stage: int | None = None,
    stack: Stack | None = None,
    critic: ModelFacts | None = None,
) -> Ledger:
    """The ledger of `config` for a model of `facts`.

    world_size  ranks
    card        bytes of each device
    on_cpu      the ranks compute on the CPU
    batch       the micro-batches, None: those of `full_micro_batch`
    stage       the pipeline stage, None: the one that needs most
    stack       what computes, None: what is installed here
    critic      the sizes of a critic, None: those of `facts` with a value head
    """
    given, batch, stack = batch, batch or full_micro_batch(config, world_size), stack or installed_stack(config, on_cpu)
    pp = config.actor_rollout_ref.actor.megatron.pipeline_model_parallel_size
    stages = range(pp) if stage is None else (stage,)
    ranks = [_Rank(config, facts, world_size, card, batch, stack, one) for one in stages]
    for rank in ranks if has_critic(config) else ():
        settings = copy.deepcopy(config)
        settings.actor_rollout_ref.actor = critic_as_actor(config)
        of_critic = given or full_micro_batch(settings, world_size)
        rank.critic = _Rank(settings, critic or facts.as_critic(), world_size, card, of_critic, stack, rank.stage)
    return max((Ledger(rank.phases(), rank.stage) for rank in ranks), key=Ledger.peak)


def full_micro_batch(config: Config, world_size: int) -> MicroBatch:
    """A micro-batch that is filled with rows of the longest prompt and answer."""
    data, actor = config.data, config.actor_rollout_ref.actor
    n, tp_pp = config.actor_rollout_ref.rollout.n, _tp_pp(config)
    prompt, answer = data.max_prompt_length, data.max_response_length
    per_row = prompt + answer if not actor.share_prompts else prompt / n + answer
    tokens = actor.ppo_max_token_len_per_gpu
    if not actor.use_dynamic_bsz:
        tokens = int((actor.ppo_micro_batch_size_per_gpu or 1) * per_row)
    rows = (actor.ppo_mini_batch_size or data.train_batch_size) * n
    count = math.ceil(rows * per_row / tokens / max(1, sides_of(config, world_size).policy // tp_pp))
    return MicroBatch(tokens=tokens, scored=int(tokens * answer / per_row), count=max(1, count))


def installed_stack(config: Config, on_cpu: bool = False, has_te: bool | None = None) -> Stack:
    """What `config` runs on, as far as it depends on what is installed here; nothing is imported. `has_te` says whether
    Transformer Engine is on the machine of the run, None: as here."""
    megatron, actor = config.actor_rollout_ref.actor.megatron, config.actor_rollout_ref.actor
    if on_cpu:
        return Stack("local", "sdpa", fused_adam=False, on_cpu=True)
    rounded = megatron.dtype == "bfloat16"  # model.layers and model.attention keep float32 from Transformer Engine
    if has_te is None:
        has_te = importlib.util.find_spec("transformer_engine") is not None
    has_te |= megatron.layers == "transformer_engine"
    layers, attention = megatron.layers, megatron.attention_backend
    if layers == "auto":
        layers = "transformer_engine" if has_te and rounded else "local"
    if attention == "auto":
        attention = "flex" if actor.share_prompts or not rounded else "transformer_engine" if has_te else "varlen"
    return Stack(layers, attention, fused_adam=has_te or importlib.util.find_spec("apex") is not None)


@cache
def parameters(facts: ModelFacts, tp: int = 1, pp: int = 1, vpp: int = 1) -> tuple[int, ...]:
    """Parameters of a rank of each pipeline stage: padding of the vocabulary and the last one's tied head included."""
    held = [0] * pp
    for entry in weight_table(facts):
        size = math.prod(shard_shape(entry, facts, tp))
        held[owner(entry, facts.num_layers, pp, vpp)[0]] += size
        if entry.megatron_name == EMBEDDING and facts.tied_embeddings and pp > 1:
            held[-1] += size
    return tuple(held)


def disk_bytes(config: Config, facts: ModelFacts) -> tuple[int, int]:
    """Bytes on disk of all checkpoints that are kept at once, and of the exported model."""
    trainer, count = config.trainer, sum(parameters(facts))
    weight, state = BYTES[config.actor_rollout_ref.actor.megatron.dtype]
    kept = (trainer.max_ckpt_to_keep + MORE_CHECKPOINTS) * (trainer.save_freq > 0)
    return kept * count * (weight + state), count * weight * trainer.export_hf


def gb(size: float) -> str:
    """Write bytes in decimal, as graphics cards and disks are sold."""
    return f"{size / 1e9:.1f} GB" if abs(size) >= 1e9 else f"{size / 1e6:.1f} MB"


def table(made: Ledger) -> str:
    """Write the ledger in GB, a line per term and a column per phase."""
    rows = {
        name: [phase.get(name, 0) for phase in made.phases.values()] for phase in made.phases.values() for name in phase
    }
    rows["in all"] = [made.peak(phase) for phase in made.phases]
    sizes = ([name, *(f"{size / 1e9:.1f}" if size else "" for size in row)] for name, row in rows.items())
    cells = [["GB", *made.phases], *sizes]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells)


def engine_weights(config: Config, facts: ModelFacts) -> int:
    """Bytes of the engine's weights on each of its ranks."""
    rollout = config.actor_rollout_ref.rollout
    size = BYTES[rollout.dtype or config.actor_rollout_ref.actor.megatron.dtype][0]
    return sum(parameters(facts)) * size // rollout.tensor_model_parallel_size


def _tp_pp(config: Config) -> int:
    megatron = config.actor_rollout_ref.actor.megatron
    return megatron.tensor_model_parallel_size * megatron.pipeline_model_parallel_size


class _Rank:
    """One rank: the sizes that the terms are made of, and the terms. The arguments are those of `ledger`."""

    def __init__(
        self,
        config: Config,
        facts: ModelFacts,
        world_size: int,
        card: int,
        batch: MicroBatch,
        stack: Stack,
        stage: int,
    ) -> None:
        megatron = config.actor_rollout_ref.actor.megatron
        self.config, self.facts, self.megatron, self.batch, self.stack = config, facts, megatron, batch, stack
        self.rollout = config.actor_rollout_ref.rollout
        self.card, self.stage = card, stage
        self.sides = sides_of(config, world_size)
        self.tp, self.pp = megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size
        self.vpp = megatron.virtual_pipeline_model_parallel_size or 1
        self.count = parameters(facts, self.tp, self.pp, self.vpp)[stage]
        self.dp = self.sides.policy // (self.tp * self.pp)
        self.shards = self.dp if megatron.use_distributed_optimizer else 1
        self.element = BYTES[megatron.dtype][0]
        self.cut = self.tp if megatron.sequence_parallel else 1  # s
        self.has_te = stack.layers == "transformer_engine"
        self.recompute = recompute_of(config)
        self.critic: _Rank | None = None

    # -- phases ----------------------------------------------------------------------------------------------------

    def phases(self) -> dict[str, dict[str, int]]:
        held, away = self.held(), self.offloaded()
        share = {} if self.sides.is_split else {"engine": self.engine()}
        waits = {name: size - away.get(name, 0) for name, size in held.items()} | share
        made = {
            "update": {name: size for name, size in held.items() if not self.comes_back_late(name)} | self.passes(),
            "optimizer": held | self.adam_step(),
            **self.beside_the_engine(waits),
        }
        if self.critic is not None:
            critic_waits = self.critic.model_terms(waiting=True)
            made = {phase: terms | critic_waits for phase, terms in made.items()}
            policy = {name: size for name, size in waits.items() if name not in share} | self.critic.model_terms()
            late = {f"critic's {name}" for name in self.critic.held() if self.critic.comes_back_late(name)}
            made["critic"] = {name: size for name, size in policy.items() if name not in late} | self.critic.passes()
            made["critic's optimizer"] = policy | self.critic.adam_step()
        if self.sides.is_split:
            made |= self.of_the_engine()
        return {phase: {name: size for name, size in terms.items() if size} for phase, terms in made.items()}

    def beside_the_engine(self, waits: dict[str, int]) -> dict[str, dict[str, int]]:
        """Phases in which the policy waits, with what it holds meanwhile, while the engine takes weights, is compared
        and answers; on ranks of their own the policy's send the weights, of which two buckets are on their way."""
        if self.sides.is_split:
            sending = {"buckets": 2 * self.buckets()}
            return {"sync": waits | sending, "canary": waits | self.scoring(), "rollout": waits}
        logits, scoring = self.logits(), self.scoring()
        return {
            "sync": waits | {"buckets": self.buckets(), **self.module()},
            "canary": waits | max(logits, scoring, key=lambda terms: sum(terms.values())),
            "rollout": waits,
        }

    def of_the_engine(self) -> dict[str, dict[str, int]]:
        """Phases of a rank that holds the engine alone; two buckets of weights are there at once."""
        share = {"engine": self.engine()}
        return {
            f"{OF_THE_ENGINE}sync": share | {"buckets": 2 * self.buckets(), **self.module()},
            f"{OF_THE_ENGINE}canary": share | self.logits(),
            f"{OF_THE_ENGINE}rollout": share,
        }

    def model_terms(self, waiting: bool = False) -> dict[str, int]:
        """A critic's own of `held`, by names of its own; `waiting`: while neither it nor the policy is updated."""
        held, away = self.held(), self.offloaded() if waiting else {}
        own = ("weights", "gradients", "optimizer")
        return {f"critic's {name}": held[name] - away.get(name, 0) for name in own}

    def held(self) -> dict[str, int]:
        """What lies there from the first update on."""
        weight, state = BYTES[self.megatron.dtype]
        on_device = self.stack.on_cpu or not self.config.actor_rollout_ref.ref.megatron.param_offload
        return {
            "weights": self.count * weight,
            "gradients": self.count * GRADIENT,  # DistributedDataParallel's float32 buffer
            "optimizer": self.count * state // self.shards,
            "reference": self.count * weight * (needs_reference(self.config) and on_device),
            "kept buffers": self.kept_buffers(),
        }

    def offloaded(self) -> dict[str, int]:
        """Of `held`, what is not there during rollouts: gradients are dropped, the optimizer waits in host memory."""
        held = self.held()
        moves = not self.stack.on_cpu
        return {
            "weights": held["weights"] * (moves and self.facts.value_head and self.megatron.param_offload),
            "gradients": held["gradients"] * (moves and self.megatron.grad_offload),
            "optimizer": held["optimizer"] * (moves and self.megatron.optimizer_offload),
        }

    def comes_back_late(self, name: str) -> bool:
        """Whether a term of `held` is on the host until the optimizer's step: where each rollout has one update."""
        actor, batch_size = self.config.actor_rollout_ref.actor, self.config.data.train_batch_size
        one_update = (actor.ppo_mini_batch_size or batch_size) == batch_size and actor.ppo_epochs == 1
        return name == "optimizer" and self.offloaded()[name] > 0 and one_update

    def kept_buffers(self) -> int:
        """What Megatron or Transformer Engine makes in the first update and never frees."""
        hidden, ffn, attention, keys = self.widths()
        if self.has_te:  # one dummy gradient for each shape of a weight, module/base.py: get_dummy_wgrad
            shapes = hidden * (2 * attention + 2 * keys + 3 * ffn)
            return self.element * shapes // self.tp + CUBLAS_WORKSPACE
        # The gathered input of a column-parallel layer: megatron.core.utils.GlobalMemoryBuffer.
        return self.element * hidden * self.batch.tokens if self.cut > 1 else 0

    def adam_step(self) -> dict[str, int]:
        """torch's foreach AdamW makes sqrt(second moment) of all parameters at once; the fused ones make nothing."""
        copies = 0 if self.stack.fused_adam else self.count * 4 // self.shards
        return {"temporaries of Adam": copies}

    def engine(self) -> int:
        """vLLM's share; its weights lie in it."""
        if self.stack.on_cpu:
            return engine_weights(self.config, self.facts) + int(self.rollout.kv_cache_gib * 2**30)
        return int(self.rollout.gpu_memory_utilization * self.card)

    def buckets(self) -> int:
        """Of the weight stream (weights.buckets, which it sends)."""
        element = BYTES[self.rollout.dtype or self.megatron.dtype][0]
        bucket_bytes = self.rollout.sync_bucket_mb * MIB
        planned = plan_buckets(self.facts, self.tp, self.pp, self.vpp, element, bucket_bytes)
        return element * peak_elements(planned, self.tp, self.pp)

    def module(self) -> dict[str, int]:
        """The module that vLLM builds anew from the weights before it replaces the old one."""
        element = BYTES[self.rollout.dtype or self.megatron.dtype][0]
        tp = self.rollout.tensor_model_parallel_size
        return {"module of the engine": largest_module_bytes(self.facts, tp, element)}

    def logits(self) -> dict[str, int]:
        """vLLM makes the log-probabilities of a whole prompt of the canary at once, beside what it has set aside."""
        return {"logits of the canary": canary_bytes(self.facts, self.config.data.max_prompt_length)}

    def scoring(self) -> dict[str, int]:
        """The policy scores the canary's prompts and continuations of all replicas: a layer's MLP, its norms and the
        residual stream."""
        longest = min(CANARY_TOKENS, self.config.data.max_prompt_length)
        replicas = max(1, self.sides.engine // self.rollout.tensor_model_parallel_size)
        rows = -(-NUM_CANARIES * replicas // self.dp)
        tokens = min(rows * (longest + NUM_GENERATED), self.batch.tokens)
        tokens //= self.pp if self.vpp > 1 else 1  # so many micro-batches at least
        whole = self.element * self.facts.hidden_size * (self.cut > 1)  # before a row-parallel layer scatters it
        return {"scoring of the canary": tokens * (self.mlp() + 4 * self.stream() + whole)}

    # -- forward and backward --------------------------------------------------------------------------------------

    def widths(self) -> tuple[int, int, int, int]:
        """H, F, A, K."""
        facts = self.facts
        heads, groups = facts.num_attention_heads, facts.num_key_value_heads
        return facts.hidden_size, facts.ffn_hidden_size, heads * facts.head_dim, groups * facts.head_dim

    def passes(self) -> dict[str, int]:
        """The moment of forward and backward that needs most: what is saved for the backward pass, and what is made."""
        # A pipeline's messages: one comes or goes while a layer is computed, and two where they overlap with it.
        messages = (0 if self.pp == 1 else 1 if self.vpp == 1 else 2) * self.batch.tokens * self.stream()
        moments = ({"saved for backward": saved, name: made} for name, saved, made in self.moments())
        return max(moments, key=lambda terms: sum(terms.values())) | {"messages": messages}

    def saved(self) -> int:
        """Of a micro-batch, in a chunk of the model: by its layers, and its input (an embedding or a message)."""
        layers = self.facts.num_layers // (self.pp * self.vpp)
        recompute, inputs = self.recompute, 0
        if recompute.granularity == "full":
            inputs = min(layers, recompute.num_layers)
            if recompute.method == "uniform":
                inputs, layers = math.ceil(layers / recompute.num_layers), 0
        whole = max(layers - inputs, 0) * (self.layer() - self.recomputed())
        return self.batch.tokens * (whole + (inputs + 1) * self.stream() + self.rotation())

    def rotation(self) -> int:
        """Bytes of a token's cosines and sines, which all layers share; Transformer Engine's kernel takes none."""
        fused = "transformer_engine" in (self.stack.layers, self.stack.attention)
        return 0 if fused else 2 * self.element * self.facts.head_dim

    def stream(self) -> int:
        """Bytes of a token's hidden state between two layers."""
        return self.element * self.facts.hidden_size // self.cut

    def in_flight(self) -> int:
        """Micro-batches whose forward pass is done and whose backward pass is not, counted in chunks: 1F1B fills the
        stages behind this one; interleaved, Megatron's schedule has twice that and a round of every other chunk."""
        if self.vpp == 1:
            return min(self.pp - self.stage, self.batch.count)
        warmup = 2 * (self.pp - self.stage - 1) + (self.vpp - 1) * self.pp
        return min(warmup + 1, self.batch.count * self.vpp)

    def layer(self) -> int:
        """Bytes per token that a layer saves: input and middle of the residual stream and both norms' outputs 4eH/s,
        attention, and of the MLP its two halves and their product 3eF/TP."""
        return 4 * self.stream() + self.attention() + self.mlp()

    def mlp(self) -> int:
        """3eF/TP; 5 where SwiGLU is not one kernel (Megatron fuses it on a GPU)."""
        return (5 if self.stack.on_cpu else 3) * self.element * self.facts.ffn_hidden_size // self.tp

    def attention(self) -> int:
        """Queries, keys, values and the result, and the log of the softmax's sum in float32. Norms of queries and keys
        save what comes in, torch's also what goes out, and a float32 number per head."""
        _, _, queries, keys = self.widths()
        heads, queries = self.facts.num_attention_heads // self.tp, queries // self.tp
        keys = max(keys // self.tp, self.facts.head_dim)  # a rank has one group at least
        width = {
            "transformer_engine": 2 * queries + 2 * keys,
            "varlen": 4 * queries,  # keys and values are repeated for every head of their group
        }.get(self.stack.attention, 3 * queries + 3 * keys)  # values lie in the product of linear_qkv, which stays
        if self.facts.family.qk_norm:
            width += (1 if self.has_te else 2) * (queries + keys)
            heads += heads + keys // self.facts.head_dim
        return self.element * width + 4 * heads

    def recomputed(self) -> int:
        """Bytes per token and layer that selective recompute does not save."""
        if self.recompute.granularity != "selective":
            return 0
        size = 0
        if "mlp" in self.recompute.modules:  # with Transformer Engine the norm is in its first linear
            size += self.mlp() + self.has_te * self.stream()
        if "core_attn" in self.recompute.modules:
            size += self.element * self.widths()[2] // self.tp + 4 * self.facts.num_attention_heads // self.tp
        return size

    def moments(self) -> Iterator[tuple[str, int, int]]:
        """(name, bytes that are saved, bytes that are made) of moments of the backward pass."""
        saved, in_flight = self.saved(), self.in_flight()
        # Autograd holds the gradient of a weight with two uses until it has both.
        waiting = self.vocabulary() * (self.facts.tied_embeddings and self.pp == 1)
        yield "backward of a layer", in_flight * saved, self.batch.tokens * self.layer_backward() + waiting
        if self.stage == self.pp - 1:
            yield "head", in_flight * saved, self.head()
        if self.stage == 0:  # after all layers of this micro-batch
            yield "gradient of the embedding", (in_flight - 1) * saved, self.vocabulary() + waiting

    def layer_backward(self) -> int:
        """Bytes per token while an MLP goes backward; its attention needs less. The gradient that comes in eH/s; then
        either the second linear's gradient eF/TP and, under sequence parallelism, the gathered one that it is made
        from, eH; or SwiGLU's: what came in eF/TP and what goes out 2eF/TP, less its result eF/TP."""
        element, hidden = self.element, self.facts.hidden_size
        ffn = element * self.facts.ffn_hidden_size // self.tp
        size = self.stream() + max(ffn + element * hidden * (self.cut > 1), 2 * ffn)
        if self.recompute.granularity == "full":  # what was computed again: all that a layer saves
            return size + self.layer() * self.layers_at_once()
        if self.recompute.granularity == "selective" and "mlp" in self.recompute.modules:
            return size + self.mlp() + self.stream() * (1 + self.has_te)
        return size

    def layers_at_once(self) -> int:
        """Layers that are computed again together."""
        return self.recompute.num_layers if self.recompute.method == "uniform" else 1

    def vocabulary(self) -> int:
        """Bytes of a rank's rows of the embedding or of the head."""
        return self.element * self.facts.hidden_size * padded_vocab_size(self.facts.vocab_size, self.tp) // self.tp

    def head(self) -> int:
        """algorithm.logprob, backward: hidden states of the scored positions and their float32 gradient, the gradient
        of the head and float32 sums of some of its rows, and a tile: its logits and their gradient."""
        hidden, scored = self.facts.hidden_size, self.batch.scored
        if self.facts.value_head:
            return scored * hidden * (self.element + 4)
        height = max(1, min(self.megatron.logprob_chunk_size, scored))
        tile = HEAD_TILE_ON_CPU if self.stack.on_cpu else HEAD_TILE
        rows = padded_vocab_size(self.facts.vocab_size, self.tp) // self.tp
        width = min(max(tile // (4 * max(height, 1024)), 128), rows)
        tile = height * width * (4 + self.element)
        return scored * hidden * (self.element + 4) + self.vocabulary() + 4 * width * hidden + tile
