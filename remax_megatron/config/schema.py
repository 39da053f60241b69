"""Every setting: its name, type, default, and the facts that `config.setting` declares; docs/settings.md shows them.

The names are those of the guide that most users come from (verl's keys). Presets in `conf/` fill these in;
`remax_megatron.config.load` reads them, `remax_megatron.config.rules` checks them. After loading, aliases are moved to
the settings they stand for, `trainer.logger` is a list of names and `~` in paths is expanded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import MISSING

from remax_megatron.algorithm.aggregation import MODES as AGGREGATION_MODES
from remax_megatron.algorithm.bounds import Bounds, read_bounds, rejection_bounds
from remax_megatron.algorithm.estimators import NAMES as ESTIMATORS
from remax_megatron.algorithm.estimators import Estimator, get_estimator
from remax_megatron.algorithm.names import (
    IMPORTANCE_LEVELS,
    KL_CONTROLLERS,
    KL_KINDS,
    KL_REWARD_MODES,
    POLICY_LOSSES,
    REJECTION_DENOMINATORS,
    REJECTIONS,
)
from remax_megatron.config.setting import (
    ABOVE_1,
    BELOW_1,
    MAY_CHANGE,
    MUST_MATCH,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_BELOW_1,
    POSITIVE_OR_ALL,
    POSITIVE_OR_NONE,
    POSITIVE_OR_UNLIMITED,
    POSITIVE_SHARE,
    SHARE,
    group,
    setting,
    settings_of,
)
from remax_megatron.errors import UserError
from remax_megatron.types import CUT_ANSWERS, Recompute

LOGGERS = ("console", "wandb", "tensorboard")
DTYPES = ("bfloat16", "float32")
LR_DECAY_STYLES = ("constant", "linear", "cosine")
RECOMPUTE_MODULES = ("mlp", "core_attn", "layernorm")

ACTOR = "actor_rollout_ref.actor"
MEGATRON = "actor_rollout_ref.actor.megatron"
ROLLOUT = "actor_rollout_ref.rollout"
CRITIC = "critic"
CRITIC_MEGATRON = "critic.megatron"


class ConfigError(UserError):
    """A setting that the user has to change: the message names it, its value, the limit, and what to set instead."""


@dataclass
class Data:
    """Prompts: where they lie, how many make a batch, how long they and their answers may be."""

    train_files: Any = setting(
        MISSING,
        path=True,
        example="DIR/train.parquet",
        on_resume=MAY_CHANGE,  # the prompts themselves are compared
        help="Training prompts: a path or a list of paths of .parquet, .json or .jsonl files, of folders of them, or "
        "patterns as DIR/part-*.parquet. A resumed run compares the prompts themselves, so that files may move.",
    )
    val_files: Any = setting(
        None, path=True, on_resume=MAY_CHANGE, help="Validation prompts, as train_files; null: there is no validation."
    )
    train_batch_size: int = setting(1024, limits=POSITIVE, help="Prompts per rollout batch.")
    val_batch_size: int | None = setting(
        None,
        limits=POSITIVE,
        on_resume=MAY_CHANGE,
        help="Prompts per validation call of the engine; null: all of them at once.",
    )
    val_max_samples: int = setting(
        -1,
        limits=POSITIVE_OR_ALL,
        on_resume=MAY_CHANGE,
        help="Validation prompts that are used, the first ones of each data source; -1: all of them.",
    )
    max_prompt_length: int = setting(
        512, limits=POSITIVE, help="Longest prompt in tokens, with the chat template applied."
    )
    max_response_length: int = setting(1024, limits=POSITIVE, help="Longest answer in tokens.")
    train_max_samples: int = setting(
        -1,
        limits=POSITIVE_OR_ALL,
        help="Training prompts that are used, the first ones of each data source; -1: all of them.",
    )
    filter_overlong_prompts: bool = setting(True, help="Leaves out prompts above max_prompt_length.")
    truncation: str = setting(
        "error",
        choices=("error", "left", "right"),
        help="What happens to a longer prompt that was not filtered: an error, or tokens are cut off that end.",
    )
    shuffle: bool = setting(True, help="Draws a new order of the prompts for each epoch from trainer.seed.")
    prompt_key: str = setting("prompt", help="The column of the data files that holds the prompt.")
    continue_final_message: bool = setting(
        False, help="Lets the model write on where a prompt ends in a turn of the assistant, instead of a new turn."
    )
    apply_chat_template_kwargs: dict[str, Any] | None = setting(
        None, mapping=True, help="Arguments of the chat template, by name, as enable_thinking; null: none."
    )


@dataclass
class Model:
    """The model to train."""

    path: str = setting(
        MISSING,
        path=True,
        example="FOLDER",
        help="Hugging Face folder, converted Megatron folder, or hub id.",
    )
    custom_chat_template: str | None = setting(
        None,
        help="A chat template in place of the model's own: its text, or a .jinja file; null: the model's own, which is "
        "what an exported model keeps in either case.",
    )
    use_remove_padding: bool = setting(True, help="Micro-batches are always packed without padding: True is needed.")
    enable_gradient_checkpointing: bool = setting(
        False,
        on_resume=MAY_CHANGE,
        help="Computes all activations again in the backward pass, unless override_transformer_config says otherwise.",
    )
    trust_remote_code: bool = setting(False, help="Code from a model folder is never executed: False is needed.")


@dataclass
class Optim:
    """Adam and its learning rate."""

    lr: float = setting(1e-6, limits=POSITIVE, help="Learning rate after the warmup, from which it may decay.")
    lr_warmup_steps: int = setting(
        0,
        limits=POSITIVE_OR_NONE,
        help="Optimizer steps in which the learning rate rises linearly to lr; -1 or 0: as lr_warmup_steps_ratio says.",
    )
    lr_warmup_steps_ratio: float = setting(
        0.0, limits=BELOW_1, why="0 for none", help="The warmup as a share of lr_decay_steps."
    )
    lr_decay_style: str = setting(
        "constant",
        choices=LR_DECAY_STYLES,
        help="How the learning rate falls after the warmup: not at all, along a line, or along half a cosine.",
    )
    lr_decay_steps: int | None = setting(
        None,
        limits=POSITIVE,
        help="Optimizer steps, with the warmup, after which it is min_lr; null: those of the whole run, and of a "
        "resumed run that is made longer, those of the longer one.",
    )
    min_lr: float = setting(0.0, limits=NOT_NEGATIVE, help="The learning rate at the end of a decay.")
    weight_decay: float = setting(
        0.01, limits=NOT_NEGATIVE, help="Decoupled weight decay of matrices; norms and biases have none."
    )
    beta1: float = setting(0.9, limits=BELOW_1, why="the default is 0.9", help="Decay of Adam's mean of gradients.")
    beta2: float = setting(
        0.999, limits=BELOW_1, why="the default is 0.999", help="Decay of Adam's mean of squared gradients."
    )
    eps: float = setting(1e-8, limits=POSITIVE, help="Added to Adam's denominator.")
    clip_grad: float = setting(
        1.0, limits=NOT_NEGATIVE, help="Largest norm of the whole gradient, which is scaled down to it; 0: not clipped."
    )


@dataclass
class OverrideTransformerConfig:
    """What is recomputed in the backward pass, under the names of verl and Megatron."""

    recompute_granularity: str | None = setting(
        None,
        choices=(None, "none", "selective", "full"),
        why="null leaves it to actor_rollout_ref.model.enable_gradient_checkpointing",
        help="Which activations are computed again: those of whole layers, or those of recompute_modules.",
    )
    recompute_method: str | None = setting(
        None, choices=(None, "uniform", "block"), help="How layers are grouped, with full only; null: uniform."
    )
    recompute_num_layers: int | None = setting(
        None,
        limits=POSITIVE,
        help="With full only: layers per group (uniform), or layers per pipeline rank (block); null: 1.",
    )
    recompute_modules: Any = setting(
        None, help=f"A list of {', '.join(RECOMPUTE_MODULES)}, with selective only; null: [mlp]."
    )


@dataclass
class Megatron:
    """How the policy is laid out on the ranks and computed."""

    tensor_model_parallel_size: int = setting(
        1, limits=POSITIVE, help="Ranks between which each layer's matrices are cut (TP)."
    )
    pipeline_model_parallel_size: int = setting(
        1, limits=POSITIVE, help="Ranks between which the layers are divided (PP)."
    )
    virtual_pipeline_model_parallel_size: int | None = setting(
        None, limits=POSITIVE, help="Chunks of layers per pipeline rank, which run interleaved; null: one."
    )
    context_parallel_size: int = setting(1, limits=POSITIVE, help="Context parallelism is not offered: 1 is needed.")
    sequence_parallel: bool = setting(
        False, help="Cuts activations between the TP ranks where layers allow it; it has no effect at TP 1."
    )
    use_distributed_optimizer: bool = setting(
        True, help="Each data-parallel rank keeps its share of Adam's state instead of all of it."
    )
    param_offload: bool = setting(
        False, help="Has no effect: the policy's weights stay beside the engine, for the check of every weight sync."
    )
    grad_offload: bool = setting(False, help="GPU: frees the gradients' memory during rollouts.")
    optimizer_offload: bool = setting(
        False, help="GPU: moves master weights and Adam's state to host memory between updates."
    )
    dtype: str = setting(
        "bfloat16",
        choices=DTYPES,
        on_resume=MUST_MATCH,
        help="Type of the weights; bfloat16 has float32 master weights.",
    )
    layers: str = setting(
        "auto",
        choices=("auto", "transformer_engine", "local"),
        help="Whose layers are used; auto: Transformer Engine's on a GPU where it is installed.",
    )
    overlap_grad_reduce: bool | None = setting(
        None, help="Reduces gradients during the backward pass; null: on a GPU with more than one data-parallel rank."
    )
    overlap_param_gather: bool | None = setting(
        None, help="Gathers updated weights during the next forward pass; null: as overlap_grad_reduce."
    )
    override_transformer_config: OverrideTransformerConfig = group(OverrideTransformerConfig)
    attention_backend: str = setting(
        "auto",
        choices=("auto", "transformer_engine", "varlen", "flex", "sdpa"),
        help="What computes attention; auto takes the best one that the device has.",
    )
    logprob_chunk_size: int = setting(1024, limits=POSITIVE, help="Scored positions whose logits exist at once.")


@dataclass
class FsdpConfig:
    """Aliases for users of FSDP presets, which are moved to the megatron keys with a note."""

    param_offload: bool | None = setting(
        None, alias_of=f"{MEGATRON}.param_offload", help="Alias, for users of FSDP presets."
    )
    optimizer_offload: bool | None = setting(
        None, alias_of=f"{MEGATRON}.optimizer_offload", help="Alias, for users of FSDP presets."
    )


@dataclass
class RefFsdpConfig:
    """Alias for users of FSDP presets, which is moved to ref.megatron with a note."""

    param_offload: bool | None = setting(
        None, alias_of="actor_rollout_ref.ref.megatron.param_offload", help="Alias, for users of FSDP presets."
    )


@dataclass
class Actor:
    """The policy's update."""

    strategy: str = setting(
        "megatron",
        choices=("megatron",),
        why="the policy is always Megatron-Core; fsdp_config offload keys are mapped onto it",
        help="What trains the policy.",
    )
    optim: Optim = group(Optim)
    ppo_mini_batch_size: int | None = setting(
        None, limits=POSITIVE, help="Prompts per optimizer step; null: train_batch_size, one update per batch."
    )
    ppo_epochs: int = setting(1, limits=POSITIVE, help="How often a batch is passed over.")
    use_dynamic_bsz: bool = setting(
        True, on_resume=MAY_CHANGE, help="Fills micro-batches up to a number of tokens; False: by a number of rows."
    )
    ppo_max_token_len_per_gpu: int = setting(
        16384, limits=POSITIVE, on_resume=MAY_CHANGE, help="Most tokens in one micro-batch, with use_dynamic_bsz=True."
    )
    ppo_micro_batch_size_per_gpu: int | None = setting(
        None, limits=POSITIVE, on_resume=MAY_CHANGE, help="Rows per micro-batch, with use_dynamic_bsz=False."
    )
    clip_ratio: float = setting(
        0.2,
        limits=POSITIVE_BELOW_1,
        why="the ratio is clipped at 1 - it; the default is 0.2",
        help="PPO's clip range: the ratio is held between 1 - it and 1 + it.",
    )
    clip_ratio_low: float | None = setting(
        None,
        limits=POSITIVE_BELOW_1,
        why="the ratio is clipped at 1 - it; the default is 0.2",
        help="Clip range below 1; null: clip_ratio.",
    )
    clip_ratio_high: float | None = setting(None, limits=POSITIVE, help="Clip range above 1; null: clip_ratio.")
    clip_ratio_c: float = setting(
        3.0,
        limits=ABOVE_1,
        why="dual clip; the default is 3.0",
        help="Dual clip: the largest ratio that counts where the advantage is negative (arXiv 1912.09729).",
    )
    policy_loss: str = setting("ppo_clip", choices=POLICY_LOSSES, help="The loss of a token; see docs/algorithm.md.")
    loss_agg_mode: str = setting(
        "token-mean", choices=AGGREGATION_MODES, help="How the losses of tokens are averaged; see docs/algorithm.md."
    )
    skip_zero_advantage: bool | None = setting(
        None, help="Leaves rows without gradient out of all passes; null: where that is exact."
    )
    share_prompts: bool = setting(
        False, on_resume=MAY_CHANGE, help="Computes a prompt once for all its answers in a micro-batch."
    )
    entropy_coeff: float = setting(0.0, limits=NOT_NEGATIVE, help="Weight of the entropy in the loss.")
    use_kl_loss: bool = setting(False, help="Adds the KL to the reference policy to the loss.")
    kl_loss_coef: float = setting(0.001, limits=NOT_NEGATIVE, help="Weight of the KL in the loss.")
    kl_loss_type: str = setting(
        "low_var_kl", choices=KL_KINDS, help="How the KL in the loss is estimated; see docs/algorithm.md."
    )
    megatron: Megatron = group(Megatron, on_resume=MAY_CHANGE)
    fsdp_config: FsdpConfig = group(FsdpConfig, on_resume=MAY_CHANGE)


@dataclass
class RefMegatron:
    """The reference policy has the policy's layout."""

    param_offload: bool = setting(False, help="Keeps the reference policy's weights in host memory between uses.")


@dataclass
class Ref:
    """The reference policy, which exists where a KL is used."""

    megatron: RefMegatron = group(RefMegatron)
    fsdp_config: RefFsdpConfig = group(RefFsdpConfig)


@dataclass
class ValKwargs:
    """How validation answers are made: greedy, or n sampled ones per prompt."""

    n: int = setting(1, limits=POSITIVE, help="Answers per prompt.")
    do_sample: bool = setting(False, help="Samples the answers; False: greedy.")
    temperature: float = setting(1.0, help="Temperature of sampled answers, 0.01 to 2.")
    top_p: float = setting(
        1.0, limits=POSITIVE_SHARE, help="Share of the probability that sampled answers are drawn from."
    )
    top_k: int = setting(
        -1, limits=POSITIVE_OR_UNLIMITED, help="Likeliest tokens that sampled answers are drawn from; -1 or 0: all."
    )


@dataclass
class RolloutConfig:
    """The engine, and how it answers the training prompts."""

    name: str = setting(
        "vllm",
        choices=("vllm",),
        why="rollouts are always generated by vLLM",
        help="The engine that writes the answers.",
    )
    tensor_model_parallel_size: int = setting(
        1, limits=POSITIVE, on_resume=MAY_CHANGE, help="Ranks between which the engine's matrices are cut."
    )
    num_ranks: int | None = setting(
        None,
        limits=POSITIVE,
        on_resume=MAY_CHANGE,
        help="With trainer.placement=split: how many ranks, the last ones, hold the engine and nothing else; null: "
        "half of them.",
    )
    ahead: int = setting(
        0,
        choices=(0, 1),
        help="With trainer.placement=split: 1 has the answers of the next step written while this one trains, by "
        "weights that are one step older; see docs/running.md.",
    )
    gpu_memory_utilization: float = setting(
        0.6,
        limits=POSITIVE_SHARE,
        why="it is vLLM's share of GPU memory",
        on_resume=MAY_CHANGE,
        help="GPU: the engine's share of the memory.",
    )
    n: int = setting(1, limits=POSITIVE, help="Sampled answers per prompt; the greedy one of ReMax comes on top.")
    temperature: float = setting(1.0, help="Temperature of sampled answers, 0.01 to 2.")
    top_p: float = setting(1.0, help="Sampling is from the whole distribution: 1.0 is needed.")
    top_k: int = setting(-1, help="Sampling is from the whole distribution: -1 or 0 is needed.")
    dtype: str | None = setting(
        None, choices=(None, *DTYPES), why="null takes the policy's dtype", help="Type of the engine's weights."
    )
    max_num_seqs: int = setting(
        256, limits=POSITIVE, on_resume=MAY_CHANGE, help="Answers that an engine replica writes at once, at most."
    )
    max_num_batched_tokens: int = setting(
        8192, limits=POSITIVE, on_resume=MAY_CHANGE, help="Tokens in one step of the engine, at most."
    )
    kv_cache_gib: float = setting(1.0, limits=POSITIVE, on_resume=MAY_CHANGE, help="CPU: the KV cache per rank in GiB.")
    enforce_eager: bool = setting(False, on_resume=MAY_CHANGE, help="GPU: runs the engine without CUDA graphs.")
    model_runner: str = setting(
        "v1", choices=("v1", "v2"), help="GPU: vLLM's model runner; v2 draws other tokens from the same seeds."
    )
    sync_bucket_mb: int = setting(
        1024,
        limits=POSITIVE,
        on_resume=MAY_CHANGE,
        help="MiB of weights that are gathered at once in a weight sync; twice that is held at most.",
    )
    canary_threshold: float | None = setting(
        None,
        limits=POSITIVE,
        on_resume=MAY_CHANGE,
        help="Largest difference of log-probabilities between engine and policy after a weight sync, in nats; null: "
        "1e-4 (maximum, float32) or 2e-2 (mean, bfloat16).",
    )
    mismatch_threshold: float | None = setting(
        None,
        limits=POSITIVE,
        on_resume=MAY_CHANGE,
        help="Largest mean difference of log-probabilities over a batch, in nats; null: 1e-3 (float32) or 0.2 "
        "(bfloat16).",
    )
    val_kwargs: ValKwargs = group(ValKwargs, on_resume=MAY_CHANGE)


@dataclass
class ActorRolloutRef:
    """The policy, the engine and the reference policy."""

    model: Model = group(Model)
    actor: Actor = group(Actor)
    ref: Ref = group(Ref, on_resume=MAY_CHANGE)
    rollout: RolloutConfig = group(RolloutConfig)


@dataclass
class CriticModel:
    """The model that becomes the critic."""

    path: str | None = setting(
        None,
        path=True,
        help="A causal language model, whose value head starts at 0, or a folder of a ...ForTokenClassification with "
        "one label, as an exported critic is; null: actor_rollout_ref.model.path.",
    )


@dataclass
class CriticOptim(Optim):
    """Adam and its learning rate, for the critic."""

    lr: float = setting(1e-5, limits=POSITIVE, help="Learning rate after the warmup, from which it may decay.")


@dataclass
class CriticMegatron:
    """The critic has the policy's layout; where it lies and how it is computed may differ."""

    tensor_model_parallel_size: int | None = setting(None, limits=POSITIVE, help="The policy's, which null stands for.")
    pipeline_model_parallel_size: int | None = setting(
        None, limits=POSITIVE, help="The policy's, which null stands for."
    )
    virtual_pipeline_model_parallel_size: int | None = setting(
        None, limits=POSITIVE, help="The policy's, which null stands for."
    )
    sequence_parallel: bool | None = setting(
        None, help="Cuts activations between the TP ranks where layers allow it; null: as the actor."
    )
    use_distributed_optimizer: bool | None = setting(
        None, help="Each data-parallel rank keeps its share of Adam's state instead of all of it; null: as the actor."
    )
    param_offload: bool | None = setting(
        None, help="GPU: moves the critic's weights to host memory during rollouts; null: as the actor's setting says."
    )
    grad_offload: bool | None = setting(
        None, help="GPU: frees the gradients' memory during rollouts; null: as the actor."
    )
    optimizer_offload: bool | None = setting(
        None,
        help="GPU: moves master weights and Adam's state to host memory between updates; null: as the actor.",
    )


@dataclass
class Critic:
    """PPO's critic, with algorithm.adv_estimator=gae; where nothing stands here it is trained as the actor is."""

    model: CriticModel = group(CriticModel)
    optim: CriticOptim = group(CriticOptim)
    ppo_mini_batch_size: int | None = setting(
        None, limits=POSITIVE, help="Prompts per optimizer step of the critic; null: as the actor."
    )
    ppo_epochs: int | None = setting(
        None, limits=POSITIVE, help="How often a batch is passed over; null: as the actor."
    )
    cliprange_value: float = setting(
        0.5, limits=POSITIVE, help="How far a value may move from the one before the update."
    )
    loss_agg_mode: str = setting(
        "token-mean", choices=AGGREGATION_MODES, help="How the losses of tokens are averaged; see docs/algorithm.md."
    )
    ppo_max_token_len_per_gpu: int | None = setting(
        None, limits=POSITIVE, on_resume=MAY_CHANGE, help="Most tokens in one micro-batch; null: as the actor."
    )
    ppo_micro_batch_size_per_gpu: int | None = setting(
        None, limits=POSITIVE, on_resume=MAY_CHANGE, help="Rows per micro-batch; null: as the actor."
    )
    megatron: CriticMegatron = group(CriticMegatron, on_resume=MAY_CHANGE)


@dataclass
class KlCtrl:
    """The coefficient of the KL in the reward."""

    type: str = setting("fixed", choices=KL_CONTROLLERS, help="Whether the coefficient stays, or follows target_kl.")
    kl_coef: float = setting(0.001, limits=NOT_NEGATIVE, help="The coefficient, at the start where it is adaptive.")
    horizon: int = setting(
        10000, limits=POSITIVE, help="Answers in which an adaptive coefficient moves by 20 % at most."
    )
    target_kl: float = setting(0.1, limits=POSITIVE, help="What an adaptive coefficient aims at, in nats per token.")


@dataclass
class RolloutCorrection:
    """Importance weights and rejection for the mismatch between engine and trainer; see docs/algorithm.md."""

    rollout_is: str | None = setting(
        None, choices=(None, *IMPORTANCE_LEVELS), help="Weights for tokens or for whole answers; null: none."
    )
    rollout_is_threshold: str = setting(
        "2.0",
        help="The largest weight, to which larger ones are cut; or LOWER_UPPER, such as 0.5_5.0: others become 0.",
    )
    rollout_rs: str | None = setting(
        None,
        choices=(None, *REJECTIONS),
        help="Rejects answers by the geometric mean of their token ratios: of policy over engine (geometric), or of "
        "engine over policy (seq_mean_k1); null: none.",
    )
    rollout_rs_threshold: str | None = setting(
        None, help="The bounds LOWER_UPPER on that mean, or one number U for 1/U to U; has to be set with rollout_rs."
    )
    rollout_rs_denominator: str = setting(
        "all",
        choices=REJECTION_DENOMINATORS,
        help="What the loss is divided by: all answers, or those that are kept, as in verl, for which all are scored "
        "in a pass of their own.",
    )
    bypass_old_logprobs: bool = setting(
        False, help="Takes PPO's ratio against the engine's log-probabilities and saves the pass for the old ones."
    )


@dataclass
class Algorithm:
    """How rewards become advantages; see docs/algorithm.md."""

    adv_estimator: str = setting("remax", choices=ESTIMATORS, help="The estimator of advantages.")
    norm_adv_by_std_in_grpo: bool = setting(
        True, help="Divides grpo's advantages by the standard deviation of the prompt's rewards."
    )
    reward_softmax_temperature: float = setting(
        1.0, limits=POSITIVE, help="Temperature of reward_softmax, in units of the reward."
    )
    gamma: float = setting(1.0, limits=POSITIVE_SHARE, help="Discount per token of gae; the other estimators need 1.0.")
    lam: float = setting(
        1.0,
        limits=SHARE,
        help="The lambda of gae (arXiv 1506.02438): 1 takes the critic's values as a baseline only; a smaller one "
        "trusts them more, for less variance.",
    )
    use_kl_in_reward: bool = setting(False, help="Subtracts the KL to the reference policy from the reward.")
    kl_penalty: str = setting(
        "kl", choices=KL_KINDS, help="How the KL in the reward is estimated; see docs/algorithm.md."
    )
    kl_reward_mode: str = setting(
        "to_go",
        choices=KL_REWARD_MODES,
        help="Whether a token answers for its own and all later KL, as in verl, or for its own, as in the authors' "
        "repository.",
    )
    refill: bool = setting(
        False,
        help="Draws further prompts for those without a gradient, until data.train_batch_size have one; see "
        "docs/algorithm.md.",
    )
    refill_limit: int | None = setting(
        None,
        limits=POSITIVE,
        help="Prompts drawn for one batch, its own included, at most; null: four times data.train_batch_size.",
    )
    kl_ctrl: KlCtrl = group(KlCtrl)
    rollout_correction: RolloutCorrection = group(RolloutCorrection)


@dataclass
class Trainer:
    """The run: its length, its ranks, and what it writes."""

    project_name: str = setting("remax_megatron", help="Project of the loggers, and part of the default folder.")
    experiment_name: str = setting("default", help="Name of the run, and part of the default folder.")
    logger: Any = setting(["console"], help=f"A list of {', '.join(LOGGERS)}; metrics.jsonl is always written.")
    n_gpus_per_node: int = setting(8, limits=POSITIVE, help="Ranks per node; the launcher has to start as many.")
    nnodes: int = setting(1, limits=POSITIVE, help="Nodes.")
    seed: int = setting(
        1, limits=NOT_NEGATIVE, on_resume=MUST_MATCH, help="Sampling and shuffling are functions of it and the step."
    )
    total_epochs: int = setting(1, limits=POSITIVE, help="Passes over the training prompts.")
    total_training_steps: int | None = setting(
        None, limits=POSITIVE, help="Steps after which the run ends, if that comes before total_epochs."
    )
    save_freq: int = setting(
        -1,
        limits=POSITIVE_OR_NONE,
        help="Writes a checkpoint every so many steps and at the end of the run; -1 or 0: none.",
    )
    max_ckpt_to_keep: int = setting(
        3, limits=POSITIVE, help="Checkpoints that are kept: the newest, and the best by validation beside them."
    )
    async_save: bool = setting(
        False, help="Writes checkpoints from a copy in host memory while the training continues."
    )
    test_freq: int = setting(-1, limits=POSITIVE_OR_NONE, help="Validates every so many steps; -1 or 0: never.")
    val_before_train: bool = setting(True, help="Validates before the first step.")
    val_only: bool = setting(
        False, help="Validates the model, or the checkpoint that would be resumed, and ends; nothing is trained."
    )
    default_local_dir: str = setting(
        "runs/${trainer.project_name}/${trainer.experiment_name}",
        path=True,
        help="The folder of the run: metrics, settings, checkpoints and the trained model.",
    )
    resume_mode: str = setting(
        "auto",
        choices=("auto", "disable", "path"),
        help="Resumes from the newest sound checkpoint of the run's folder, if there is one; from none; or from "
        "resume_from_path.",
    )
    resume_from_path: str | None = setting(
        None, path=True, help="The checkpoint, or the folder of checkpoints, for resume_mode=path."
    )
    stop_file: str = setting(
        "${trainer.default_local_dir}/stop",
        path=True,
        help="When this file appears, the run saves after the current step and ends.",
    )
    critic_warmup: int = setting(
        0,
        limits=NOT_NEGATIVE,
        on_resume=MUST_MATCH,
        help="Steps at the start in which only the critic learns, with algorithm.adv_estimator=gae.",
    )
    placement: str = setting(
        "colocated",
        choices=("colocated", "split"),
        help="Every rank holds policy and engine, in turns; or some of the ranks hold the engine alone, and the others "
        "the policy.",
    )
    device: str = setting(
        "auto", choices=("auto", "cuda", "cpu"), help="Where the run computes; auto: on a GPU if there is one."
    )
    rollout_data_dir: str | None = setting(
        None, path=True, help="A folder for the prompts, answers and rewards of every batch, as JSON lines."
    )
    validation_data_dir: str | None = setting(
        None, path=True, help="A folder for the answers of every validation, as JSON lines."
    )
    collective_timeout_s: int = setting(
        1800, limits=POSITIVE, help="Seconds after which a collective that waits for a rank fails."
    )
    watchdog_timeout_s: int = setting(
        1800, limits=POSITIVE, help="Seconds that a rank may be in one phase, or at one micro-batch; then the run ends."
    )
    profile_steps: Any = setting(
        None, help="A list of steps of which torch's profiler writes a trace to default_local_dir/profile."
    )
    max_nonfinite_updates: int = setting(
        3, limits=POSITIVE, help="Updates in a row that may be skipped because they are not finite; then the run ends."
    )
    export_hf: bool = setting(True, help="Writes the final policy as a Hugging Face folder to default_local_dir/hf.")
    prepare_command: str | None = setting(
        None,
        help="The command that makes the preset's model and data; it is not run, but named in the error when one of "
        "them is missing.",
    )


@dataclass
class CustomRewardFunction:
    """A reward of your own."""

    path: str | None = setting(None, path=True, help="A Python file; null: the reward of the row's data_source.")
    name: str = setting("compute_score", help="The function in that file.")
    reward_kwargs: dict[str, Any] | None = setting(
        None, mapping=True, help="More arguments of the function, by name; null: none."
    )


@dataclass
class Reward:
    """The processes that score answers; see docs/algorithm.md."""

    num_workers: int = setting(4, limits=POSITIVE, on_resume=MAY_CHANGE, help="Processes per engine replica.")
    timeout_s: float = setting(
        10.0, limits=POSITIVE, help="Seconds in which an answer has to be scored; code.py's own limit is 8."
    )
    async_concurrency: int = setting(
        64, limits=POSITIVE, on_resume=MAY_CHANGE, help="Answers that an async function scores at once in a process."
    )
    keep_special_tokens: bool = setting(
        False, help="Leaves special tokens in the text that is scored, all but the one that ends the answer."
    )
    cut_answers: str = setting(
        "score",
        choices=CUT_ANSWERS,
        help="What an answer that max_response_length cut is worth: what its text so far scores; 0; or mask, which "
        "leaves it out of the update by an advantage of 0. Training only.",
    )
    overlong_buffer: int = setting(
        0,
        limits=NOT_NEGATIVE,
        help="Tokens before max_response_length over which overlong_penalty rises from 0 (arXiv 2503.14476); 0: none.",
    )
    overlong_penalty: float = setting(
        1.0, limits=NOT_NEGATIVE, help="What an answer of max_response_length tokens loses, with overlong_buffer > 0."
    )
    max_failure_share: float = setting(
        0.05,
        limits=SHARE,
        why="it is a share of the rewards",
        on_resume=MAY_CHANGE,
        help="Share of a batch's rewards that may fail, and count as 0; above it the run ends.",
    )
    memory_gib: float | None = setting(
        4.0, limits=POSITIVE, help="Address space of a process in GiB; null: not limited."
    )


@dataclass
class Config:
    """All settings."""

    data: Data = group(Data)
    actor_rollout_ref: ActorRolloutRef = group(ActorRolloutRef)
    critic: Critic = group(Critic)
    algorithm: Algorithm = group(Algorithm)
    trainer: Trainer = group(Trainer, on_resume=MAY_CHANGE)
    custom_reward_function: CustomRewardFunction = group(CustomRewardFunction)
    reward: Reward = group(Reward)


SETTINGS = settings_of(Config)
GROUPS = frozenset(key[: dot.start()] for key in SETTINGS for dot in re.finditer(r"\.", key))  # dotted


def as_list(value: Any) -> list[Any]:
    """A setting that may be null, one value or a list of values, as a list."""
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def expects_cpu(config: Config) -> bool:
    """Whether the run will be on the CPU, told without torch: "auto" looks for an NVIDIA device file."""
    if config.trainer.device != "auto":
        return config.trainer.device == "cpu"
    return not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/dxg").exists()


class Sides(NamedTuple):
    """How many ranks hold the `policy` and how many the `engine`; in a split run, `is_split`, these are others, and
    the engine's are the last ones."""

    policy: int
    engine: int
    is_split: bool


def sides_of(config: Config, world_size: int) -> Sides:
    """Divide `world_size` ranks as the settings say."""
    if config.trainer.placement != "split":
        return Sides(world_size, world_size, False)
    num_ranks = config.actor_rollout_ref.rollout.num_ranks
    own = world_size // 2 if num_ranks is None else num_ranks
    return Sides(world_size - own, own, True)


def estimator_of(config: Config) -> Estimator:
    """The estimator of advantages, as it is set."""
    algorithm = config.algorithm
    return get_estimator(
        algorithm.adv_estimator,
        norm_by_std=algorithm.norm_adv_by_std_in_grpo,
        temperature=algorithm.reward_softmax_temperature,
    )


def needs_reference(config: Config) -> bool:
    """Whether a KL term asks for the reference policy."""
    return config.algorithm.use_kl_in_reward or config.actor_rollout_ref.actor.use_kl_loss


def has_critic(config: Config) -> bool:
    """Whether the estimator takes a critic's values."""
    return get_estimator(config.algorithm.adv_estimator).needs_critic


def critic_as_actor(config: Config) -> Actor:
    """Give the settings of the critic's update: the actor's, and the critic's own in their place where they are set."""
    actor, critic = config.actor_rollout_ref.actor, config.critic
    own = {field.name: getattr(critic.megatron, field.name) for field in fields(critic.megatron)}
    return replace(
        actor,
        optim=critic.optim,
        ppo_mini_batch_size=critic.ppo_mini_batch_size or actor.ppo_mini_batch_size,
        ppo_epochs=critic.ppo_epochs or actor.ppo_epochs,
        loss_agg_mode=critic.loss_agg_mode,
        ppo_max_token_len_per_gpu=critic.ppo_max_token_len_per_gpu or actor.ppo_max_token_len_per_gpu,
        ppo_micro_batch_size_per_gpu=critic.ppo_micro_batch_size_per_gpu or actor.ppo_micro_batch_size_per_gpu,
        megatron=replace(actor.megatron, **{name: value for name, value in own.items() if value is not None}),
    )


def skips_zero_advantage(config: Config) -> bool:
    """Whether rows whose advantages are all 0 are left out: where that is exact, unless the user said no.

    It is exact when nothing but the advantage makes a gradient: no KL and no entropy term, and no critic to teach.
    """
    if has_critic(config):
        return False
    actor = config.actor_rollout_ref.actor
    if actor.skip_zero_advantage is None:
        return not needs_reference(config) and actor.entropy_coeff == 0
    return actor.skip_zero_advantage


def refill_limit_of(config: Config, num_prompts: int) -> int:
    """Prompts that are drawn for one batch at most, of `num_prompts` in the data."""
    return min(config.algorithm.refill_limit or 4 * config.data.train_batch_size, num_prompts)


def importance_of(correction: RolloutCorrection) -> Bounds:
    """Where importance weights are cut or masked."""
    return read_bounds(str(correction.rollout_is_threshold))


def rejection_of(correction: RolloutCorrection) -> Bounds | None:
    """The bounds outside of which an answer is rejected; None: none is."""
    if correction.rollout_rs is None:
        return None
    return rejection_bounds(correction.rollout_rs, str(correction.rollout_rs_threshold))


def recompute_of(config: Config) -> Recompute:
    """The recompute settings: override_transformer_config where it names a granularity, else full or none as
    model.enable_gradient_checkpointing says."""
    chosen = config.actor_rollout_ref.actor.megatron.override_transformer_config
    fallback = "full" if config.actor_rollout_ref.model.enable_gradient_checkpointing else "none"
    return Recompute(
        granularity=chosen.recompute_granularity or fallback,
        method=chosen.recompute_method or "uniform",
        num_layers=chosen.recompute_num_layers or 1,
        modules=tuple(chosen.recompute_modules or ("mlp",)),
    )
