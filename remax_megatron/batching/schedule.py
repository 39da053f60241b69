"""Which rows form which micro-batch on which data-parallel rank. Pure: lengths in, indices out; no torch.

Every rank calls with the same arguments and gets the same answer, so no collective is needed to agree.

Invariants of a `Schedule`, each asserted by tests/test_schedule.py:
    1. every row is in exactly one micro-batch;
    2. the sum of lengths of a micro-batch never exceeds the token budget;
    3. all data-parallel ranks have the same number of micro-batches, at least one;
    4. that number is a multiple of `multiple_of` (the pipeline size under a virtual pipeline);
    5. the result depends on the arguments only.
A micro-batch may be empty when there are fewer rows than micro-batches; the packer fills it with padding.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

# Schedule[dp_rank][micro_batch] = row numbers
Schedule = list[list[list[int]]]


def schedule_by_tokens(lengths: Sequence[int], dp: int, token_budget: int, multiple_of: int = 1) -> Schedule:
    """Fill micro-batches up to `token_budget` tokens: as few of them per rank as the packing finds, evenly loaded.

    Rows are dealt longest first, each to the emptiest micro-batch; when one does not fit there it fits nowhere, and
    one more micro-batch per rank is tried. Starts at the lower bound ceil(sum / (dp * budget)).

    Raises ValueError when a row alone exceeds the budget, naming the setting.
    """
    if lengths and max(lengths) > token_budget:
        raise ValueError(
            f"a row of {max(lengths)} tokens exceeds ppo_max_token_len_per_gpu={token_budget}; raise it to at least "
            "data.max_prompt_length + data.max_response_length"
        )
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    lower = max(1, -(-sum(lengths) // (dp * token_budget)))
    per_rank = -(-lower // multiple_of) * multiple_of
    while True:
        bins = _deal(lengths, order, dp * per_rank, token_budget)
        if bins is not None:
            return _over_ranks(lengths, bins, dp)
        per_rank += multiple_of


def schedule_by_rows(num_rows: int, dp: int, rows_per_micro_batch: int, multiple_of: int = 1) -> Schedule:
    """A fixed number of rows per micro-batch, in order (`use_dynamic_bsz=False`)."""
    per_rank = max(1, -(-num_rows // (dp * rows_per_micro_batch)))
    per_rank = -(-per_rank // multiple_of) * multiple_of
    starts = [[(rank * per_rank + i) * rows_per_micro_batch for i in range(per_rank)] for rank in range(dp)]
    return [[list(range(s, min(s + rows_per_micro_batch, num_rows))) for s in rank] for rank in starts]


def _deal(lengths: Sequence[int], order: Sequence[int], num_bins: int, budget: int) -> list[list[int]] | None:
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0, i) for i in range(num_bins)]
    for row in order:
        load, i = heap[0]
        if load + lengths[row] > budget:
            return None
        heapq.heapreplace(heap, (load + lengths[row], i))
        bins[i].append(row)
    return bins


def _over_ranks(lengths: Sequence[int], bins: list[list[int]], dp: int) -> Schedule:
    """Deal full micro-batches over ranks so that those of one index weigh alike: heaviest first, back and forth."""
    order = sorted(range(len(bins)), key=lambda i: (-sum(lengths[row] for row in bins[i]), i))
    ranks: Schedule = [[] for _ in range(dp)]
    for index, start in enumerate(range(0, len(order), dp)):
        group = order[start : start + dp]
        for rank, i in enumerate(group if index % 2 == 0 else reversed(group)):
            ranks[rank].append(sorted(bins[i]))
    return ranks
