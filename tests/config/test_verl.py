"""verl's keys: what becomes of all that its examples for GSM8K set, in presets and overrides, and the page's table."""

from __future__ import annotations

import pytest

from remax_megatron.config import docs
from remax_megatron.config.load import load_config
from remax_megatron.config.schema import ACTOR, CRITIC_MEGATRON, MEGATRON, ROLLOUT, SETTINGS, ConfigError
from remax_megatron.config.setting import value_of
from remax_megatron.config.verl import (
    CRITIC_MODEL,
    CRITIC_OPTIM,
    MODEL,
    OPTIM,
    REF,
    TABLE,
    TRANSFORMER,
    Ignored,
    ReadAs,
    Refused,
    fate_of,
)

# All keys of verl's examples for GSM8K (0.1 to 0.7) with ReMax, and with GRPO, RLOO and PPO on Megatron, each with a
# value that one of them gives it.
OURS = f"""
algorithm.adv_estimator=remax algorithm.use_kl_in_reward=True algorithm.kl_penalty=kl algorithm.kl_ctrl.kl_coef=0.001
data.train_files=['a/gsm8k/train.parquet','a/math/train.parquet'] data.val_files=['a/gsm8k/test.parquet']
data.train_batch_size=1024 data.val_batch_size=1312 data.max_prompt_length=512 data.max_response_length=1024
data.filter_overlong_prompts=True data.truncation='error' data.prompt_key=prompt data.shuffle=False
{MODEL}.path=Qwen/Qwen2.5-7B-Instruct {MODEL}.use_remove_padding=True {MODEL}.enable_gradient_checkpointing=True
{MODEL}.trust_remote_code=True {ACTOR}.strategy=megatron {OPTIM}.lr=1e-6 {OPTIM}.lr_warmup_steps_ratio=0.1
{ACTOR}.ppo_mini_batch_size=256 {ACTOR}.ppo_micro_batch_size_per_gpu=4 {ACTOR}.use_dynamic_bsz=True
{ACTOR}.ppo_max_token_len_per_gpu=24000 {ACTOR}.use_kl_loss=True {ACTOR}.kl_loss_coef=0.001
{ACTOR}.kl_loss_type=low_var_kl {ACTOR}.entropy_coeff=0 {ACTOR}.fsdp_config.param_offload=True
{ACTOR}.fsdp_config.optimizer_offload=True {MEGATRON}.tensor_model_parallel_size=2
{MEGATRON}.pipeline_model_parallel_size=2 {MEGATRON}.virtual_pipeline_model_parallel_size=2
{MEGATRON}.context_parallel_size=1 {MEGATRON}.param_offload=True {MEGATRON}.optimizer_offload=True
{MEGATRON}.grad_offload=True {TRANSFORMER}.recompute_granularity=full {TRANSFORMER}.recompute_method=uniform
{TRANSFORMER}.recompute_num_layers=1 {TRANSFORMER}.recompute_modules=['core_attn','mlp']
{REF}.fsdp_config.param_offload=True {REF}.megatron.param_offload=True {ROLLOUT}.name=vllm {ROLLOUT}.n=4
{ROLLOUT}.tensor_model_parallel_size=2 {ROLLOUT}.gpu_memory_utilization=0.8 {ROLLOUT}.temperature=1.0
{ROLLOUT}.top_p=1.0 {ROLLOUT}.top_k=-1 {ROLLOUT}.max_num_seqs=64 {ROLLOUT}.max_num_batched_tokens=8192
{ROLLOUT}.enforce_eager=False {ROLLOUT}.val_kwargs.top_p=0.7 {ROLLOUT}.val_kwargs.top_k=-1
{ROLLOUT}.val_kwargs.n=1 {ROLLOUT}.val_kwargs.do_sample=True {ROLLOUT}.val_kwargs.temperature=1.0
trainer.critic_warmup=0 trainer.logger=["console","wandb"] trainer.project_name='verl_remax_example_gsm8k'
trainer.experiment_name='qwen2.5_7b_function_rm_kl1e-3' trainer.val_before_train=False trainer.n_gpus_per_node=8
trainer.nnodes=1 trainer.save_freq=-1 trainer.test_freq=5 trainer.total_epochs=10 trainer.total_training_steps=6
trainer.profile_steps=[1,2,5] trainer.default_local_dir=ckpts trainer.resume_mode=auto
trainer.rollout_data_dir=rollouts trainer.device=cuda algorithm.gamma=1.0 algorithm.lam=0.95 {CRITIC_OPTIM}.lr=1e-5
{CRITIC_OPTIM}.lr_warmup_steps_ratio=0.05 {CRITIC_OPTIM}.weight_decay=0.01 {CRITIC_MODEL}.path=Qwen/Qwen2-7B-Instruct
critic.ppo_micro_batch_size_per_gpu=4 critic.ppo_max_token_len_per_gpu=24576 critic.cliprange_value=0.5
critic.loss_agg_mode=token-mean {CRITIC_MEGATRON}.tensor_model_parallel_size=2
{CRITIC_MEGATRON}.pipeline_model_parallel_size=2 {CRITIC_MEGATRON}.virtual_pipeline_model_parallel_size=2
{CRITIC_MEGATRON}.param_offload=True {CRITIC_MEGATRON}.grad_offload=True {CRITIC_MEGATRON}.optimizer_offload=True
""".split()
READ = {
    f"{ACTOR}.grad_clip=0.7": {f"{OPTIM}.clip_grad": 0.7},
    f"{ACTOR}.fsdp_config.grad_offload=False": {f"{MEGATRON}.grad_offload": False},
    f"{ACTOR}.kl_loss.type=low_var_kl": {f"{ACTOR}.kl_loss_type": "low_var_kl"},
    f"{ACTOR}.kl_loss.coef=0.002": {f"{ACTOR}.kl_loss_coef": 0.002},
    f"{MODEL}.use_rmpad=True": {f"{MODEL}.use_remove_padding": True},
    f"{MEGATRON}.use_remove_padding=True": {f"{MODEL}.use_remove_padding": True},
    f"{ROLLOUT}.update_weights_bucket_megabytes=5120": {f"{ROLLOUT}.sync_bucket_mb": 5120},
    "actor_rollout_ref.nccl_timeout=360000": {"trainer.collective_timeout_s": 360000},
    "algorithm.in_reward_kl.coef=0": {"algorithm.kl_ctrl.kl_coef": 0.0},
    "trainer.max_actor_ckpt_to_keep=2": {"trainer.max_ckpt_to_keep": 2},
    # and of its trainer's settings
    f"{ACTOR}.policy_loss.loss_mode=vanilla": {f"{ACTOR}.policy_loss": "ppo_clip"},
    f"{ACTOR}.use_prefix_grouper=True": {f"{ACTOR}.share_prompts": True},
    f"{ACTOR}.checkpoint.async_save=True": {"trainer.async_save": True},
    f"{OPTIM}.betas=[0.9,0.95]": {f"{OPTIM}.beta1": 0.9, f"{OPTIM}.beta2": 0.95},
    f"{OPTIM}.warmup_style=cosine": {f"{OPTIM}.lr_decay_style": "cosine"},
    f"{OPTIM}.lr_scheduler_type=constant": {f"{OPTIM}.lr_decay_style": "constant"},
    f"{MEGATRON}.override_ddp_config.overlap_grad_reduce=True": {f"{MEGATRON}.overlap_grad_reduce": True},
    f"{ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes=512": {f"{ROLLOUT}.sync_bucket_mb": 512},
    "algorithm.rollout_correction.bypass_mode=True": {"algorithm.rollout_correction.bypass_old_logprobs": True},
    "data.seed=5": {"trainer.seed": 5},
    "reward_model.num_workers=8": {"reward.num_workers": 8},
    "reward.custom_reward_function.path=r.py": {"custom_reward_function.path": "r.py"},
    "global_profiler.steps=[1,2]": {"trainer.profile_steps": [1, 2]},
    "critic.grad_clip=0.7": {f"{CRITIC_OPTIM}.clip_grad": 0.7},
    f"{CRITIC_OPTIM}.betas=[0.9,0.95]": {f"{CRITIC_OPTIM}.beta1": 0.9, f"{CRITIC_OPTIM}.beta2": 0.95},
    f"{CRITIC_OPTIM}.warmup_style=cosine": {f"{CRITIC_OPTIM}.lr_decay_style": "cosine"},
    f"{CRITIC_MODEL}.fsdp_config.param_offload=True": {f"{CRITIC_MEGATRON}.param_offload": True},
    f"{CRITIC_MODEL}.fsdp_config.grad_offload=False": {f"{CRITIC_MEGATRON}.grad_offload": False},
    f"{CRITIC_MODEL}.fsdp_config.optimizer_offload=True": {f"{CRITIC_MEGATRON}.optimizer_offload": True},
}
NOTED = f"""
data.return_raw_chat=True {ACTOR}.shuffle=False {ACTOR}.use_torch_compile=False {MODEL}.use_fused_kernels=True
{ACTOR}.profile_ranks=[0,1,8,9] {ACTOR}.profile_ranks_all=False {ACTOR}.profile_discrete=True
{OPTIM}.override_optimizer_config.optimizer_offload_fraction=null
{OPTIM}.override_optimizer_config.overlap_cpu_optimizer_d2h_h2d=True
{OPTIM}.override_optimizer_config.use_precision_aware_optimizer=False
{OPTIM}.override_optimizer_config.optimizer_cpu_offload=False
{MEGATRON}.expert_model_parallel_size=1 {MEGATRON}.expert_tensor_parallel_size=1 {MEGATRON}.use_mbridge=True
{MEGATRON}.vanilla_mbridge=False {MEGATRON}.use_megatron_fsdp=False {MEGATRON}.use_dist_checkpointing=True
{TRANSFORMER}.moe_router_bias_update_rate=0.0 {TRANSFORMER}.moe_aux_loss_coeff=0.0001
{TRANSFORMER}.attention_backend='fused' {TRANSFORMER}.apply_rope_fusion=False {TRANSFORMER}.moe_router_dtype=fp32
{TRANSFORMER}.moe_shared_expert_overlap=False {TRANSFORMER}.moe_enable_deepep=False
{TRANSFORMER}.moe_token_dispatcher_type=alltoall {TRANSFORMER}.gradient_accumulation_fusion=True
{TRANSFORMER}.moe_permute_fusion=True {REF}.log_prob_micro_batch_size=16 {REF}.log_prob_micro_batch_size_per_gpu=4
{REF}.log_prob_use_dynamic_bsz=True {REF}.log_prob_max_token_len_per_gpu=24576 {REF}.use_torch_compile=False
{REF}.megatron.tensor_model_parallel_size=2 {REF}.megatron.pipeline_model_parallel_size=2
{REF}.megatron.virtual_pipeline_model_parallel_size=2 {REF}.megatron.context_parallel_size=1
{REF}.megatron.expert_model_parallel_size=1 {REF}.megatron.expert_tensor_parallel_size=1
{REF}.megatron.use_mbridge=True {REF}.megatron.vanilla_mbridge=False {REF}.megatron.use_remove_padding=True
{REF}.megatron.use_dist_checkpointing=True {REF}.profile_ranks=[0,3] {REF}.profile_ranks_all=False
{REF}.profile_discrete=True {ROLLOUT}.mode=async {ROLLOUT}.log_prob_micro_batch_size=16
{ROLLOUT}.log_prob_micro_batch_size_per_gpu=160 {ROLLOUT}.log_prob_use_dynamic_bsz=True
{ROLLOUT}.log_prob_max_token_len_per_gpu=24576 {ROLLOUT}.calculate_log_probs=True {ROLLOUT}.free_cache_engine=True
{ROLLOUT}.enable_chunked_prefill=True {ROLLOUT}.profile_ranks=[0,2] {ROLLOUT}.profile_ranks_all=False
{ROLLOUT}.profile_discrete=True {ROLLOUT}.engine_kwargs.sglang.attention_backend=flashinfer
{ROLLOUT}.engine_kwargs.sglang.disable_cuda_graph=False {ROLLOUT}.engine_kwargs.sglang.ep_size=16
{ROLLOUT}.engine_kwargs.vllm.compilation_config.cudagraph_capture_sizes=[4,8]
{ROLLOUT}.engine_kwargs.vllm.compilation_config.cudagraph_mode=FULL_DECODE_ONLY
{MODEL}.lora.rank=0 {MODEL}.lora.alpha=32 trainer.balance_batch=True trainer.log_val_generations=1
model_engine=megatron ray_kwargs.ray_init.runtime_env.env_vars.TRANSFER_QUEUE_ENABLE=1 reward_model.enable=False
trainer.default_hdfs_dir=null {ACTOR}.clip_ratio._target_=x {ACTOR}.optim.lr_wsd_decay_steps=5
trainer.max_critic_ckpt_to_keep=1 critic.enable=True critic.strategy=megatron critic.use_dynamic_bsz=True
critic.shuffle=False critic.rollout_n=5 critic.forward_micro_batch_size_per_gpu=8 critic.load_weight=True
critic.forward_max_token_len_per_gpu=99 critic.ulysses_sequence_parallel_size=1 critic.nccl_timeout=600
critic.data_loader_seed=42
critic.checkpoint.async_save=False critic.profiler.tool_config.nsys.discrete=True critic.profile_ranks=[0,4]
{CRITIC_OPTIM}.total_training_steps=-1 {CRITIC_OPTIM}.override_optimizer_config.optimizer_cpu_offload=True
{CRITIC_MODEL}.enable_gradient_checkpointing=False {CRITIC_MODEL}.use_remove_padding=True {CRITIC_MODEL}.use_rmpad=True
{CRITIC_MODEL}.trust_remote_code=False {CRITIC_MODEL}.tokenizer_path=t {CRITIC_MODEL}.external_lib=null
{CRITIC_MODEL}.override_config.moe_config.freeze_moe_router=False {CRITIC_MODEL}.lora_rank=0
{CRITIC_MODEL}.lora.alpha=32
{CRITIC_MODEL}.enable_activation_offload=True {CRITIC_MODEL}.use_shm=False {CRITIC_MODEL}.fsdp_config.fsdp_size=-1
{CRITIC_MEGATRON}.context_parallel_size=1 {CRITIC_MEGATRON}.expert_model_parallel_size=1 {CRITIC_MEGATRON}.seed=42
{CRITIC_MEGATRON}.use_mbridge=True {CRITIC_MEGATRON}.override_transformer_config.recompute_method=null
{CRITIC_MEGATRON}.override_ddp_config.overlap_grad_reduce=True {CRITIC_MEGATRON}.dtype=bfloat16
""".split()
REFUSED = {  # an override: words of the one line that refuses it
    "reward_model.enable=True": "custom_reward_function.path",
    "reward_model.model.path=x": "custom_reward_function.path",
    "reward_model.micro_batch_size=16": "custom_reward_function.path",
    "data.trust_remote_code=True": "never executed; set it to False",
    f"{ACTOR}.ppo_micro_batch_size=16": f"set {ACTOR}.ppo_micro_batch_size_per_gpu",
    f"{ACTOR}.ulysses_sequence_parallel_size=2": "set it to 1",
    f"{MEGATRON}.dist_checkpointing_path=d": f"set that: {MODEL}.path",
    f"{REF}.megatron.dist_checkpointing_path=d": f"the model of {MODEL}.path",
    f"{MEGATRON}.expert_model_parallel_size=8": "no experts; set it to 1",
    f"{MEGATRON}.expert_tensor_parallel_size=2": "no experts; set it to 1",
    f"{MEGATRON}.use_megatron_fsdp=True": "set it to False",
    f"{TRANSFORMER}.num_layers_in_last_pipeline_stage=13": "as many layers",
    f"{MODEL}.lora.rank=16": "LoRA is not offered",
    # and of its trainer's settings, where they would change what is computed
    f"{ACTOR}.shuffle=True": "set it to False",
    f"{ACTOR}.policy_loss.loss_mode=gspo": f"set {ACTOR}.policy_loss to one of ppo_clip",
    f"{OPTIM}.lr_scheduler_type=step": f"set {OPTIM}.lr_decay_style to one of constant, cosine",
    f"{OPTIM}.optimizer=SGD": "Adam",
    f"{OPTIM}.betas=[0.9]": f"set these: {OPTIM}.beta1 and {OPTIM}.beta2",
    f"{OPTIM}.min_lr_ratio=0.1": f"set {OPTIM}.min_lr",
    f"{OPTIM}.override_optimizer_config.use_precision_aware_optimizer=True": "leave it out",
    f"{TRANSFORMER}.attention_dropout=0.1": "config.json",
    f"{MODEL}.override_config.attention_dropout=0.1": "config.json",
    f"{ROLLOUT}.ignore_eos=True": "set it to False",
    f"{ROLLOUT}.do_sample=False": "set it to True",
    f"{ROLLOUT}.quantization=fp8": "leave it out",
    f"{ROLLOUT}.multi_turn.enable=True": "one turn; set it to False",
    f"{ROLLOUT}.engine_kwargs.vllm.swap_space=4": "leave it out",
    "algorithm.rollout_correction.rollout_is_batch_normalize=True": "leave it out",
    "algorithm.rollout_correction.rollout_rs_threshold_lower=0.5": "rollout_rs_threshold=LOWER_UPPER; leave it out",
    "model_engine=dp": "set it to megatron",
    # and of the critic
    "critic.strategy=fsdp": "set it to megatron",
    "critic.shuffle=True": "set it to False",
    "critic.ppo_micro_batch_size=256": "set critic.ppo_micro_batch_size_per_gpu",
    "critic.ulysses_sequence_parallel_size=2": "set it to 1",
    "critic.load_weight=False": "set it to True",
    f"{CRITIC_OPTIM}.min_lr_ratio=0.1": f"set {CRITIC_OPTIM}.min_lr",
    f"{CRITIC_OPTIM}.total_training_steps=100": f"set {CRITIC_OPTIM}.lr_decay_steps",
    f"{CRITIC_OPTIM}.warmup_style=step": f"set {CRITIC_OPTIM}.lr_decay_style to one of constant, cosine",
    f"{CRITIC_MODEL}.use_remove_padding=False": "set it to True",
    f"{CRITIC_MODEL}.trust_remote_code=True": "never executed; set it to False",
    f"{CRITIC_MODEL}.override_config.attention_dropout=0.1": f"config.json says; change that in {CRITIC_MODEL}.path",
    f"{CRITIC_MODEL}.lora.rank=16": "LoRA is not offered",
    f"{CRITIC_MEGATRON}.dist_checkpointing_path=d": f"set that: {CRITIC_MODEL}.path",
    f"{CRITIC_MEGATRON}.context_parallel_size=2": "set it to 1",
    f"{CRITIC_MEGATRON}.expert_model_parallel_size=8": "no experts; set it to 1",
}


def key_of(override: str) -> str:
    return override.partition("=")[0]


def test_every_key_of_verl_s_examples_is_taken():
    assert {key_of(override) for override in OURS} <= set(SETTINGS)
    assert not {key_of(override) for override in (*READ, *NOTED, *REFUSED)} & set(SETTINGS)
    loaded = load_config("qwen2_5_7b", [f"+{override}" for override in (*OURS, *NOTED)])
    assert loaded.config.data.train_files == ["a/gsm8k/train.parquet", "a/math/train.parquet"]
    about_verl = [note for note in loaded.notes if " has no effect: " in note]
    assert [note.partition("=")[0] for note in about_verl] == [key_of(override) for override in NOTED]


@pytest.mark.parametrize("override", READ)
def test_keys_that_stand_for_others(override):
    loaded = load_config("demo", [override])
    assert {key: value_of(loaded.config, key) for key in READ[override]} == READ[override]
    assert loaded.notes[0].startswith(f"{key_of(override)}=") and " is read as " in loaded.notes[0]


@pytest.mark.parametrize("override", REFUSED)
def test_keys_that_are_refused_say_what_to_do(override):
    words = REFUSED[override]
    for prefix in ("", "+"):
        with pytest.raises(ConfigError) as caught:
            load_config("demo", [prefix + override])
        said = str(caught.value)
        assert said.startswith(f"{key_of(override)}=") and "did you mean" not in said and "\n" not in said
        parts = words.split(": ") if words.startswith("set th") else [words]
        assert all(part in said for part in parts), said


def test_presets_may_have_verl_s_keys(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "defaults: [qwen2_5_7b, _self_]\ntrainer.balance_batch: true\ncritic:\n  enable: true\n"
        "actor_rollout_ref:\n  actor:\n    _target_: x\n    grad_clip: 0.5\n    policy_loss: {loss_mode: vanilla}\n"
    )
    loaded = load_config("mine", [f"{ACTOR}.policy_loss=reinforce"], tmp_path)
    actor = loaded.config.actor_rollout_ref.actor
    assert (actor.optim.clip_grad, actor.policy_loss) == (0.5, "reinforce")
    assert {note.partition("=")[0] for note in loaded.notes} == {
        *("trainer.balance_batch", "critic.enable"),
        *(f"{ACTOR}.{name}" for name in ("_target_", "grad_clip", "policy_loss.loss_mode")),
    }
    (tmp_path / "mine.yaml").write_text("defaults: [demo, _self_]\ncritic: {strategy: fsdp}\n")
    with pytest.raises(ConfigError, match=r"critic.strategy=fsdp \(in the preset mine\) is refused: the critic is"):
        load_config("mine", config_dir=tmp_path)


def test_a_key_and_what_it_stands_for_must_agree():
    theirs, ours = f"{ACTOR}.grad_clip=0.5", f"{OPTIM}.clip_grad"
    with pytest.raises(ConfigError, match=f"{theirs} stands for {ours}, which is set to 1.0; set only {ours}"):
        load_config("demo", [theirs, f"{ours}=1.0"])
    assert load_config("demo", [theirs, f"{ours}=0.5"]).config.actor_rollout_ref.actor.optim.clip_grad == 0.5


def test_the_longest_entry_counts():
    assert isinstance(fate_of("critic.enable"), Ignored) and fate_of("critic.enabled") is None
    assert isinstance(fate_of(f"{ROLLOUT}.engine_kwargs.vllm.compilation_config.level"), Ignored)
    assert isinstance(fate_of(f"{ROLLOUT}.engine_kwargs.vllm.swap_space"), Refused)
    assert isinstance(fate_of("data.seed"), ReadAs)
    assert fate_of("trainer.seed") is None and fate_of("trainer.sed") is None and fate_of("criticality") is None


@pytest.mark.parametrize("group", ["critic", "critic.optim", f"{ACTOR}.megatron.override_transformer_config"])
def test_a_group_of_settings_is_no_foreign_key(tmp_path, group):
    assert fate_of(group) is None
    with pytest.raises(ConfigError, match=f"{group}=5: {group} is a group of settings"):
        load_config("demo", [f"{group}=5"])
    (tmp_path / "mine.yaml").write_text(f"defaults: [demo, _self_]\n{group}:\n")  # with nothing below
    assert load_config("mine", config_dir=tmp_path) == load_config("demo")


def test_the_table_names_settings_that_exist_and_none_of_them_as_a_foreign_key():
    keys = [key for row in TABLE for key in row]
    assert len(keys) == len(set(keys)) and not set(keys) & set(SETTINGS)
    for fate in TABLE.values():
        if isinstance(fate, ReadAs):
            assert set(fate.targets) <= set(SETTINGS)
        else:
            assert fate.why and not fate.why.endswith(".")


def test_the_page_has_every_row_of_the_table():
    page = docs.page()
    for row, fate in TABLE.items():
        assert all(f"`{key}`" in page for key in row) and fate.words.replace("|", "\\|") in page


def test_verl_s_file_logger_is_metrics_jsonl():
    loaded = load_config("demo", ["trainer.logger=[console,file]"])
    assert loaded.config.trainer.logger == ["console"] and "metrics.jsonl" in loaded.notes[0]
