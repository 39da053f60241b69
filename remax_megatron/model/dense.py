"""A dense model as Megatron-Core `GPTModel` chunks whose output is the hidden states before the head.

The head is applied by `remax_megatron.algorithm.logprob` to the scored positions only, so the logits of a whole
micro-batch never exist; a critic's is `remax_megatron.model.value_head`. Weights come from
`remax_megatron.model.live_weights`. What one family of models has and another has not is in
`remax_megatron/model_family.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor

from remax_megatron.model.attention import PackedRows
from remax_megatron.model.layers import layer_spec
from remax_megatron.model.rotary import inverse_frequencies, softmax_scale
from remax_megatron.model.value_head import ValueHead
from remax_megatron.model_facts import ModelFacts
from remax_megatron.parallel import cpu_platform
from remax_megatron.parallel.layout import Layout
from remax_megatron.types import Recompute
from remax_megatron.weights.weight_table import padded_vocab_size


class HiddenStatesModel(GPTModel):
    """GPTModel that returns the final-norm hidden states [T, 1, H] (cut over ranks under sequence parallelism)."""

    def _preprocess(self, input_ids, position_ids, *args, packed_seq_params: PackedRows, **kwargs):
        """Where the rotation is by token, the angles (index 1 of the result) are those of `position_ids`; None where
        the attention rotates. Megatron's own way (0.16.1, 0.19.2: rope_utils.py, `_apply_rotary_pos_emb_thd`) reads
        the lengths of the rows back from the device and rotates row by row, in every layer."""
        made = list(super()._preprocess(input_ids, position_ids, *args, packed_seq_params=packed_seq_params, **kwargs))
        if packed_seq_params.angles_per_token:
            made[1] = made[1].index_select(0, position_ids[0])  # [T, 1, 1, head_dim]
        if packed_seq_params.cu_seqlens_q is None:
            packed_seq_params.rotate_by(made[1].squeeze(1), self.config.params_dtype)
            made[1] = None
        return tuple(made)

    def _postprocess(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        return hidden_states

    def head_weight(self) -> Tensor:
        """[V, H]: this tensor-parallel rank's rows of the output layer (the embedding's when tied)."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def transformer_config(
    facts: ModelFacts,
    layout: Layout,
    *,
    dtype: torch.dtype,
    sequence_parallel: bool,
    recompute: Recompute,
    layers: str,
    attention_backend: str,
) -> TransformerConfig:
    """Megatron's description of the architecture in `facts` under `layout`.

    dtype              of the weights
    sequence_parallel  whether norms and residuals are cut over the tensor-parallel ranks
    recompute          what the backward pass computes again
    layers             a result of `choose_layers`
    attention_backend  a result of `choose_backend`
    """
    fields: dict[str, Any] = dict(
        **_architecture(facts),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        sequence_parallel=sequence_parallel and layout.tp > 1,
        calculate_per_token_loss=True,  # tokens arrive weighed by global counts: algorithm.aggregation
        perform_initialization=False,
        attention_softmax_in_fp32=True,
        bias_activation_fusion=True,  # SwiGLU in one kernel
        gradient_accumulation_fusion=False,  # it would ask for apex in the output layer: see fuse_weight_gradients
        # One kernel rotates all rows. Without Transformer Engine, see HiddenStatesModel.
        apply_rope_fusion="transformer_engine" in (layers, attention_backend),
        # "auto" would fall back to unfused attention without a word.
        attention_backend=AttnBackend.fused if attention_backend == "transformer_engine" else AttnBackend.auto,
        # Without the overlap, an interleaved schedule on two stages would match the messages of the two directions
        # with each other (one pair of ranks, one batch); see the check in Megatron-LM arguments.py.
        batch_p2p_comm=layout.vpp == 1,
        overlap_p2p_comm=layout.vpp > 1,
        batch_p2p_sync=False,  # a device synchronisation per message, for versions of torch long gone
    )
    fields |= _recompute_fields(recompute)
    if layout.device.type != "cuda":
        fields |= cpu_platform.transformer_config_overrides()
    return TransformerConfig(**fields)


def _architecture(facts: ModelFacts) -> dict[str, Any]:
    """Megatron's settings for what `facts` say."""
    return dict(
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
        add_qkv_bias=facts.family.qkv_bias,
        qk_layernorm=facts.family.qk_norm,  # has their gradients summed over tensor-parallel ranks
        softmax_scale=softmax_scale(facts),
    )


def _recompute_fields(recompute: Recompute) -> dict[str, Any]:
    """Megatron's settings for what the backward pass computes again."""
    if recompute.granularity == "full":
        method, count = recompute.method, recompute.num_layers
        return {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": count}
    if recompute.granularity == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(recompute.modules)}
    return {}


def build_chunks(
    facts: ModelFacts, config: TransformerConfig, layout: Layout, layers: str, attention_backend: str
) -> list[HiddenStatesModel]:
    """This rank's model chunks (one per virtual stage), weights not yet set, on `layout.device`."""
    layer, norm = layer_spec(layers, attention_backend, qk_norm=facts.family.qk_norm)
    frequencies = inverse_frequencies(facts)
    chunks = []
    for stage in range(layout.vpp):
        vp_stage = stage if layout.vpp > 1 else None
        num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
        block = TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)
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
        if facts.value_head and chunk.post_process:
            chunk.output_layer = ValueHead(facts.hidden_size, config.params_dtype)
        chunk.rotary_pos_emb.inv_freq = frequencies.to(chunk.rotary_pos_emb.inv_freq.device)
        chunks.append(chunk.to(layout.device))
    return chunks
