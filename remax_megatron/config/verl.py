"""verl's keys that are no settings here: which setting one stands for, why it has no effect, or why it is refused.

    actor_rollout_ref.actor.grad_clip=1.0      read as actor_rollout_ref.actor.optim.clip_grad=1.0
    trainer.balance_batch=True                 has no effect, and a note says why
    reward_model.enable=True                   refused, with what to do instead

TABLE has them all (verl 0.7: the keys of its examples for GSM8K, and those of its trainer's settings for Megatron);
`translate` looks every key of a preset or override up in it, and docs/settings.md shows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from remax_megatron.config.schema import (
    ACTOR,
    CRITIC,
    CRITIC_MEGATRON,
    GROUPS,
    MEGATRON,
    ROLLOUT,
    SETTINGS,
    ConfigError,
)

MODEL, REF = "actor_rollout_ref.model", "actor_rollout_ref.ref"
OPTIM, TRANSFORMER = f"{ACTOR}.optim", f"{MEGATRON}.override_transformer_config"
CRITIC_MODEL, CRITIC_OPTIM = f"{CRITIC}.model", f"{CRITIC}.optim"
MODELS, MEGATRONS = (MODEL, CRITIC_MODEL), (MEGATRON, CRITIC_MEGATRON)

_NOTHING: tuple[Any, ...] = (None, "", {}, [])  # values with which nothing is asked for


@dataclass
class Translated:
    """What is left of a tree of keys and values without verl's, what these are read as, and a note on each of them."""

    tree: dict[str, Any]
    read_as: dict[str, tuple[str, Any]] = field(default_factory=dict)  # our key -> (verl's key, value)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ReadAs:
    """The key stands for `targets`: for one, or, with a list, for as many as it has items.

    With `values`, verl's value -> ours, others are refused. A value in `unless` asks for nothing.
    """

    targets: tuple[str, ...]
    values: Mapping[Any, Any] | None = None
    unless: tuple[Any, ...] = ()

    def take(self, key: str, value: Any, where: str, found: Translated) -> None:
        """Add what `key`=`value` comes to to `found`. ConfigError when it is refused."""
        if value in _NOTHING or value in self.unless:
            found.notes.append(f"{key}={value} has no effect: {' and '.join(self.targets)} is not set by it")
            return
        read = [value] if len(self.targets) == 1 else value
        if self.values is not None:
            if value not in self.values:
                raise ConfigError(
                    f"{key}={value}{where} is not offered; set {self.targets[0]} to one of "
                    f"{', '.join(dict.fromkeys(map(str, self.values.values())))}"
                )
            read = [self.values[value]]
        if not isinstance(read, list) or len(read) != len(self.targets):
            raise ConfigError(f"{key}={value}{where} is read as {' and '.join(self.targets)}; set these")
        found.read_as |= {target: (key, one) for target, one in zip(self.targets, read, strict=True)}
        pairs = [f"{target}={one}" for target, one in zip(self.targets, read, strict=True)]
        found.notes.append(f"{key}={value} is read as {' and '.join(pairs)}")

    @property
    def words(self) -> str:
        """What becomes of the key, for the page."""
        names = " and ".join(f"`{target}`" for target in self.targets)
        pairs = ", ".join(f"`{theirs}`: `{ours}`" for theirs, ours in (self.values or {}).items())
        return f"read as {names}{pairs and f' ({pairs})'}"


@dataclass(frozen=True)
class Ignored:
    """The key has no effect, because of `why`."""

    why: str

    def take(self, key: str, value: Any, where: str, found: Translated) -> None:
        """Add a note to `found`."""
        found.notes.append(f"{key}={value} has no effect: {self.why}")

    @property
    def words(self) -> str:
        """What becomes of the key, for the page."""
        return f"no effect: {self.why}"


@dataclass(frozen=True)
class Refused:
    """The key is refused, because of `why`, with a value that is not in `unless`."""

    why: str
    unless: tuple[Any, ...] = ()

    def take(self, key: str, value: Any, where: str, found: Translated) -> None:
        """Add a note to `found`, or raise ConfigError."""
        if value not in _NOTHING and value not in self.unless:
            raise ConfigError(f"{key}={value}{where} is refused: {self.why}")
        found.notes.append(f"{key}={value} has no effect: it is what holds here anyway")

    @property
    def words(self) -> str:
        """What becomes of the key, for the page."""
        return f"refused{' unless ' + ', '.join(f'`{one}`' for one in self.unless) if self.unless else ''}: {self.why}"


Fate = ReadAs | Ignored | Refused

_NO_LORA = "LoRA is not offered, the whole model is trained; leave it out"
_ONE_FOLDER = f"model, config and tokenizer are those of {MODEL}.path; set that"
_NO_OWN_CODE = "code is executed for rewards only; write the prompts to a .parquet or .jsonl file"
_NO_EXPERTS = "the model has no experts; set it to 1"
_SAME_PACKING = f"passes without a gradient are packed as updates are, by {ACTOR}.ppo_max_token_len_per_gpu"
_PROFILES = "trainer.profile_steps has the steps of which every rank writes a trace"
_FUSED = "log-probabilities are always computed in chunks, and kernels are chosen by the layers"
_MODEL_AS_IT_IS = f"the model is computed as its config.json says; change that in {MODEL}.path"


def _below(parts: Iterable[str], *names: str) -> tuple[str, ...]:
    """The keys `names` below each of `parts`."""
    return tuple(f"{part}.{name}" for part in parts for name in names)


def _of_optimizer(optim: str, megatron: str) -> dict[tuple[str, ...], Fate]:
    """What becomes of the keys of an optimizer, whose settings are at `optim`; those of its model's Megatron are at
    `megatron`."""
    return {
        (f"{optim}.betas",): ReadAs((f"{optim}.beta1", f"{optim}.beta2")),
        (f"{optim}.optimizer",): Refused("the optimizer is Adam; leave it out", ("adam", "AdamW")),
        (f"{optim}.optimizer_impl",): Refused("the optimizer is Megatron's Adam; leave it out", ("torch.optim",)),
        (f"{optim}.warmup_style", f"{optim}.lr_scheduler_type"): ReadAs(
            (f"{optim}.lr_decay_style",), {"constant": "constant", "cosine": "cosine"}
        ),
        (f"{optim}.total_training_steps",): Refused(f"set {optim}.lr_decay_steps, in optimizer steps", (-1,)),
        (f"{optim}.lr_warmup_init",): Refused("the warmup begins at lr / lr_warmup_steps; leave it out", (0,)),
        (f"{optim}.min_lr_ratio",): Refused(f"set {optim}.min_lr, which is no share of lr", (0,)),
        (f"{optim}.num_cycles",): Refused("a cosine falls once, which is half a cycle; set it to 0.5", (0.5,)),
        (f"{optim}.zero_indexed_step", f"{optim}.use_checkpoint_opt_param_scheduler"): Ignored(
            "the learning rate is a function of the optimizer steps that were made"
        ),
        (f"{optim}.weight_decay_incr_style",): Refused(
            "the weight decay is constant; set it to constant", ("constant",)
        ),
        (f"{optim}.lr_wsd_decay_style", f"{optim}.lr_wsd_decay_steps"): Ignored("lr_decay_style=WSD is not offered"),
        (
            f"{optim}.override_optimizer_config.optimizer_cpu_offload",
            f"{optim}.override_optimizer_config.optimizer_offload_fraction",
            f"{optim}.override_optimizer_config.overlap_cpu_optimizer_d2h_h2d",
        ): Ignored(f"Adam's step is made on the GPU; {megatron}.optimizer_offload frees its memory between updates"),
        (f"{optim}.override_optimizer_config.*",): Refused(
            f"the optimizer has the settings of {optim} and no others; leave it out", (False,)
        ),
    }


# Keys, of which one that ends in .* stands for all below it, and what becomes of them. The longest that fits counts.
TABLE: dict[tuple[str, ...], Fate] = {
    # data
    ("data.seed",): ReadAs(("trainer.seed",)),
    ("data.tokenizer",): Refused(_ONE_FOLDER),
    ("data.reward_fn_key",): Refused("the column is always data_source; rename it in the file", ("data_source",)),
    ("data.trust_remote_code", f"{CRITIC_MODEL}.trust_remote_code", *_below(MODELS, "external_lib")): Refused(
        "code from a model folder is never executed; set it to False or leave it out", (False,)
    ),
    ("data.return_raw_chat", "data.return_raw_input_ids", "data.return_full_prompt"): Ignored(
        "prompts are chats that are tokenised here"
    ),
    (
        "data.dataloader_num_workers",
        "data.filter_overlong_prompts_workers",
        "data.use_shm",
        *_below(MODELS, "use_shm"),
    ): Ignored("files are read once, at the start"),
    ("data.validation_shuffle",): Ignored("validation prompts keep the order of the files"),
    ("data.image_key", "data.video_key", "data.image_patch_size", "data.return_multi_modal_inputs"): Ignored(
        "prompts are texts"
    ),
    ("data.custom_cls.*", "data.sampler.*", "data.datagen.*"): Refused(_NO_OWN_CODE),
    ("data.tool_config_path",): Refused("answers have one turn, without tools; leave it out"),
    ("data.gen_batch_size",): Refused("every batch has data.train_batch_size prompts; set that"),
    # the model
    (f"{MODEL}.use_rmpad", f"{MEGATRON}.use_remove_padding"): ReadAs((f"{MODEL}.use_remove_padding",)),
    (f"{MODEL}.use_fused_kernels", f"{MODEL}.fused_kernel_options.*", f"{ACTOR}.use_fused_kernels"): Ignored(_FUSED),
    (f"{MODEL}.use_liger", f"{ACTOR}.use_torch_compile", f"{REF}.use_torch_compile"): Ignored(_FUSED),
    (*_below(MODELS, "enable_activation_offload"), f"{MODEL}.tiled_mlp.*"): Ignored(
        f"{MODEL}.enable_gradient_checkpointing saves the memory of activations"
    ),
    _below(MODELS, "lora_rank", "lora.rank"): Refused(_NO_LORA, (0,)),
    _below(MODELS, "lora_adapter_path", "lora.adapter_path"): Refused(_NO_LORA),
    _below(MODELS, "lora_alpha", "target_modules", "exclude_modules", "lora.*"): Ignored(
        "the whole model is trained, without LoRA"
    ),
    (f"{MODEL}.tokenizer_path", f"{MODEL}.hf_config_path"): Refused(_ONE_FOLDER),
    (f"{MODEL}.override_config.*", f"{MEGATRON}.override_mcore_model_config.*"): Refused(_MODEL_AS_IT_IS, (False,)),
    (f"{MODEL}.mtp.*", f"{ROLLOUT}.mtp.*"): Ignored("a Qwen2.5 model has no heads for later tokens"),
    # the update
    (f"{ACTOR}.grad_clip",): ReadAs((f"{OPTIM}.clip_grad",)),
    (f"{ACTOR}.ppo_micro_batch_size",): Refused(
        f"it counts rows of all ranks; set {ACTOR}.ppo_micro_batch_size_per_gpu"
    ),
    (f"{ACTOR}.shuffle", f"{CRITIC}.shuffle"): Refused(
        "mini-batches take the prompts of a batch in order; set it to False", (False,)
    ),
    (
        f"{ACTOR}.ulysses_sequence_parallel_size",
        f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size",
        f"{CRITIC}.ulysses_sequence_parallel_size",
    ): Refused(
        f"sequences are not cut between ranks; set it to 1, and {MEGATRON}.tensor_model_parallel_size with "
        "sequence_parallel=True to save memory",
        (1,),
    ),
    (f"{ACTOR}.entropy_from_logits_with_chunking", f"{ACTOR}.entropy_checkpointing", f"{ACTOR}.calculate_entropy"): (
        Ignored("the entropy is always computed, in chunks")
    ),
    (f"{ACTOR}.policy_loss.loss_mode",): ReadAs((f"{ACTOR}.policy_loss",), {"vanilla": "ppo_clip"}),
    (f"{ACTOR}.policy_loss.*", f"{ACTOR}.tau_pos", f"{ACTOR}.tau_neg"): Ignored("it is of a loss that is not offered"),
    (f"{ACTOR}.loss_scale_factor",): Refused(f"losses are averaged as {ACTOR}.loss_agg_mode says; set that"),
    (f"{ACTOR}.kl_loss.type",): ReadAs((f"{ACTOR}.kl_loss_type",)),
    (f"{ACTOR}.kl_loss.coef",): ReadAs((f"{ACTOR}.kl_loss_coef",)),
    (f"{ACTOR}.use_prefix_grouper",): ReadAs((f"{ACTOR}.share_prompts",)),
    (f"{ACTOR}.checkpoint.async_save",): ReadAs(("trainer.async_save",)),
    (f"{ACTOR}.checkpoint.*",): Ignored("a checkpoint has all that a resumed run needs"),
    (*_below((ACTOR, CRITIC), "data_loader_seed"), *_below(MEGATRONS, "seed")): Ignored(
        "all seeds derive from trainer.seed"
    ),
    (f"{ACTOR}.freeze_vision_tower", f"{ACTOR}.router_replay.*", f"{REF}.router_replay.*"): Ignored(
        "the model has neither images nor experts"
    ),
    _below((ACTOR, REF, CRITIC), "rollout_n"): Ignored(f"it is {ROLLOUT}.n"),
    _below((ACTOR, REF, CRITIC), "load_weight"): Refused("weights are always loaded; set it to True", (True,)),
    (f"{ACTOR}.fsdp_config.grad_offload",): ReadAs((f"{MEGATRON}.grad_offload",)),
    (f"{ACTOR}.fsdp_config.*", f"{REF}.fsdp_config.*"): Ignored(
        f"the policy is Megatron-Core; its layout and type are those of {MEGATRON}"
    ),
    # the optimizer
    **_of_optimizer(OPTIM, MEGATRON),
    # Megatron
    (f"{MEGATRON}.use_mbridge", f"{MEGATRON}.vanilla_mbridge", f"{MEGATRON}.use_dist_checkpointing"): Ignored(
        f"{MODEL}.path is a Hugging Face folder or a converted Megatron folder, and the folder tells"
    ),
    (f"{MEGATRON}.dist_checkpointing_path", f"{MEGATRON}.dist_checkpointing_prefix"): Refused(
        f"the model is that of {MODEL}.path, which may be a converted Megatron folder; set that"
    ),
    _below(MEGATRONS, "expert_model_parallel_size", "expert_tensor_parallel_size"): Refused(_NO_EXPERTS, (1,)),
    _below(MEGATRONS, "use_megatron_fsdp"): Refused(
        f"Megatron's FSDP is not offered; set it to False, and {MEGATRON}.use_distributed_optimizer=True", (False,)
    ),
    (f"{MEGATRON}.forward_only",): Ignored("the policy is trained, the reference is not"),
    (f"{MEGATRON}.override_ddp_config.overlap_grad_reduce",): ReadAs((f"{MEGATRON}.overlap_grad_reduce",)),
    (f"{MEGATRON}.override_ddp_config.overlap_param_gather",): ReadAs((f"{MEGATRON}.overlap_param_gather",)),
    (f"{MEGATRON}.override_ddp_config.grad_reduce_in_fp32",): Refused(
        "gradients are always summed in float32; set it to True", (True,)
    ),
    (f"{MEGATRON}.override_ddp_config.*",): Refused(
        f"of Megatron's data parallelism only {MEGATRON}.overlap_grad_reduce and overlap_param_gather are offered"
    ),
    (f"{TRANSFORMER}.attention_backend",): Ignored(f"{MEGATRON}.attention_backend chooses what computes attention"),
    (
        f"{TRANSFORMER}.apply_rope_fusion",
        f"{TRANSFORMER}.gradient_accumulation_fusion",
        f"{TRANSFORMER}.masked_softmax_fusion",
        f"{TRANSFORMER}.bias_activation_fusion",
        f"{TRANSFORMER}.bias_dropout_fusion",
        f"{TRANSFORMER}.persist_layer_norm",
        f"{TRANSFORMER}.deallocate_pipeline_outputs",
    ): Ignored("what is fused is chosen for the device"),
    (f"{TRANSFORMER}.moe_*",): Ignored("the model has no experts"),
    (
        f"{TRANSFORMER}.num_layers_in_first_pipeline_stage",
        f"{TRANSFORMER}.num_layers_in_last_pipeline_stage",
        f"{TRANSFORMER}.account_for_embedding_in_pipeline_split",
        f"{TRANSFORMER}.account_for_loss_in_pipeline_split",
    ): Refused(
        f"all stages have as many layers; leave it out, and set {MEGATRON}.pipeline_model_parallel_size", (False,)
    ),
    (f"{TRANSFORMER}.*",): Refused(_MODEL_AS_IT_IS),
    # the reference
    (f"{REF}.megatron.dist_checkpointing_path", f"{REF}.megatron.dist_checkpointing_prefix", f"{REF}.model.*"): Refused(
        f"the reference is the model of {MODEL}.path; leave it out"
    ),
    (f"{REF}.megatron.*", f"{REF}.strategy", f"{REF}.ulysses_sequence_parallel_size"): Ignored(
        "the reference policy has the policy's layout"
    ),
    (
        f"{REF}.log_prob_micro_batch_size",
        f"{REF}.log_prob_micro_batch_size_per_gpu",
        f"{REF}.log_prob_use_dynamic_bsz",
        f"{REF}.log_prob_max_token_len_per_gpu",
        f"{ROLLOUT}.log_prob_micro_batch_size",
        f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu",
        f"{ROLLOUT}.log_prob_use_dynamic_bsz",
        f"{ROLLOUT}.log_prob_max_token_len_per_gpu",
    ): Ignored(_SAME_PACKING),
    (f"{REF}.entropy_from_logits_with_chunking", f"{REF}.entropy_checkpointing"): Ignored(
        "the reference's entropy is not computed"
    ),
    # the critic
    (f"{CRITIC}.enable",): Ignored("algorithm.adv_estimator=gae has a critic, the others have none"),
    (f"{CRITIC}.strategy",): Refused("the critic is always Megatron-Core; set it to megatron", ("megatron",)),
    **_of_optimizer(CRITIC_OPTIM, CRITIC_MEGATRON),
    (f"{CRITIC}.grad_clip",): ReadAs((f"{CRITIC_OPTIM}.clip_grad",)),
    (f"{CRITIC}.ppo_micro_batch_size",): Refused(
        f"it counts rows of all ranks; set {CRITIC}.ppo_micro_batch_size_per_gpu"
    ),
    _below(
        (CRITIC,), "forward_micro_batch_size", "forward_micro_batch_size_per_gpu", "forward_max_token_len_per_gpu"
    ): Ignored(f"passes without a gradient are packed as updates are, by {CRITIC}.ppo_max_token_len_per_gpu"),
    (f"{CRITIC}.use_dynamic_bsz",): Ignored(f"it is {ACTOR}.use_dynamic_bsz"),
    (f"{CRITIC}.nccl_timeout",): Ignored("trainer.collective_timeout_s is that of all collectives"),
    (f"{CRITIC}.checkpoint.*",): Ignored("the critic is in the policy's checkpoints"),
    (f"{CRITIC_MODEL}.tokenizer_path",): Ignored("the critic reads the policy's tokens"),
    (f"{CRITIC_MODEL}.override_config.*", f"{CRITIC_MEGATRON}.override_mcore_model_config.*"): Refused(
        f"the critic is computed as its config.json says; change that in {CRITIC_MODEL}.path", (False,)
    ),
    (f"{CRITIC_MODEL}.enable_gradient_checkpointing",): Ignored(f"it is {MODEL}.enable_gradient_checkpointing"),
    (f"{CRITIC_MODEL}.use_remove_padding", f"{CRITIC_MODEL}.use_rmpad", f"{CRITIC_MEGATRON}.use_remove_padding"): (
        Refused("micro-batches are always packed; set it to True", (True,))
    ),
    **{
        (f"{CRITIC_MODEL}.fsdp_config.{name}",): ReadAs((f"{CRITIC_MEGATRON}.{name}",))
        for name in ("param_offload", "grad_offload", "optimizer_offload")
    },
    (f"{CRITIC_MODEL}.fsdp_config.*",): Ignored("the critic is Megatron-Core, in the policy's layout"),
    (f"{CRITIC_MEGATRON}.dist_checkpointing_path", f"{CRITIC_MEGATRON}.dist_checkpointing_prefix"): Refused(
        f"the critic is the model of {CRITIC_MODEL}.path; set that"
    ),
    (f"{CRITIC_MEGATRON}.context_parallel_size",): Refused("context parallelism is not offered; set it to 1", (1,)),
    _below((CRITIC_MEGATRON,), "use_mbridge", "vanilla_mbridge", "use_dist_checkpointing"): Ignored(
        f"{CRITIC_MODEL}.path is a folder, and the folder tells"
    ),
    _below((CRITIC_MEGATRON,), "dtype", "forward_only", "override_ddp_config.*", "override_transformer_config.*"): (
        Ignored(f"the critic is computed as the policy is, as {MEGATRON} says")
    ),
    # the engine
    (f"{ROLLOUT}.mode",): Ignored("a batch is answered in one call of the engine, in the training ranks"),
    (f"{ROLLOUT}.prompt_length",): Ignored("it is data.max_prompt_length"),
    (f"{ROLLOUT}.response_length",): Ignored("it is data.max_response_length"),
    (f"{ROLLOUT}.max_model_len",): Ignored("it is data.max_prompt_length + data.max_response_length"),
    (f"{ROLLOUT}.ignore_eos",): Refused("an answer ends with its end-of-sequence token; set it to False", (False,)),
    (f"{ROLLOUT}.do_sample",): Refused("answers to training prompts are sampled; set it to True", (True,)),
    (f"{ROLLOUT}.over_sample_rate",): Refused("every answer is waited for; set it to 0", (0,)),
    (f"{ROLLOUT}.calculate_log_probs",): Ignored("the engine's log-probabilities are always compared"),
    (f"{ROLLOUT}.logprobs_mode",): Refused(
        "log-probabilities are those at the sampling temperature; set it to processed_logprobs", ("processed_logprobs",)
    ),
    (f"{ROLLOUT}.update_weights_bucket_megabytes", f"{ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes"): (
        ReadAs((f"{ROLLOUT}.sync_bucket_mb",))
    ),
    (f"{ROLLOUT}.checkpoint_engine.*", f"{ROLLOUT}.load_format", f"{ROLLOUT}.layer_name_map.*"): Ignored(
        "the engine gets its weights from the policy, in its own ranks"
    ),
    (f"{ROLLOUT}.data_parallel_size",): Ignored("there are as many replicas as the ranks make"),
    (f"{ROLLOUT}.pipeline_model_parallel_size", f"{ROLLOUT}.expert_parallel_size"): Refused(
        f"the engine is cut by {ROLLOUT}.tensor_model_parallel_size alone; set it to 1", (1,)
    ),
    (f"{ROLLOUT}.free_cache_engine", f"{ROLLOUT}.multi_stage_wake_up"): Ignored(
        "on a GPU the engine always frees its memory for the update"
    ),
    (
        f"{ROLLOUT}.enable_chunked_prefill",
        f"{ROLLOUT}.enable_prefix_caching",
        f"{ROLLOUT}.cudagraph_capture_sizes",
        f"{ROLLOUT}.scheduling_policy",
        f"{ROLLOUT}.disable_log_stats",
        f"{ROLLOUT}.skip_tokenizer_init",
        f"{ROLLOUT}.engine_kwargs.vllm.compilation_config.*",
    ): Ignored("it is chosen for the device"),
    (f"{ROLLOUT}.engine_kwargs.sglang.*", f"{ROLLOUT}.engine_kwargs.trtllm.*"): Ignored("the engine is vLLM"),
    (f"{ROLLOUT}.engine_kwargs.*",): Refused(f"the engine has the settings of {ROLLOUT} and no others; leave it out"),
    (f"{ROLLOUT}.multi_turn.enable",): Refused("answers have one turn; set it to False", (False,)),
    (f"{ROLLOUT}.agent.default_agent_loop",): Refused(
        "answers have one turn; set it to single_turn_agent", ("single_turn_agent",)
    ),
    (f"{ROLLOUT}.multi_turn.*", f"{ROLLOUT}.agent.*"): Ignored("answers have one turn, by the engine in these ranks"),
    (
        f"{ROLLOUT}.quantization",
        f"{ROLLOUT}.quantization_config_file",
        f"{ROLLOUT}.enable_rollout_routing_replay",
        f"{ROLLOUT}.skip_rollout",
        f"{ROLLOUT}.skip.enable",
    ): Refused("the engine answers with the policy's weights as they are; leave it out", (False,)),
    (f"{ROLLOUT}.use_block_quant_rollout", f"{ROLLOUT}.skip_dump_dir", f"{ROLLOUT}.skip.*"): Ignored(
        "the engine answers with the policy's weights as they are"
    ),
    (f"{ROLLOUT}.trace.*", f"{ROLLOUT}.prometheus.*"): Ignored("trainer.rollout_data_dir has every answer"),
    ("actor_rollout_ref.hybrid_engine",): Refused("engine and policy share the ranks; set it to True", (True,)),
    ("actor_rollout_ref.nccl_timeout",): ReadAs(("trainer.collective_timeout_s",)),
    # rewards and the algorithm
    ("algorithm.in_reward_kl.coef",): ReadAs(("algorithm.kl_ctrl.kl_coef",)),
    ("algorithm.use_pf_ppo",): Refused("a batch is trained as it was answered; set it to False", (False,)),
    ("algorithm.pf_ppo.*",): Ignored("a batch is trained as it was answered"),
    ("algorithm.filter_groups.enable",): Refused(
        "prompts without a gradient are replaced by algorithm.refill=True, which stays unbiased; set it to False",
        (False,),
    ),
    ("algorithm.filter_groups.*",): Ignored(
        "groups are not filtered; algorithm.refill replaces those without a gradient"
    ),
    ("algorithm.rollout_correction.bypass_mode",): ReadAs(("algorithm.rollout_correction.bypass_old_logprobs",)),
    ("algorithm.rollout_correction.loss_type",): Refused(f"set {ACTOR}.policy_loss", ("ppo_clip",)),
    ("algorithm.rollout_correction.rollout_rs_threshold_lower",): Refused(
        "write both bounds as algorithm.rollout_correction.rollout_rs_threshold=LOWER_UPPER; leave it out"
    ),
    ("algorithm.rollout_correction.*",): Refused(
        "of the corrections only rollout_is and rollout_rs, with their thresholds, are offered; leave it out", (False,)
    ),
    ("reward_model.enable", "reward.reward_model.enable"): Refused(
        "a reward model is not offered; set it to False, and custom_reward_function.path to a function", (False,)
    ),
    ("reward_model.reward_manager", "reward_manager.name", "reward.reward_manager.name"): Refused(
        "answers are scored one by one; set it to naive, and custom_reward_function.path to your own", ("naive",)
    ),
    ("reward_model.num_workers",): ReadAs(("reward.num_workers",)),
    ("reward.custom_reward_function.path",): ReadAs(("custom_reward_function.path",)),
    ("reward.custom_reward_function.name",): ReadAs(("custom_reward_function.name",)),
    ("reward_model.launch_reward_fn_async", "reward_model.use_reward_loop", "reward_manager.*"): Ignored(
        "answers are scored by processes beside the engine; see reward.num_workers"
    ),
    ("reward_model.*", "reward.reward_model.*", "reward.sandbox_fusion.*"): Refused(
        "a reward model or service is not offered; leave it out, and set custom_reward_function.path to a function"
    ),
    # the run
    ("trainer.balance_batch",): Ignored("micro-batches are always balanced between the ranks"),
    ("trainer.max_actor_ckpt_to_keep",): ReadAs(("trainer.max_ckpt_to_keep",)),
    ("trainer.max_critic_ckpt_to_keep",): Ignored("the critic is in the policy's checkpoints"),
    ("trainer.remove_previous_ckpt_in_save", "trainer.del_local_ckpt_after_load"): Ignored(
        "trainer.max_ckpt_to_keep says which checkpoints are kept"
    ),
    ("trainer.log_val_generations",): Ignored("trainer.validation_data_dir has every answer of a validation"),
    ("trainer.default_hdfs_dir",): Refused("checkpoints go to trainer.default_local_dir; set that"),
    ("trainer.esi_redundant_time",): Ignored("when trainer.stop_file appears, the run saves and ends"),
    ("trainer.ray_wait_register_center_timeout", "ray_kwargs.*", "ray_init.*", "transfer_queue.*"): Ignored(
        "there is no Ray; the launcher starts the ranks"
    ),
    ("trainer.use_legacy_worker_impl",): Ignored("there is one implementation"),
    ("model_engine",): Refused("the policy is always Megatron-Core; set it to megatron", ("megatron",)),
    ("global_profiler.steps",): ReadAs(("trainer.profile_steps",)),
    (
        "global_profiler.*",
        "trainer.worker_nsight_options.*",
        "trainer.controller_nsight_options.*",
        "trainer.profile_continuous_steps",
        *_below((ACTOR, REF, ROLLOUT, CRITIC), "profiler.*", "profile_ranks", "profile_ranks_all", "profile_discrete"),
    ): Ignored(_PROFILES),
}
_FATES = {key: fate for keys, fate in TABLE.items() for key in keys}


def fate_of(key: str) -> Fate | None:
    """What becomes of verl's `key`: by the longest entry that fits. None for a key that the table does not have, and of
    a setting or a group of them."""
    if key in SETTINGS or key in GROUPS:
        return None
    if key in _FATES:
        return _FATES[key]
    if key.rpartition(".")[2] == "_target_":
        return Ignored("classes are not chosen by name")
    fitting = [entry for entry in _FATES if entry.endswith("*") and f"{key}.".startswith(entry.removesuffix("*"))]
    return _FATES[max(fitting, key=len)] if fitting else None


def translate(tree: Mapping[str, Any], where: str = "") -> Translated:
    """Take verl's keys out of nested dicts. ConfigError for one that is refused; `where` says where it stands."""
    found = Translated({})
    found.tree = _kept(tree, where, "", found)
    return found


def _kept(tree: Mapping[str, Any], where: str, prefix: str, found: Translated) -> dict[str, Any]:
    """What of `tree`, whose keys follow `prefix`, is not in the table; the rest goes to `found`."""
    kept: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value and not (key in SETTINGS and SETTINGS[key].mapping):
            if below := _kept(value, where, f"{key}.", found):
                kept[name] = below
        elif fate := fate_of(key):
            fate.take(key, value, where, found)
        else:
            kept[name] = value
    return kept
