"""The families of dense models, and in what they differ. A new one is an entry of `FAMILIES`; CONTRIBUTING.md has the
recipe.

What is not said here is the same in all: RMSNorm before attention and MLP, rotary embedding of halves, grouped queries,
a gated MLP with SiLU, no bias outside the attention.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """What tells the models of a family from those of another.

    model_type, architecture  of config.json
    critic                    its architecture with a value for every token in place of the words
    qkv_bias                  whether queries, keys and values have a bias
    qk_norm                   whether each head's queries and keys are normalised (RMSNorm over head_dim) before they
                              are rotated
    head_dim                  what a config.json that does not say it means; None: hidden_size / num_attention_heads,
                              and no other is legal
    example                   a model, for messages
    """

    model_type: str
    architecture: str
    critic: str
    qkv_bias: bool
    qk_norm: bool
    head_dim: int | None
    example: str


FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            "Qwen2ForTokenClassification",
            qkv_bias=True,
            qk_norm=False,
            head_dim=None,
            example="Qwen2.5-7B-Instruct",
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            "Qwen3ForTokenClassification",
            qkv_bias=False,
            qk_norm=True,
            head_dim=128,
            example="Qwen3-8B",
        ),
    )
}
