"""Which rows form which micro-batch on which data-parallel rank. Pure: lengths in, indices out; no torch.

Every rank calls with the same arguments and gets the same answer (integer arithmetic and stable sorts only), so no
collective is needed to agree.

Invariants of a `Schedule`, each asserted by tests/batching/test_schedule.py:
    1. every row is in exactly one micro-batch;
    2. the sum of lengths of a micro-batch never exceeds the token budget;
    3. all data-parallel ranks have the same number of micro-batches, at least one;
    4. that number is a multiple of `multiple_of` (the pipeline size under a virtual pipeline);
    5. the result depends on the arguments only.
A micro-batch may be empty when there are fewer rows than micro-batches; the packer fills it with padding.

What `schedule_by_tokens` aims at beyond them: few micro-batches; micro-batches of one index that cost the same on all
ranks (they wait for each other where a collective or a pipeline couples them); ranks whose totals are the same; and
the cheapest indices first and last with the costliest in the middle, because a pipeline idles during its warm-up and
cool-down for as long as the first and the last micro-batches take. benchmarks/schedule.py measures all of it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapreplace
from typing import Any, NamedTuple

import numpy as np

from remax_megatron.flops import ForwardFlops
from remax_megatron.model_facts import ModelFacts

# Schedule[dp_rank][micro_batch] = row numbers
Schedule = list[list[list[int]]]

MAX_REPAIR_ROUNDS = 40  # of swaps that bring micro-batches back under the budget; then another count is tried
STALLED = 6  # rounds within which the tokens over the budget must halve
MAX_LEVEL_ROUNDS = 16  # of swaps that level the costs within an index, and as many for those of ranks
SAME_COST = 4096  # costs are level when they differ by less than one part in this
PARTNERS = 12  # micro-batches that one over the budget looks for a swap in, per round
CANDIDATE_ROWS = 16  # rows of a micro-batch that a round considers; the next round takes others
COST_BITS = 36  # costs of a micro-batch are scaled to this many bits, so that overflow * cost fits 64


@dataclass(frozen=True)
class RowCost:
    """The cost of a row of l tokens: linear * l + quadratic * l^2, in any unit; only ratios matter."""

    linear: int
    quadratic: int


class _Rows(NamedTuple):
    """Tokens and cost of each row and, last, of the empty row that stands for a free place in a table of bins."""

    tokens: np.ndarray
    costs: np.ndarray
    budget: int


def row_cost(facts: ModelFacts) -> RowCost:
    """Floating-point operations of forward and backward (3 x the forward pass of flops.py) for a row of l tokens, alone
    in its attention segment. The head is counted at every token: how many are scored is not known here.
    """
    forward = ForwardFlops.of(facts)
    per_token = forward.num_layers * (forward.projections + forward.mlp) + forward.head
    return RowCost(linear=3 * per_token, quadratic=3 * forward.num_layers * forward.attention)


def schedule_by_tokens(
    lengths: Sequence[int], dp: int, token_budget: int, multiple_of: int = 1, cost: RowCost | None = None
) -> Schedule:
    """Fill micro-batches up to `token_budget` tokens: few of them, balanced by `cost` (None: by tokens).

    The count per rank starts at its lower bound, ceil(sum / (dp * token_budget)) rounded up to `multiple_of`. Rows are
    dealt longest first to the emptiest micro-batch; swaps repair what is then over the budget. Failing that, best-fit
    decreasing may do with this count or the next; otherwise its own count is taken (less than twice the tokens need).
    Then the micro-batches are sorted by cost, dp neighbours form an index, swaps within an index level it, and the
    costliest micro-batch of each goes to the least-loaded rank.

    Raises ValueError when a row alone exceeds the budget, naming the setting.
    """
    longest = max(lengths, default=0)
    if longest > token_budget:
        raise ValueError(
            f"a row of {longest} tokens exceeds ppo_max_token_len_per_gpu={token_budget}; raise it to at least "
            "data.max_prompt_length + data.max_response_length"
        )
    cost = cost or RowCost(1, 0)
    # No micro-batch within the budget costs more than this, since the sum of squares is at most the square of the sum.
    shift = max(0, (token_budget * (cost.linear + cost.quadratic * token_budget)).bit_length() - COST_BITS)
    tokens = np.array([*lengths, 0], dtype=np.int64)
    costs = np.array([n * (cost.linear + cost.quadratic * n) >> shift for n in [*lengths, 0]], dtype=np.int64)
    table = _fill(lengths, _Rows(tokens, tokens, token_budget), dp, multiple_of)
    rows = _Rows(tokens, costs, token_budget)
    _level_indices(table, rows, dp)
    ranks = _over_ranks(costs[table].sum(1), dp)
    _level_ranks(table, ranks, rows)
    return [[sorted(row for row in table[i].tolist() if row < len(lengths)) for i in rank] for rank in ranks]


def schedule_by_rows(num_rows: int, dp: int, rows_per_micro_batch: int, multiple_of: int = 1) -> Schedule:
    """A fixed number of rows per micro-batch, in order (`use_dynamic_bsz=False`)."""
    per_rank = max(1, -(-num_rows // (dp * rows_per_micro_batch)))
    per_rank = -(-per_rank // multiple_of) * multiple_of
    starts = [[(rank * per_rank + i) * rows_per_micro_batch for i in range(per_rank)] for rank in range(dp)]
    return [[list(range(s, min(s + rows_per_micro_batch, num_rows))) for s in rank] for rank in starts]


def _fill(lengths: Sequence[int], rows: _Rows, dp: int, multiple_of: int) -> np.ndarray:
    """A table of dp * count micro-batches within the budget: a row number per place, len(lengths) where it is free."""
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    lower = max(1, -(-sum(lengths) // (dp * rows.budget)))
    count = first = -(-lower // multiple_of) * multiple_of
    best_fit: list[list[int]] | None = None
    while True:
        table = _table(_deal(lengths, order, dp * count), dp * count, len(lengths))
        if _repair(table, rows):
            return table
        best_fit = best_fit or _best_fit(lengths, order, rows.budget)
        if len(best_fit) <= dp * count:
            return _table(best_fit, dp * count, len(lengths))
        enough = -(-len(best_fit) // (dp * multiple_of)) * multiple_of
        count = count + multiple_of if count == first else enough


def _deal(lengths: Sequence[int], order: Sequence[int], num_bins: int) -> list[list[int]]:
    """Each row to the bin with the fewest tokens, whatever the budget."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0, i) for i in range(num_bins)]
    for row in order:
        load, i = heap[0]
        heapreplace(heap, (load + lengths[row], i))
        bins[i].append(row)
    return bins


def _best_fit(lengths: Sequence[int], order: Sequence[int], budget: int) -> list[list[int]]:
    """Each row to the fullest bin that can take it, else to a new one."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), ascending
    for row in order:
        at = bisect_left(room, (lengths[row], -1))
        if at == len(room):
            left, i = budget, len(bins)
            bins.append([])
        else:
            left, i = room.pop(at)
        bins[i].append(row)
        insort(room, (left - lengths[row], i))
    return bins


def _table(bins: list[list[int]], num_bins: int, empty: int) -> np.ndarray:
    """[num_bins, places]; one place more than the longest bin has, for a row to move into."""
    table = np.full((num_bins, max(map(len, bins), default=0) + 1), empty)
    for i, rows in enumerate(bins):
        table[i, : len(rows)] = rows
    return table


def _repair(table: np.ndarray, rows: _Rows) -> bool:
    """Swap rows of micro-batches over the budget into others until none is; False when that does not succeed soon."""
    last = table.size * rows.budget
    for round_number in range(MAX_REPAIR_ROUNDS):
        loads = rows.tokens[table].sum(1)
        over = int(np.maximum(loads - rows.budget, 0).sum())
        if over == 0:
            return True
        if round_number % STALLED == 0:
            if 2 * over > last:
                return False
            last = over
        order = np.argsort(loads, kind="stable")
        num_over = int((loads > rows.budget).sum())
        within = order[: len(order) - num_over]
        num = min(num_over, len(within))
        partners = min(PARTNERS, len(within) // num) if num else 0
        # The emptiest in even rounds, others in odd ones.
        within = np.roll(within, -round_number * num if round_number % 2 else 0)[: num * partners]
        _swap(table, order[::-1][:num], within.reshape(partners, num).T, rows, round_number)
    return False


def _level_indices(table: np.ndarray, rows: _Rows, dp: int) -> None:
    """Sorted by cost, dp neighbours are an index: swap between its heavy and its light micro-batches."""
    half = dp // 2
    for round_number in range(MAX_LEVEL_ROUNDS if half else 0):
        loads = rows.costs[table].sum(1)
        groups = np.argsort(loads, kind="stable").reshape(-1, dp)
        light = np.roll(groups[:, :half], round_number, axis=1).ravel()
        heavy = groups[:, : dp - half - 1 : -1].ravel()
        uneven = (loads[heavy] - loads[light]) * SAME_COST > loads[heavy]
        if not uneven.any():
            return
        _swap(table, heavy[uneven], light[uneven, None], rows, round_number)


def _over_ranks(loads: np.ndarray, dp: int) -> np.ndarray:
    """[dp, count] micro-batches: dp neighbours in cost are an index, whose costliest goes to the least-loaded rank.

    Uneven indices are handed out first, so that the others make up for them. The cheapest come to both ends.
    """
    groups = np.argsort(loads, kind="stable").reshape(-1, dp)
    totals = np.zeros(dp, dtype=np.int64)
    for g in np.argsort(loads[groups[:, 0]] - loads[groups[:, -1]], kind="stable"):
        dealt = np.empty(dp, dtype=np.int64)
        dealt[np.argsort(-totals, kind="stable")] = groups[g]
        totals += loads[dealt]
        groups[g] = dealt
    return np.concatenate([groups[0::2], groups[1::2][::-1]]).T


def _level_ranks(table: np.ndarray, ranks: np.ndarray, rows: _Rows) -> None:
    """Where an index could not be levelled, let ranks make up for it a little in each of the others."""
    half, count = len(ranks) // 2, ranks.shape[1]
    for round_number in range(MAX_LEVEL_ROUNDS if half else 0):
        loads = rows.costs[table].sum(1)
        totals = loads[ranks].sum(1)
        if (totals.max() - totals.min()) * SAME_COST <= totals.max():
            return
        order = np.argsort(totals, kind="stable")
        heavy, light = order[::-1][:half], np.roll(order[:half], round_number)
        share = ((totals[heavy] - totals[light]) // count).repeat(count)
        heavy, light = ranks[heavy].ravel(), ranks[light].ravel()
        # For _swap the heavy one costs more by its rank's share of what the ranks differ by, and by nothing else.
        extra = share - loads[heavy] + loads[light]
        _swap(table, heavy, light[:, None], rows, round_number, extra[:, None, None])


def _swap(
    table: np.ndarray, heavy: np.ndarray, light: np.ndarray, rows: _Rows, round_number: int, extra: Any = 0
) -> None:
    """Make in each heavy micro-batch the one swap of a row, with a row of one of its partners, that helps most.

    table         [micro-batches, places]: row numbers, changed in place
    heavy         [num]: the micro-batches to relieve
    light         [num, partners]: the micro-batches that each may swap with; all that are named are different
    rows          tokens and costs of the rows, and the budget
    round_number  chooses the CANDIDATE_ROWS places of each micro-batch that are considered
    extra         [num, 1, 1] or 0: what each heavy one counts beyond the cost of its rows

    That swap helps most after which the two are over the budget by the fewest tokens and then, of equal ones, the
    costlier of the two costs least. A swap with a free place is a move. Where no swap helps none is made.
    """
    num, partners = light.shape
    width = table.shape[1]
    candidates = min(width, CANDIDATE_ROWS)
    places = (np.arange(candidates) * width // candidates + round_number) % width

    def sums(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of heavy now [num]; of heavy and of light after each swap, both [num, candidates, partners * candidates]."""
        leaving = values[table[heavy[:, None], places]]
        arriving = values[table[light[..., None], places]].reshape(num, -1)
        change = leaving[:, :, None] - arriving[:, None, :]
        heavy_now, light_now = values[table[heavy]].sum(1), values[table[light]].sum(2).repeat(candidates, axis=1)
        return heavy_now, heavy_now[:, None, None] - change, light_now[:, None, :] + change

    def over(tokens: np.ndarray) -> np.ndarray:
        return np.maximum(tokens - rows.budget, 0)

    tokens_now, heavy_tokens, light_tokens = tokens = sums(rows.tokens)
    cost_now, heavy_costs, light_costs = tokens if rows.costs is rows.tokens else sums(rows.costs)
    over_after = over(heavy_tokens) + over(light_tokens)
    after = ((over_after << COST_BITS) + np.maximum(heavy_costs + extra, light_costs)).reshape(num, -1)
    now = (over(tokens_now) << COST_BITS) + cost_now + np.ravel(extra)
    best = after.argmin(1)
    helps = after[np.arange(num), best] < now
    k, best = np.flatnonzero(helps), best[helps]
    place, (partner, other) = best // (partners * candidates), np.divmod(best % (partners * candidates), candidates)
    here, there = (heavy[k], places[place]), (light[k, partner], places[other])
    table[here], table[there] = table[there], table[here]
