"""ReMax (arXiv 2310.10505) for Qwen2.5 and Qwen3: a Megatron-Core policy, vLLM rollouts, the bridge between them."""

__version__ = "0.1.0"
