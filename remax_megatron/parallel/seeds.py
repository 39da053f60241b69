"""Seeds from what a draw is for: (run seed, step, prompt, sample), never from time or rank order."""

from __future__ import annotations

import numpy as np


def derive_seed(*parts: int) -> int:
    """A 63-bit seed from non-negative integers; the same on every machine and in every process."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
