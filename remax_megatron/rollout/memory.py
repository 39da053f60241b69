"""Bytes that the rollout engine takes on a GPU beside its own budget, from the model's shape. Pure; for the ledger.

vLLM measures what it needs once, when it starts, with a dummy batch of answers; gpu_memory_utilization covers that.
What is here comes on top, and was counted on vLLM 0.24 with real tensors (tests/vllm_cuda).
"""

from __future__ import annotations

from remax_megatron.model_facts import ModelFacts

NUM_CANARIES = 8  # prompts of the canary (bridge.py)
NUM_GENERATED = 32  # tokens per prompt; together enough for a mean that rounding noise hardly moves
CANARY_TOKENS = 256  # of a canary's prompt: its logits exist at once, over the whole vocabulary
_VOCABULARY_BLOCK = 64  # rows, to a multiple of which vLLM pads the vocabulary


def canary_bytes(facts: ModelFacts, longest_prompt: int) -> int:
    """The logits of the canary's prompt in float32, two and a half times; prompts have `longest_prompt` tokens at most.

    vLLM 0.24 scores prompts one after another and not in chunks (gpu_model_runner.py, _get_prompt_logprobs_dict):
    logits, their log-softmax and what ranks the tokens live together. On each rank; under tensor parallelism too.
    """
    return int(2.5 * (min(CANARY_TOKENS, longest_prompt) - 1) * facts.vocab_size * 4)


def largest_module_bytes(facts: ModelFacts, tp: int, itemsize: int) -> int:
    """The largest module of the engine, one rank's share, of `itemsize` bytes a parameter.

    While weights are loaded, vLLM 0.24 makes each module once more, fills the copy when its last tensor has come, and
    copies it over (model_loader/reload/layerwise.py, materialize_layer). The buckets of the stream come on top: what
    a module has got is kept until it is complete, so that the bucket before the current one may be alive too.
    """
    hidden, ffn = facts.hidden_size, facts.ffn_hidden_size
    kv_heads = max(1, facts.num_key_value_heads // tp)  # copied where there are more ranks than heads
    qkv_rows = (facts.num_attention_heads // tp + 2 * kv_heads) * facts.head_dim
    vocabulary = -(-facts.vocab_size // _VOCABULARY_BLOCK) * _VOCABULARY_BLOCK
    modules = {
        "embed_tokens and lm_head": vocabulary // tp * hidden,
        "qkv_proj": qkv_rows * (hidden + 1),
        "o_proj": facts.num_attention_heads * facts.head_dim // tp * hidden,
        "gate_up_proj": 2 * ffn // tp * hidden,
        "down_proj": ffn // tp * hidden,
    }
    return max(modules.values()) * itemsize
