"""Seeds from what a draw is for: (run seed, step, prompt, sample), never from time or rank order."""

from __future__ import annotations

import numpy as np


def derive_seed(*parts: int) -> int:
    """A 63-bit seed from integers 0 to 2^32 - 1; the same on every machine and in every process.

    Their number counts too: numpy alone would take (1,) and (1, 0) for the same entropy.
    """
    return int(np.random.SeedSequence([len(parts), *parts]).generate_state(1, np.uint64)[0] >> np.uint64(1))
