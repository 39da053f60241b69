"""Qwen2 / Qwen2.5 as Megatron-Core `GPTModel` chunks whose output is the hidden states before the head.

The head is applied by `remax_megatron.algorithm.logprob` to the scored positions only, so the logits of a whole
micro-batch never exist. Weights come from `remax_megatron.model.weights`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor

from remax_megatron.config.model_facts import ModelFacts
from remax_megatron.model.attention import SharedPromptParams, core_attention
from remax_megatron.model.weight_table import padded_vocab_size
from remax_megatron.parallel import cpu_platform
from remax_megatron.parallel.layout import Layout


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm whose weight carries Megatron's `sequence_parallel` mark.

    Megatron's own torch norm refuses sequence parallelism (megatron-core 0.16.1, `WrappedTorchNorm`); the mark makes
    its gradient be summed over tensor-parallel ranks. Can go when that norm sets the mark.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_ignored):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, (hidden.shape[-1],), self.weight, self.eps)


class HiddenStatesModel(GPTModel):
    """GPTModel that returns the final-norm hidden states [T, 1, H] (cut over ranks under sequence parallelism)."""

    def _preprocess(self, input_ids, position_ids, *args, packed_seq_params=None, **kwargs):
        """Under shared prompts the rotary angles (index 1 of the result) are those of `position_ids`."""
        made = list(super()._preprocess(input_ids, position_ids, *args, packed_seq_params=packed_seq_params, **kwargs))
        if isinstance(packed_seq_params, SharedPromptParams):
            made[1] = made[1].index_select(0, position_ids[0])
        return tuple(made)

    def _postprocess(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        return hidden_states

    def head_weight(self) -> Tensor:
        """[V, H]: this tensor-parallel rank's rows of the output layer (the embedding's when tied)."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def transformer_config(
    facts: ModelFacts, layout: Layout, *, dtype: torch.dtype, sequence_parallel: bool, recompute: bool
) -> TransformerConfig:
    """Megatron's description of the architecture in `facts` under `layout`."""
    fields = dict(
        num_layers=facts.num_layers,
        hidden_size=facts.hidden_size,
        ffn_hidden_size=facts.ffn_hidden_size,
        num_attention_heads=facts.num_attention_heads,
        num_query_groups=facts.num_key_value_heads,
        kv_channels=facts.head_dim,
        layernorm_epsilon=facts.rms_norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        sequence_parallel=sequence_parallel and layout.tp > 1,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # no experts here, but the default refuses variable lengths
        calculate_per_token_loss=True,  # tokens arrive weighed by global counts: algorithm.aggregation
        perform_initialization=False,
        attention_softmax_in_fp32=True,
        gradient_accumulation_fusion=False,
        # Without the overlap, an interleaved schedule on two stages would match the messages of the two directions
        # with each other (one pair of ranks, one batch); see the check in Megatron-LM arguments.py.
        batch_p2p_comm=layout.vpp == 1,
        overlap_p2p_comm=layout.vpp > 1,
    )
    if recompute:
        fields |= dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    if layout.device.type != "cuda":
        fields |= cpu_platform.transformer_config_overrides()
    return TransformerConfig(**fields)


def build_chunks(
    facts: ModelFacts, config: TransformerConfig, layout: Layout, attention_backend: str
) -> list[HiddenStatesModel]:
    """This rank's model chunks (one per virtual stage), weights not yet set, on `layout.device`."""
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.submodules.self_attention.submodules.core_attention = core_attention(attention_backend)
    chunks = []
    for stage in range(layout.vpp):
        vp_stage = stage if layout.vpp > 1 else None
        num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
        block = TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)
        chunk = HiddenStatesModel(
            config=config,
            transformer_layer_spec=block,
            vocab_size=padded_vocab_size(facts.vocab_size, layout.tp),
            max_sequence_length=facts.max_position_embeddings,
            pre_process=mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            share_embeddings_and_output_weights=facts.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=facts.rope_theta,
            parallel_output=True,
            vp_stage=vp_stage,
        )
        chunks.append(chunk.to(layout.device))
    return chunks
