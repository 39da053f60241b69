"""The frequencies of the rotary embedding, plain and stretched by YaRN, against those of transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from remax_megatron.model.rotary import inverse_frequencies, softmax_scale
from remax_megatron.model_facts import ModelError, ModelFacts, Yarn

BASE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
}
FAMILIES = {
    "qwen2": BASE | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "qwen3": BASE | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 64},
}
OLD = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
ROPES: dict[str, dict[str, Any]] = {
    "plain": {"rope_theta": 1000000.0},
    "no theta": {},
    # as the model cards of Qwen2.5 and Qwen3 have it, in the spellings of transformers 4 and 5
    "Qwen2.5, old": {"rope_theta": 1000000.0, "rope_scaling": OLD},
    "Qwen3, old": {"rope_theta": 1000000, "rope_scaling": {**OLD, "rope_type": "yarn"}},
    "new": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}},
    "new, all keys": {
        "rope_parameters": {
            **{"rope_type": "yarn", "rope_theta": 5e6, "factor": 2.5, "original_max_position_embeddings": 4096},
            **{"beta_fast": 16, "beta_slow": 2.0, "truncate": False},
        }
    },
    "the usual attention factor": {"rope_scaling": {**OLD, "attention_factor": 0.1 * math.log(4.0) + 1.0}},
    "factor 1": {"rope_scaling": {**OLD, "factor": 1}},
    "one pair": {"rope_scaling": {**OLD, "original_max_position_embeddings": 4, "factor": 20000.0}},
}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_frequencies_and_attention_factor_are_those_of_transformers(family: str, rope: str, tmp_path: Path) -> None:
    from transformers import AutoConfig
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    config = FAMILIES[family] | ROPES[rope]
    facts = ModelFacts.from_hf_config(config, "x")
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = Qwen2RotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    found = inverse_frequencies(facts)
    assert found.dtype == torch.float32 and torch.equal(found, theirs.inv_freq)
    factor = 1.0 if facts.yarn is None else facts.yarn.attention_factor
    assert factor == theirs.attention_scaling
    scale = softmax_scale(facts)
    assert (scale is None) == (facts.yarn is None)
    if scale is not None:
        assert scale == pytest.approx(factor**2 / facts.head_dim**0.5, rel=1e-12)


def test_yarn_by_hand() -> None:
    """head_dim 64, theta 10^6, original length 32768, factor 4. 32 turns fit it at pair 64 ln(32768 / 64 pi) / (2 ln
    10^6) = 11.80, one at 19.83: below pair 11 nothing changes, from pair 20 on the frequency is a quarter, between
    them it falls in nine equal steps."""
    yarn = inverse_frequencies(ModelFacts.from_hf_config(FAMILIES["qwen3"] | ROPES["Qwen3, old"], "x"))
    plain = inverse_frequencies(ModelFacts.from_hf_config(FAMILIES["qwen3"] | ROPES["plain"], "x"))
    part = yarn / plain
    torch.testing.assert_close(part[:12], torch.ones(12))
    torch.testing.assert_close(part[20:], torch.full((12,), 0.25))
    torch.testing.assert_close(part[11:21].diff(), torch.full((9,), -0.75 / 9), rtol=1e-4, atol=1e-5)
    assert Yarn(4.0, 32768).attention_factor == pytest.approx(1.1386, abs=1e-4)


def test_positions_reach_as_far_as_the_engine_has_angles() -> None:
    def positions(**rope: Any) -> int:
        return ModelFacts.from_hf_config(FAMILIES["qwen3"] | {"rope_scaling": OLD | rope}, "x").max_position_embeddings

    assert positions() == 32768  # what config.json says: it has to be raised for longer rows
    assert positions(factor=2.0, original_max_position_embeddings=8192) == 16384


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "llama3": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"rope scaling \(llama3\).*offers yarn"),
    "linear": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope scaling \(linear\)"),
    "dynamic, new": ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, r"rope scaling \(dynamic\)"),
    "mrope": ({"rope_scaling": {"type": "default", "mrope_section": [8, 12, 12]}}, "mrope_section=.*not known"),
    "no factor": ({"rope_scaling": {"type": "yarn"}}, "factor=None, expected a number of at least 1"),
    "small factor": ({"rope_scaling": OLD | {"factor": 0.5}}, "factor=0.5, expected a number of at least 1"),
    "a word": ({"rope_scaling": "yarn"}, "expected an object"),
    "other key": ({"rope_scaling": OLD | {"extrapolation_factor": 2.0}}, "extrapolation_factor=2.0 in rope scaling"),
    "attention factor": ({"rope_scaling": OLD | {"attention_factor": 1.0}}, "attention factor of 1 .*1.13863.*remove"),
    "mscale": ({"rope_scaling": OLD | {"mscale": 1.0, "mscale_all_dim": 0.5}}, "attention factor of 1.06482 .*mscale"),
    "beta": ({"rope_scaling": OLD | {"beta_fast": "many"}}, "beta_fast='many', expected a positive number"),
    "truncate": ({"rope_scaling": OLD | {"truncate": "no"}}, "truncate='no'.*true or false"),
    "original": ({"rope_scaling": OLD | {"original_max_position_embeddings": 0}}, "original_max.*positive integer"),
    "two types": ({"rope_scaling": OLD | {"rope_type": "linear"}}, "two different kinds of rope scaling"),
    "two places": ({"rope_scaling": OLD, "rope_parameters": {"rope_type": "default"}}, "two different kinds"),
    "two thetas": ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "two values of rope_theta, 1000000.0"),
    "partial": ({"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 1e6}}, "partial_rotary_factor=0.5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_offered_is_refused(case: str) -> None:
    change, words = REFUSED[case]
    with pytest.raises(ModelError, match=f"^DIR=x: config.json says {'.*' if case == 'a word' else ''}.*{words}"):
        ModelFacts.from_hf_config(FAMILIES["qwen2"] | change, "x", "DIR")
