"""Checkpoints of a running training: written whole or not at all, found again, checked, and resumed exactly."""
