"""Refilling a batch: further prompts for those that teach nothing, and what that does to the weights. Plain Python.

A prompt is informative when an answer to it has an advantage other than 0: under ReMax when a sample does not tie with
the greedy answer, under RLOO and GRPO when not all rewards are equal. The others have no gradient at all, so they can
be dropped from the passes, and prompts are drawn until K are informative, or until L are drawn.

They must not be dropped from the count. With g_p the gradient of a prompt's answers, the aim is the mean of g_p over
all prompts. Of D draws with k informative ones,

    k = K    (K - 1) / (D - 1) x mean of g_p over the K informative prompts
    k < K    k / D             x mean of g_p over the k informative prompts     (then D = L)

is an unbiased estimate of it. (K - 1) / (D - 1), not K / D, because the drawing stopped at an informative prompt: K / D
is too large on average, by a factor of about 1 + (1 - p) / K where a share p is informative (J. B. S. Haldane 1945,
doi:10.1093/biomet/33.3.222; with the limit L: Girshick, Mosteller and Savage 1946, doi:10.1214/aoms/1177731018). It
needs draws in random order, with or without replacement, that stop exactly at the K-th informative one: what was
answered beyond it is surplus and is not used. The mean over the informative prompts alone is too large by 1 / p.

What must not decide is another property of the rewards: dropping prompts by the mean accuracy of their answers, all
right or all wrong, loses the gradient of those whose greedy answer was otherwise, and is biased under ReMax.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate


def num_used(informative: Sequence[bool], wanted: int, limit: int) -> int:
    """D, how many of the draws count: up to the one that is the `wanted`-th informative, and `limit` at most.

    Example: num_used([True, False, True, True], wanted=2, limit=4) == 3
    """
    for number, found in enumerate(accumulate(informative[:limit]), start=1):
        if found == wanted:
            return number
    return min(len(informative), limit)


def next_round(informative: Sequence[bool], wanted: int, limit: int) -> int:
    """How many prompts to answer next, after these draws: as many as it takes at their rate; 0 when it is enough.

    Example: next_round([True, False, False, True], wanted=4, limit=100) == 4
    """
    found = sum(informative)
    if not informative:
        return min(wanted, limit)
    if found >= wanted or len(informative) >= limit:
        return 0
    return min(math.ceil((wanted - found) * len(informative) / max(found, 1)), limit - len(informative))


def weight_factor(num_informative: int, num_drawn: int, wanted: int) -> float:
    """What the weights of an update are multiplied by that are counted over all prompts that were drawn and used.

    1 when nothing was refilled. `wanted` is at least 2.
    """
    assert wanted >= 2 and 0 <= num_informative <= min(num_drawn, wanted), (num_informative, num_drawn, wanted)
    if num_informative < wanted:
        return 1.0
    return (wanted - 1) / (num_drawn - 1) * num_drawn / wanted
