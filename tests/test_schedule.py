"""The micro-batch schedule: the five invariants of its docstring over random inputs, and examples worked by hand."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remax_megatron.batching.schedule import Schedule, schedule_by_rows, schedule_by_tokens


class Case(NamedTuple):
    lengths: list[int]
    dp: int
    budget: int
    multiple_of: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    budget = draw(st.integers(1, 3000))
    lengths = draw(st.lists(st.integers(0, budget), max_size=80))
    return Case(lengths, draw(st.integers(1, 8)), budget, draw(st.integers(1, 4)))


def rows_of(schedule: Schedule) -> list[int]:
    return [row for rank in schedule for micro_batch in rank for row in micro_batch]


def check_shape(schedule: Schedule, num_rows: int, dp: int, multiple_of: int) -> int:
    """Invariants 1, 3 and 4; returns the number of micro-batches per rank."""
    assert sorted(rows_of(schedule)) == list(range(num_rows))
    assert len(schedule) == dp
    counts = {len(rank) for rank in schedule}
    assert len(counts) == 1
    (per_rank,) = counts
    assert per_rank >= 1 and per_rank % multiple_of == 0
    return per_rank


@settings(max_examples=300, deadline=None)
@given(cases())
def test_invariants_of_schedule_by_tokens(case: Case) -> None:
    lengths, dp, budget, multiple_of = case
    before = list(lengths)
    schedule = schedule_by_tokens(lengths, dp, budget, multiple_of)
    check_shape(schedule, len(lengths), dp, multiple_of)
    loads = [sum(lengths[row] for row in micro_batch) for rank in schedule for micro_batch in rank]
    assert max(loads) <= budget
    # 5: the arguments alone decide, and they are left as they were.
    assert lengths == before
    assert schedule_by_tokens(tuple(lengths), dp, budget, multiple_of) == schedule


@settings(max_examples=300, deadline=None)
@given(cases())
def test_never_twice_as_many_micro_batches_as_the_tokens_need(case: Case) -> None:
    """A count is given up only when the emptiest micro-batch cannot take a row that is no longer than any row in it:
    then all of them are more than half full, so that count was below 2 sum / (dp budget)."""
    lengths, dp, budget, multiple_of = case
    per_rank = len(schedule_by_tokens(lengths, dp, budget, multiple_of)[0])
    lower = max(1, -(-sum(lengths) // (dp * budget)))
    first_tried = -(-lower // multiple_of) * multiple_of
    assert per_rank >= first_tried
    assert per_rank == first_tried or (per_rank - multiple_of) * dp * budget < 2 * sum(lengths)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 80), st.integers(1, 8), st.integers(1, 9), st.integers(1, 4))
def test_schedule_by_rows_keeps_order_and_covers_all(num_rows: int, dp: int, per_batch: int, multiple_of: int) -> None:
    schedule = schedule_by_rows(num_rows, dp, per_batch, multiple_of)
    per_rank = check_shape(schedule, num_rows, dp, multiple_of)
    assert rows_of(schedule) == list(range(num_rows))
    assert all(len(micro_batch) <= per_batch for rank in schedule for micro_batch in rank)
    fewest = max(1, -(-num_rows // (dp * per_batch)))
    assert fewest <= per_rank < fewest + multiple_of
    assert schedule_by_rows(num_rows, dp, per_batch, multiple_of) == schedule


def test_worked_example() -> None:
    # 8 rows, 26 tokens, 2 ranks x 10 tokens: 26 / 20 -> 2 micro-batches per rank, 4 in all. Longest first, each to
    # the emptiest (ties: the lowest number), rows of equal length by number:
    #   row 0 (7) -> A, row 4 (6) -> B, row 2 (4) -> C, row 5 (3) -> D          loads 7 6 4 3
    #   row 1 (2) -> D=5, row 6 (2) -> C=6, row 3 (1) -> D=6, row 7 (1) -> B=7  loads 7 7 6 6
    # Heaviest first over the ranks, back and forth: A -> 0, B -> 1, then C, D the other way round: D -> 0, C -> 1.
    lengths = [7, 2, 4, 1, 6, 3, 2, 1]
    assert schedule_by_tokens(lengths, dp=2, token_budget=10) == [[[0], [1, 3, 5]], [[4, 7], [2, 6]]]


def test_easy_case_is_at_the_lower_bound() -> None:
    # 64 rows of 100 tokens, 4 ranks x 1000: 6400 / 4000 -> 2 per rank, 8 micro-batches of 8 rows.
    schedule = schedule_by_tokens([100] * 64, dp=4, token_budget=1000)
    assert [[len(micro_batch) for micro_batch in rank] for rank in schedule] == [[8, 8]] * 4


def test_one_more_micro_batch_when_the_bound_cannot_be_met() -> None:
    # 18 tokens would fit 2 x 10, but no two rows of 6 share 10 tokens: 3 micro-batches; rounded up to 4 for pp = 4.
    assert schedule_by_tokens([6, 6, 6], dp=1, token_budget=10) == [[[0], [1], [2]]]
    assert schedule_by_tokens([6, 6, 6], dp=1, token_budget=10, multiple_of=4) == [[[0], [1], [2], []]]


def test_fewer_rows_than_micro_batches_leaves_empty_ones() -> None:
    assert schedule_by_tokens([5], dp=2, token_budget=8, multiple_of=2) == [[[0], []], [[], []]]
    assert schedule_by_tokens([], dp=2, token_budget=8) == [[[]], [[]]]
    assert schedule_by_rows(0, dp=2, rows_per_micro_batch=4) == [[[]], [[]]]


def test_schedule_by_rows_worked_example() -> None:
    # 7 rows, 2 ranks, 2 a micro-batch: 7 / 4 -> 2 per rank.
    assert schedule_by_rows(7, dp=2, rows_per_micro_batch=2) == [[[0, 1], [2, 3]], [[4, 5], [6]]]


def test_a_row_of_exactly_the_budget_fits_and_one_more_token_is_refused() -> None:
    assert schedule_by_tokens([24000, 1], dp=1, token_budget=24000) == [[[0], [1]]]
    with pytest.raises(ValueError, match=r"a row of 24001 tokens exceeds ppo_max_token_len_per_gpu=24000; raise it"):
        schedule_by_tokens([5, 24001, 7], dp=2, token_budget=24000)
