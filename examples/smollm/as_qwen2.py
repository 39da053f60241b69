"""Stores a Llama model, such as SmolLM2-135M-Instruct, as a Qwen2 folder that this trainer reads.

    python examples/smollm/as_qwen2.py HuggingFaceTB/SmolLM2-135M-Instruct runs/smollm2-135m

A Qwen2 layer is a Llama layer with biases on query, key and value; biases of zero leave the logits as they are. Models
with a bias or a scaled rotation of their own are refused by an assertion.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

SAME = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
    max_position_embeddings rms_norm_eps tie_word_embeddings rope_parameters bos_token_id eos_token_id pad_token_id"""


def as_qwen2(llama: PreTrainedModel) -> Qwen2ForCausalLM:
    """The same function of the tokens as a Qwen2 model, in bfloat16."""
    config = llama.config
    assert config.model_type == "llama" and config.hidden_act == "silu", config.model_type
    assert config.rope_parameters["rope_type"] == "default", config.rope_parameters
    model = Qwen2ForCausalLM(Qwen2Config(**{name: getattr(config, name) for name in SAME.split()}))
    missing, unexpected = model.load_state_dict(llama.state_dict(), strict=False)
    assert not unexpected and all(name.endswith("_proj.bias") for name in missing), (missing, unexpected)
    for name in missing:
        model.get_parameter(name).data.zero_()
    return model.to(torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llama", help="hub id or folder of a Llama model")
    parser.add_argument("output", help="new Qwen2 folder")
    options = parser.parse_args()
    model = as_qwen2(AutoModelForCausalLM.from_pretrained(options.llama, dtype=torch.bfloat16))
    model.save_pretrained(options.output)
    AutoTokenizer.from_pretrained(options.llama).save_pretrained(options.output)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
