"""Every setting, its type and its default. The names are those of the guide that most users come from (verl's keys).

Presets in `conf/` fill these in; `remax_megatron.config.load` reads them, `remax_megatron.config.rules` checks them.
A field documented as "alias" is copied onto the field it stands for, with a note in the log. After loading,
`trainer.logger` is a list of names and `~` in paths is expanded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from remax_megatron.errors import UserError
from remax_megatron.types import Recompute

LOGGERS = ("console", "wandb", "tensorboard")


class ConfigError(UserError):
    """A setting that the user has to change: the message names it, its value, the limit, and what to set instead."""


@dataclass
class Data:
    # a path or a list of paths (.parquet, .json, .jsonl)
    train_files: Any = MISSING
    val_files: Any = None
    train_batch_size: int = 1024  # prompts per rollout batch
    val_batch_size: int | None = None  # prompts per validation call of the engine; None: all at once
    val_max_samples: int = -1  # -1: the whole validation set
    max_prompt_length: int = 512  # tokens, chat template included
    max_response_length: int = 1024  # tokens
    filter_overlong_prompts: bool = True
    truncation: str = "error"  # what happens to an overlong prompt that was not filtered: error | left | right
    shuffle: bool = True
    prompt_key: str = "prompt"
    prepare_command: str | None = None  # makes the files; never run, but named in the error when one is missing


@dataclass
class Model:
    path: str = MISSING  # Hugging Face folder or hub id
    use_remove_padding: bool = True
    enable_gradient_checkpointing: bool = False
    trust_remote_code: bool = False  # refused when True: code from a model folder is never executed


@dataclass
class Optim:
    lr: float = 1e-6
    lr_warmup_steps: int = 0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_grad: float = 1.0


@dataclass
class OverrideTransformerConfig:
    """What is recomputed in the backward pass, under the names of verl and Megatron; see `recompute_of`."""

    recompute_granularity: str | None = None  # none | selective | full; null: enable_gradient_checkpointing decides
    recompute_method: str | None = None  # uniform | block, with full only; null: uniform
    recompute_num_layers: int | None = None  # with full only; null: 1
    recompute_modules: Any = None  # with selective only: of mlp, core_attn, layernorm; null: [mlp]


@dataclass
class Megatron:
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = True
    param_offload: bool = False
    grad_offload: bool = False
    optimizer_offload: bool = False
    dtype: str = "bfloat16"  # bfloat16 (fp32 master weights) | float32
    layers: str = "auto"  # auto | transformer_engine | local; auto: Transformer Engine's on a GPU where it is installed
    overlap_grad_reduce: bool | None = None  # reduce gradients during the backward pass; null: on a GPU where DP > 1
    overlap_param_gather: bool | None = None  # gather updated weights during the next forward pass; null: as above
    override_transformer_config: OverrideTransformerConfig = field(default_factory=OverrideTransformerConfig)
    attention_backend: str = "auto"  # auto | transformer_engine | varlen | flex | sdpa
    logprob_chunk_size: int = 1024  # scored positions whose logits exist at once


@dataclass
class FsdpConfig:
    """Aliases for users of FSDP presets; mapped onto the megatron keys with a note."""

    param_offload: bool | None = None
    optimizer_offload: bool | None = None


@dataclass
class RefFsdpConfig:
    """Alias for users of FSDP presets; mapped onto ref.megatron with a note."""

    param_offload: bool | None = None


@dataclass
class Actor:
    strategy: str = "megatron"
    optim: Optim = field(default_factory=Optim)
    ppo_mini_batch_size: int | None = None  # prompts per optimizer step; None: train_batch_size (one update a batch)
    ppo_epochs: int = 1
    use_dynamic_bsz: bool = True
    ppo_max_token_len_per_gpu: int = 16384  # strict token budget of one micro-batch
    ppo_micro_batch_size_per_gpu: int | None = None  # rows per micro-batch when use_dynamic_bsz=False
    clip_ratio: float = 0.2
    clip_ratio_low: float | None = None
    clip_ratio_high: float | None = None
    clip_ratio_c: float = 3.0  # dual clip, arXiv 1912.09729
    policy_loss: str = "ppo_clip"  # ppo_clip | reinforce
    loss_agg_mode: str = "token-mean"  # token-mean | seq-mean-token-sum | seq-mean-token-mean
    skip_zero_advantage: bool | None = None  # leave rows without gradient out of all passes; None: where exact
    share_prompts: bool = False  # compute a prompt once for all its answers in a micro-batch
    entropy_coeff: float = 0.0
    use_kl_loss: bool = False
    kl_loss_coef: float = 0.001
    kl_loss_type: str = "low_var_kl"
    megatron: Megatron = field(default_factory=Megatron)
    fsdp_config: FsdpConfig = field(default_factory=FsdpConfig)


@dataclass
class RefMegatron:
    param_offload: bool = False


@dataclass
class Ref:
    megatron: RefMegatron = field(default_factory=RefMegatron)
    fsdp_config: RefFsdpConfig = field(default_factory=RefFsdpConfig)


@dataclass
class ValKwargs:
    """How validation answers are made: greedy, or n sampled ones per prompt."""

    n: int = 1
    do_sample: bool = False
    temperature: float = 1.0


@dataclass
class RolloutConfig:
    name: str = "vllm"
    tensor_model_parallel_size: int = 1
    gpu_memory_utilization: float = 0.6
    n: int = 1  # sampled answers per prompt; the greedy one comes on top
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    dtype: str | None = None  # None: the policy's dtype
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    kv_cache_gib: float = 1.0  # CPU only: KV cache per rank; on a GPU gpu_memory_utilization rules
    enforce_eager: bool = False
    model_runner: str = "v1"  # v1 | v2, GPU only: vLLM's; v2 draws other tokens from the same seeds
    sync_bucket_mb: int = 1024  # weight sync: MiB of weights that are gathered at once; twice that is held at most
    canary_threshold: float | None = None  # None: 1e-4 (maximum, float32) or 2e-2 (mean, bfloat16)
    mismatch_threshold: float | None = None  # mean |engine - policy| of a batch, nats; None: 1e-3 (float32), 0.2 (bf16)
    val_kwargs: ValKwargs = field(default_factory=ValKwargs)


@dataclass
class ActorRolloutRef:
    model: Model = field(default_factory=Model)
    actor: Actor = field(default_factory=Actor)
    ref: Ref = field(default_factory=Ref)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)


@dataclass
class KlCtrl:
    type: str = "fixed"
    kl_coef: float = 0.001
    horizon: int = 10000
    target_kl: float = 0.1


@dataclass
class RolloutCorrection:
    """Truncated importance sampling for the mismatch between engine and trainer; see algorithm.importance."""

    rollout_is: str | None = None  # token | sequence
    rollout_is_threshold: float = 2.0
    bypass_old_logprobs: bool = False  # PPO's ratio is taken against the engine's log-probabilities


@dataclass
class Algorithm:
    adv_estimator: str = "remax"  # remax | rloo | grpo | reinforce | reward_softmax
    norm_adv_by_std_in_grpo: bool = True
    reward_softmax_temperature: float = 1.0
    gamma: float = 1.0
    use_kl_in_reward: bool = False
    kl_penalty: str = "kl"
    kl_reward_mode: str = "to_go"  # to_go (as verl) | one_step (as the author's repository)
    kl_ctrl: KlCtrl = field(default_factory=KlCtrl)
    rollout_correction: RolloutCorrection = field(default_factory=RolloutCorrection)


@dataclass
class Trainer:
    project_name: str = "remax_megatron"
    experiment_name: str = "default"
    logger: Any = field(default_factory=lambda: ["console"])  # of console, wandb, tensorboard; metrics.jsonl always
    n_gpus_per_node: int = 8  # ranks per node; checked against the launcher's WORLD_SIZE
    nnodes: int = 1
    seed: int = 1
    total_epochs: int = 1
    total_training_steps: int | None = None  # stops earlier than total_epochs
    save_freq: int = -1  # a checkpoint every so many steps and at the end of the run; -1: none
    max_ckpt_to_keep: int = 3  # the newest; the best by validation is kept beside them
    async_save: bool = False  # write checkpoints from a copy in host memory while training goes on
    test_freq: int = -1
    val_before_train: bool = True
    default_local_dir: str = "runs/${trainer.project_name}/${trainer.experiment_name}"
    resume_mode: str = "auto"  # auto: the newest sound checkpoint of default_local_dir, if any | disable | path
    resume_from_path: str | None = None  # the checkpoint, or the folder of checkpoints, for resume_mode=path
    stop_file: str = "${trainer.default_local_dir}/stop"  # when it appears, the run saves after the step and ends
    critic_warmup: int = 0
    device: str = "auto"  # auto | cuda | cpu
    rollout_data_dir: str | None = None  # dump every rollout batch as JSONL
    validation_data_dir: str | None = None  # dump the answers of every validation as JSONL
    collective_timeout_s: int = 1800
    watchdog_timeout_s: int = 1800  # a rank that is longer in one phase, or at one micro-batch, ends the run
    profile_steps: Any = None  # a list of steps of which torch's profiler writes a trace to default_local_dir/profile
    max_nonfinite_updates: int = 3  # in a row, each skipped, before the run stops
    export_hf: bool = True  # write the final policy as a Hugging Face folder to default_local_dir/hf


@dataclass
class CustomRewardFunction:
    path: str | None = None
    name: str = "compute_score"


@dataclass
class Reward:
    """The processes that score answers; see rewards.pool."""

    num_workers: int = 4  # per engine replica
    timeout_s: float = 10.0  # of one answer; code.py's own limit is 8
    max_failure_share: float = 0.05  # of a batch's rewards that may fail (and count 0) before the run stops
    memory_gib: float | None = 4.0  # address space of a worker


@dataclass
class Config:
    data: Data = field(default_factory=Data)
    actor_rollout_ref: ActorRolloutRef = field(default_factory=ActorRolloutRef)
    algorithm: Algorithm = field(default_factory=Algorithm)
    trainer: Trainer = field(default_factory=Trainer)
    custom_reward_function: CustomRewardFunction = field(default_factory=CustomRewardFunction)
    reward: Reward = field(default_factory=Reward)


def needs_reference(config: Config) -> bool:
    """Whether a KL term asks for the reference policy."""
    return config.algorithm.use_kl_in_reward or config.actor_rollout_ref.actor.use_kl_loss


def skips_zero_advantage(config: Config) -> bool:
    """Whether rows whose advantages are all 0 are left out: where that is exact, unless the user said no.

    It is exact when nothing but the advantage makes a gradient: no KL and no entropy term.
    """
    actor = config.actor_rollout_ref.actor
    if actor.skip_zero_advantage is None:
        return not needs_reference(config) and actor.entropy_coeff == 0
    return actor.skip_zero_advantage


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
