"""The replay names what does not meet, and lets legal orders pass."""

from __future__ import annotations

import re

import pytest

from tests.stand_ins.fake_cuda.recorder import Collective
from tests.stand_ins.fake_cuda.replay import Disagreement, replay

PAIR, ALL = (0, 1), (0, 1, 2, 3)


def reduce(line: str, group: tuple[int, ...] = PAIR, size: int = 8, dtype: str = "float32") -> Collective:
    return Collective("allreduce_", group, None, ((size, dtype),), line)


def gather(line: str, group: tuple[int, ...] = PAIR) -> Collective:
    return Collective("_allgather_base_", group, None, ((16, "bfloat16"), (8, "bfloat16")), line)


def root(line: str, source: int) -> Collective:
    return Collective("broadcast_", PAIR, source, ((8, "int64"),), line)


def send(line: str, peer: int, size: int = 8, batch: int = 0, group: tuple[int, ...] = PAIR) -> Collective:
    return Collective("send", group, peer, ((size, "bfloat16"),), line, batch=batch)


def recv(line: str, peer: int, size: int = 8, batch: int = 0, group: tuple[int, ...] = PAIR) -> Collective:
    return Collective("recv_", group, peer, ((size, "bfloat16"),), line, batch=batch)


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        ([reduce("a.py:1"), gather("a.py:2")], [gather("a.py:2")], ["but", "a.py:1", "a.py:2"]),
        ([reduce("a.py:1"), reduce("a.py:2")], [reduce("a.py:1")], ["deadlock", "a.py:2", "at its end", "a.py:1"]),
        ([reduce("a.py:1"), gather("a.py:2")], [gather("a.py:3"), reduce("a.py:4")], ["but", "a.py:1", "a.py:3"]),
        ([reduce("a.py:1", size=8)], [reduce("b.py:1", size=9)], ["but", "a.py:1", "b.py:1", "9 x float32"]),
        ([reduce("a.py:1")], [reduce("b.py:1", dtype="bfloat16")], ["but", "a.py:1", "b.py:1", "8 x bfloat16"]),
        ([root("a.py:1", 0)], [root("b.py:1", 1)], ["but", "a.py:1", "b.py:1", "from rank 1"]),
        ([send("a.py:1", 1)], [], ["deadlock", "a.py:1", "rank 1 is at its end"]),
        ([send("a.py:1", 1)], [reduce("b.py:1")], ["deadlock", "a.py:1", "b.py:1"]),
        ([send("a.py:1", 1)], [recv("b.py:1", 0, size=9)], ["but", "a.py:1", "b.py:1", "9 x bfloat16"]),
        ([send("a.py:1", 1)], [recv("b.py:1", 0, group=ALL)], ["deadlock", "a.py:1", "b.py:1"]),
        (  # two messages one way, taken in the other order
            [send("a.py:1", 1, size=8, batch=1), send("a.py:2", 1, size=9, batch=1)],
            [recv("b.py:1", 0, size=9, batch=1), recv("b.py:2", 0, size=8, batch=1)],
            ["but", "a.py:1", "b.py:1"],
        ),
        (  # both send first: each waits for the other to receive
            [send("a.py:1", 1), recv("a.py:2", 1)],
            [send("b.py:1", 0), recv("b.py:2", 0)],
            ["deadlock", "a.py:1", "b.py:1"],
        ),
        (  # the same in batches of one each
            [send("a.py:1", 1, batch=1), recv("a.py:2", 1, batch=2)],
            [send("b.py:1", 0, batch=1), recv("b.py:2", 0, batch=2)],
            ["deadlock", "a.py:1", "b.py:1"],
        ),
        (  # a message that only comes after the collective that its receiver is at
            [reduce("a.py:1"), send("a.py:2", 1)],
            [recv("b.py:1", 0), reduce("b.py:2")],
            ["deadlock", "a.py:1", "b.py:1"],
        ),
    ],
)
def test_what_does_not_meet(first: list[Collective], second: list[Collective], found: list[str]) -> None:
    """The message has the lines of both ranks, from either side."""
    for recorded in ({0: first, 1: second}, {1: second, 0: first}):
        with pytest.raises(Disagreement) as caught:
            replay(recorded)
        assert all(word in str(caught.value) for word in found), caught.value


def test_a_circle() -> None:
    """Three ranks, each in a group with the next, each at another: the whole circle is told."""
    with pytest.raises(Disagreement, match="deadlock") as caught:
        replay(
            {
                0: [reduce("a.py:1", (0, 1)), reduce("a.py:2", (0, 2))],
                1: [reduce("b.py:1", (1, 2)), reduce("b.py:2", (0, 1))],
                2: [reduce("c.py:1", (0, 2)), reduce("c.py:2", (1, 2))],
            }
        )
    assert re.findall(r"\w\.py:\d", str(caught.value)) == ["a.py:1", "b.py:1", "c.py:1"]


def pipeline(stage: int, stages: int, batches: int) -> list[Collective]:
    """The messages of a stage under 1F1B, in batches as Megatron makes them."""
    calls: list[Collective] = []
    group, warm_up = tuple(range(stages)), min(stages - stage - 1, batches)
    number = iter(range(1, 100))

    def exchange(*pairs: tuple) -> None:
        batch = next(number)
        calls.extend(make(f"{stage}.py:{batch}", to, 8, batch, group) for make, to in pairs if 0 <= to < stages)

    before, after = stage - 1, stage + 1
    for _ in range(warm_up):
        exchange((recv, before))
        exchange((send, after))
    if warm_up < batches:
        exchange((recv, before))
    for i in range(batches - warm_up):
        exchange((send, after), (recv, after))
        last = i == batches - warm_up - 1
        exchange((send, before), *([] if last else [(recv, before)]))
    for _ in range(warm_up):
        exchange((recv, after))
        exchange((send, before))
    return calls


@pytest.mark.parametrize(("stages", "batches"), [(2, 1), (2, 4), (4, 2), (4, 8)])
def test_one_forward_one_backward(stages: int, batches: int) -> None:
    recorded = {stage: pipeline(stage, stages, batches) for stage in range(stages)}
    assert replay(recorded) == 2 * batches * (stages - 1)
    assert replay({0: recorded[0]}) == 2 * batches  # the other stages are willing
    del recorded[1][-1]
    with pytest.raises(Disagreement, match="deadlock"):
        replay(recorded)


def test_messages_of_two_groups_pass_each_other() -> None:
    """As under a virtual pipeline of two stages: one group for each direction, and no batches."""
    first = [send("a.py:1", 1), recv("a.py:2", 1, group=ALL)]
    second = [send("b.py:1", 0, group=ALL), recv("b.py:2", 0)]
    assert replay({0: first, 1: second}) == 2


def test_groups_that_overlap() -> None:
    """Rows, columns and all of a 2 x 2 grid, in any order in which the ranks are played."""
    recorded = {
        rank: [
            reduce("row", (rank // 2 * 2, rank // 2 * 2 + 1)),
            gather("column", (rank % 2, rank % 2 + 2)),
            reduce("all", ALL),
            reduce("row", (rank // 2 * 2, rank // 2 * 2 + 1)),
        ]
        for rank in (2, 0, 3, 1)
    }
    assert replay(recorded) == 2 + 2 + 1 + 2
    assert replay({rank: recorded[rank] for rank in (0, 3)}) == 7  # the column of each counts, and so does its row
