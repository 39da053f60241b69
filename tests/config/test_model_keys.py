"""Keys of config.json: those of the public models pass without a word, others are noted or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from remax_megatron.config.load import load_config
from remax_megatron.config.rules import validate
from remax_megatron.model_facts import ModelError, ModelFacts

SIZES = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
COMMON = SIZES | {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "model_type": "qwen2",
    "rms_norm_eps": 1e-06,
    "use_cache": True,
    "use_sliding_window": False,
}
OLD = COMMON | {"rope_theta": 1000000.0, "sliding_window": 131072, "torch_dtype": "bfloat16"}
NEW = COMMON | {
    "dtype": "bfloat16",
    "layer_types": ["full_attention"] * 28,
    "pad_token_id": None,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "sliding_window": None,
    "transformers_version": "5.17.0",
}
# The key sets of the public folders, by the version of transformers that wrote them.
PUBLIC: dict[str, dict[str, Any]] = {
    "Qwen2-7B-Instruct": OLD | {"transformers_version": "4.41.2"},
    "Qwen2.5-7B": OLD | {"transformers_version": "4.40.1", "use_mrope": False},
    "Qwen2.5-7B-Instruct": OLD | {"transformers_version": "4.43.1"},
    "Qwen2.5-Math-7B": OLD | {"max_position_embeddings": 4096, "rope_theta": 10000, "sliding_window": 4096},
    "Qwen2.5-Coder-7B-Instruct": OLD | {"transformers_version": "4.44.0", "rope_scaling": None},
    "QwQ-32B": OLD | {"transformers_version": "4.43.1", "pad_token_id": 151643},
    "DeepSeek-R1-Distill-Qwen-7B": OLD | {"rope_theta": 10000, "use_mrope": False, "sliding_window": 4096},
    "saved by transformers 4.48": OLD
    | {"_name_or_path": "Qwen/Qwen2.5-7B", "_attn_implementation_autoset": True, "rope_scaling": None},
    "fine-tuned with unsloth": OLD | {"unsloth_fixed": True, "unsloth_version": "2025.3.19", "auto_map": {"a": "b.C"}},
    "saved by transformers 5": NEW | {"use_mrope": False},
    "all that transformers 4 knew": OLD
    | {
        "add_cross_attention": False,
        "bad_words_ids": None,
        "chunk_size_feed_forward": 0,
        "cross_attention_hidden_size": None,
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
        "label2id": {"LABEL_0": 0, "LABEL_1": 1},
        "is_decoder": False,
        "is_encoder_decoder": False,
        "length_penalty": 1.0,
        "max_length": 20,
        "output_hidden_states": False,
        "pruned_heads": {},
        "return_dict": True,
        "temperature": 1.0,
        "tie_encoder_decoder": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "torchscript": False,
        "top_k": 50,
    },
}


QWEN3 = OLD | {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "rope_scaling": None,
    "sliding_window": None,
    "transformers_version": "4.51.0",
}
PUBLIC |= {
    "Qwen3-8B": QWEN3,
    "Qwen3-4B-Instruct-2507": QWEN3 | {"max_position_embeddings": 262144, "rope_theta": 5000000},
    "Qwen3-8B, saved by transformers 5": {key: value for key, value in QWEN3.items() if key in NEW}
    | NEW
    | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128, "attention_bias": False},
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_configs_pass_without_a_word(name: str) -> None:
    facts = ModelFacts.from_hf_config(PUBLIC[name], name)
    assert (facts.num_layers, facts.head_dim, facts.vocab_size) == (28, 128, 152064)
    assert facts.rope_theta == PUBLIC[name].get("rope_theta", 1e6)
    assert facts.unknown_keys == () and facts.note_on_unknown_keys() is None


def test_what_transformers_itself_writes_is_known() -> None:
    from transformers import Qwen2Config, Qwen3Config

    for family, written in (("Qwen2", Qwen2Config), ("Qwen3", Qwen3Config)):
        config = written(architectures=[f"{family}ForCausalLM"]).to_dict()
        assert ModelFacts.from_hf_config(config, "x").unknown_keys == ()


DUAL = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
REFUSED = {
    "dual_chunk_attention_config": DUAL,
    "use_logn_attn": True,
    "use_mrope": True,
    "qk_norm": True,
    "mlp_bias": True,
    "attn_logit_softcapping": 50.0,
    "residual_multiplier": 0.22,
    "num_local_experts": 8,
    "compression_config": {"format": "int-quantized"},
    "logit_scale": 0.0625,
    "ropeTheta": 5.0,
    "original_max_position_embeddings": 4096,
    "num_nextn_predict_layers": 1,
    "vision_config": {"depth": 32},
}


@pytest.mark.parametrize("key", REFUSED)
def test_unknown_keys_that_can_change_the_computation_are_refused_by_name(key: str) -> None:
    with pytest.raises(ModelError, match=rf"^DIR=x: config.json says {key}=.*; remove the key .*, or set DIR to"):
        ModelFacts.from_hf_config(OLD | {key: REFUSED[key]}, "x", "DIR")


@pytest.mark.parametrize("value", [None, False, 0, 0.0, "", {}, []])
def test_unknown_keys_that_are_switched_off_pass(value: object) -> None:
    facts = ModelFacts.from_hf_config(OLD | dict.fromkeys(REFUSED.keys() - {"is_causal"}, value), "x")
    assert facts.unknown_keys == ()


def test_other_unknown_keys_are_noted_by_name() -> None:
    extra = {"note": "µ", "trained_on": "gsm8k", "character": 1, "image_token_id": 5, "my_version": "2"}
    facts = ModelFacts.from_hf_config(OLD | extra, "x")
    assert facts.unknown_keys == ("character", "note", "trained_on")  # ids of tokens and versions need no word
    assert facts.note_on_unknown_keys() == (
        "config.json has keys that are not known here and have no effect: character, note, trained_on"
    )
    assert facts == ModelFacts.from_hf_config(OLD, "x")  # the model is the same
    config = load_config("demo").config
    small = {**OLD, **extra, "num_attention_heads": 28, "num_hidden_layers": 28}
    notes = validate(config, 2, ModelFacts.from_hf_config(small, "x"))
    assert [note for note in notes if "character, note, trained_on" in note and "model.path=" in note]


@pytest.mark.parametrize(
    "change",
    [
        {"is_causal": False},
        {"partial_rotary_factor": 0.5},
        {"layer_types": ["full_attention"] * 27 + ["sliding_attention"]},
        {"layer_types": "full_attention"},
        {"layer_types": ["linear_attention"] * 28},
    ],
)
def test_known_keys_with_a_value_that_is_not_offered_are_refused(change: dict) -> None:
    (key,) = change
    with pytest.raises(ModelError, match=f"config.json says {key}=.*, which this trainer does not offer; set DIR to"):
        ModelFacts.from_hf_config(OLD | change, "x", "DIR")
    ModelFacts.from_hf_config(OLD | {"is_causal": True, "partial_rotary_factor": 1.0}, "x")


@pytest.mark.parametrize("change", [{"architectures": ["Qwen2Model"]}, {"model_type": "qwen2", "architectures": 5}])
def test_a_model_without_head_is_named(change: dict) -> None:
    with pytest.raises(ModelError, match="not a Qwen2 or Qwen3 model.*expected Qwen2ForCausalLM"):
        ModelFacts.from_hf_config(OLD | change, "x")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html>404</html>", "web page.*download it again"),
        (b"", "is empty; copy or download it again"),
        (b"[" * 100_000, "cannot be read"),
    ],
)
def test_a_config_that_is_something_else(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=f"^DIR=.*: config.json .*{words}"):
        ModelFacts.from_folder(tmp_path, "DIR")
    (tmp_path / "config.json").write_text(json.dumps(OLD))
    assert ModelFacts.from_folder(tmp_path, "DIR").hidden_size == 3584
