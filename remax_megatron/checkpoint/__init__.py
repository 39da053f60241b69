"""Checkpoints of a running training: written whole or not at all, found again, checked, and gone on from exactly."""
