"""Which modules the transformer layers are made of: Transformer Engine's, or Megatron's local ones.

    transformer_engine  each norm is fused into the column-parallel linear behind it, the linears add their weight
                        gradients to the float32 buffer themselves, and one kernel rotates queries and keys
    local               plain torch modules, on any device

The two differ in the names of the norms' weights alone, see `TE_NAMES` in `weights/weight_table.py`: weights and
checkpoints of one are those of the other. The attention is chosen apart from the layers, in `model/attention.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from remax_megatron.errors import UserError
from remax_megatron.model.attention import core_attention

KEY = "actor_rollout_ref.actor.megatron.layers"


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
        """Normalise `hidden` [..., H] over its last dimension."""
        return F.rms_norm(hidden, (hidden.shape[-1],), self.weight, self.eps)


def choose_layers(requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """The layers to use on `device` for `dtype`; UserError when the requested ones cannot run there.

    On a GPU Transformer Engine multiplies float32 matrices in TF32 (its common/gemm/cublaslt_gemm.cu), which is not
    within the limits of float32 runs: those take the local layers.
    """
    exact = device.type == "cpu" or dtype == torch.bfloat16
    if requested == "auto":
        return "transformer_engine" if HAVE_TE and device.type == "cuda" and exact else "local"
    if requested == "transformer_engine" and not HAVE_TE:
        raise UserError(f"{KEY}=transformer_engine: Transformer Engine cannot be imported here; set {KEY}=auto")
    if requested == "transformer_engine" and not exact:
        raise UserError(
            f"{KEY}=transformer_engine with dtype=float32: Transformer Engine would multiply in TF32; set {KEY}=local, "
            "or actor_rollout_ref.actor.megatron.dtype=bfloat16"
        )
    return requested


def layer_spec(layers: str, attention_backend: str, *, qk_norm: bool = False) -> tuple[ModuleSpec, type]:
    """Megatron's description of one transformer layer, and the class of the final norm. With `qk_norm` each head's
    queries and keys are normalised."""
    if layers == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        layer, norm = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_norm), TENorm
    else:
        layer, norm = get_gpt_layer_local_spec(normalization="RMSNorm"), RMSNorm
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        if qk_norm:
            attention = layer.submodules.self_attention.submodules
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    layer.submodules.self_attention.submodules.core_attention = core_attention(attention_backend)
    return layer, norm


def fuse_weight_gradients(chunks: list[torch.nn.Module]) -> None:
    """Let Transformer Engine's linears in `chunks`, wrapped in Megatron's DDP, add to `main_grad` themselves.

    The setting in Megatron's config would do it too, but it would also ask for apex in the output layer, which is not
    Transformer Engine's. A new model's very first backward pass overwrites `main_grad` (it is zero then); all later
    ones add, so the buffers have to be zeroed before every update.
    """
    for chunk in chunks:
        for module in chunk.modules():
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = True
