"""Which keys of a model's config.json are known, and what becomes of one that is not.

    read or harmless    no word. They are those of the public Qwen models, of transformers 4 and 5 (which wrote all of
                        its defaults into older folders), and of tools that leave their mark
    unknown, switched off (null, false, 0, empty)      no word
    unknown, with a word in it that belongs to the computation (`attention`, `rope`, `norm`, `scale`, ...)    refused:
                        policy and rollout engine could compute different things
    any other unknown one                              noted by name

Pure: no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What `ModelFacts` is made of, or checks.
READ = _words(
    """architectures model_type hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
    head_dim vocab_size tie_word_embeddings max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters
    hidden_act quantization_config use_sliding_window layer_types attention_bias is_causal
    partial_rotary_factor"""
)
# Written by transformers, and without effect on a dense decoder: dropout, which policy and engine leave out; what is
# read with use_sliding_window=true alone; how tensors are stored or computed; generation; classification.
HARMLESS = _words(
    """attention_dropout hidden_dropout initializer_range max_window_layers sliding_window use_cache dtype
    torch_dtype transformers_version _name_or_path name_or_path auto_map _commit_hash _attn_implementation
    attn_implementation _attn_implementation_autoset _attn_implementation_internal _flash_attn_2_enabled
    _experts_implementation experts_implementation chunk_size_feed_forward cross_attention_hidden_size
    finetuning_task id2label label2id num_labels problem_type is_decoder output_attentions output_hidden_states
    output_scores return_dict return_dict_in_generate prefix task_specific_params tf_legacy_loss
    tokenizer_class torchscript use_bfloat16 keys_to_ignore_at_inference pretraining_tp
    bad_words_ids begin_suppress_tokens do_sample diversity_penalty early_stopping exponential_decay_length_penalty
    length_penalty max_length max_new_tokens min_length no_repeat_ngram_size encoder_no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences remove_invalid_values repetition_penalty suppress_tokens
    temperature top_k top_p typical_p unsloth_fixed model_max_length tokenizer_model_max_length tokenizer_padding_side
    classifier_dropout"""
)
HARMLESS_ENDINGS = ("_token_id", "_token_ids", "_version")

# A key with one of these words in it, or with a word that begins with a stem, may change the computation.
WORDS = _words("act alpha beta block cap cross dim dims ffn gate gated head heads linear logn mlp proj tie tied yarn")
STEMS = _words(
    """activ adapt alibi atten attn bias bidirect causal chunk compress conv embed encoder expert factor hidden kernel
    layer logit lora mamba moe mrope mscale mtp multipl mup nextn norm peft posit prun quant recurr relative residual
    rms rope rotary rout scal sink slid softcap spars ssm theta vision window"""
)


def refused_key(config: Mapping[str, Any]) -> str | None:
    """The first key that is not known and may change what the model computes, None when there is none."""
    return next((key for key in sorted(_unknown(config)) if _computes(key)), None)


def noted_keys(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys that are not known and do not look as if they changed what the model computes."""
    return tuple(key for key in sorted(_unknown(config)) if not _computes(key))


def shortened(value: Any, length: int = 60) -> str:
    """A value of config.json as it stands there, cut to `length` characters, for a message."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= length else text[: length - 3] + "..."


def _unknown(config: Mapping[str, Any]) -> list[str]:
    """The keys that are in no list and switched on."""
    known = READ | HARMLESS
    return [key for key, value in config.items() if key not in known and not key.endswith(HARMLESS_ENDINGS) and value]


def _computes(key: str) -> bool:
    """Whether a word of the key belongs to the computation."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower()
    words = re.findall(r"[a-z]+", spaced)
    return any(word in WORDS or word.startswith(tuple(STEMS)) for word in words)
