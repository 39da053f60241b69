"""Qwen2 as a Megatron-Core model: architecture, attention backends, and the table that names its weights."""
