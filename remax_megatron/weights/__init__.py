"""Weights at rest: the formats of folders, reading and writing them, and the one table of names. No Megatron."""
