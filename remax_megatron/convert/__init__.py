"""Converters between Hugging Face folders and Megatron checkpoints: `remax-convert`, and the scripts of convert/."""
