"""Converters between Hugging Face folders and Megatron checkpoints. The commands in convert/ call their `main`s."""
