"""The collectives of several ranks played against each other, as NCCL would: what does not meet is named.

A collective is done when every rank of its group stands at it, with the same operator, root and sizes. A message is
done when sender and receiver stand at it. The messages of one batch_isend_irecv may be done in any order, but two of
one direction between the same ranks only in theirs; the batch ends when all are done. Messages outside of a batch
follow each other on the communicator of their group and pair of ranks, and the ranks wait for them at the next
collective or batch. Ranks that were not recorded do what is asked of them.

Stricter than NCCL: all collectives of a rank follow each other, whatever their streams. Laxer: that a rank may wait
for one message before it begins the next is not known.
"""

from __future__ import annotations

from tests.stand_ins.fake_cuda.recorder import Collective


class Disagreement(AssertionError):
    """Ranks that should meet do not; the message has the line of each."""


def replay(recorded: dict[int, list[Collective]]) -> int:
    """Play the collectives of the ranks in `recorded` to their end; returns how many met, or raises Disagreement."""
    ranks = {rank: _Rank(calls) for rank, calls in recorded.items()}
    met, moved = 0, True
    while moved:
        moved = False
        for rank in ranks:
            while done := _exchange(rank, ranks) or _gather(rank, ranks):
                met, moved = met + done, True
    if stuck := [rank for rank, one in ranks.items() if one.window]:
        raise Disagreement(_deadlock(stuck[0], ranks))
    return met


class _Rank:
    """How far a rank has come. `window` is what it stands at: a collective, or the messages up to the next barrier."""

    def __init__(self, calls: list[Collective]):
        self.calls, self.next = calls, 0
        self.window: list[Collective] = []
        self._advance()

    def _advance(self) -> None:
        if self.next == len(self.calls):
            return
        first = self.calls[self.next]
        end = self.next + 1
        while first.is_message and end < len(self.calls) and _go_together(first, self.calls[end]):
            end += 1
        self.window = self.calls[self.next : end]
        self.next = end

    def finish(self, call: Collective) -> None:
        """`call` is done; when it was the last of the window, the next begins."""
        self.window = [one for one in self.window if one is not call]
        if not self.window:
            self._advance()

    @property
    def collective(self) -> Collective | None:
        return self.window[0] if self.window and not self.window[0].is_message else None

    def messages(self) -> list[Collective]:
        """Those of the window that nothing is before: the first of every lane."""
        lanes: dict[tuple, Collective] = {}
        for call in self.window:
            if call.is_message:
                lanes.setdefault((call.group, call.peer, call.name if call.batch else None), call)
        return list(lanes.values())


def _go_together(first: Collective, call: Collective) -> bool:
    return call.is_message and call.batch == first.batch


def _gather(rank: int, ranks: dict[int, _Rank]) -> int:
    """Do the collective that `rank` stands at, if all others stand at it too; how many were done."""
    call = ranks[rank].collective
    if call is None:
        return 0
    present = [member for member in call.group if member in ranks]
    for member in present:
        other = ranks[member].collective
        if other is None or other.group != call.group:
            return 0
        if (other.name, other.peer, other.tensors) != (call.name, call.peer, call.tensors):
            raise Disagreement(f"{_told(rank, call)}\nbut {_told(member, other)}")
    for member in present:
        head = ranks[member].collective
        assert head is not None
        ranks[member].finish(head)
    return 1


def _exchange(rank: int, ranks: dict[int, _Rank]) -> int:
    """Do one of the messages that `rank` stands at, if its other end stands at it too; how many were done."""
    for call in ranks[rank].messages():
        if call.peer not in ranks:
            ranks[rank].finish(call)
            return 1
        for answer in ranks[call.peer].messages():
            if (answer.peer, answer.group) == (rank, call.group) and answer.name != call.name:
                if answer.tensors != call.tensors:
                    raise Disagreement(f"{_told(rank, call)}\nbut {_told(call.peer, answer)}")
                ranks[rank].finish(call)
                ranks[call.peer].finish(answer)
                return 1
    return 0


def _deadlock(rank: int, ranks: dict[int, _Rank]) -> str:
    """Where the ranks stand that wait for each other, or for one that has ended, beginning with `rank`."""
    lines, seen = [], set()
    while rank not in seen and ranks[rank].window:
        seen.add(rank)
        call = (ranks[rank].messages() or ranks[rank].window)[0]
        lines.append(_told(rank, call))
        rank = _missing(rank, call, ranks)
    if rank not in seen:
        last = ranks[rank].calls[-1:]
        lines.append(f"rank {rank} is at its end" + (f", after {last[0].name} at {last[0].where}" if last else ""))
    return "deadlock: " + "\nwhich waits for ".join(lines)


def _missing(rank: int, call: Collective, ranks: dict[int, _Rank]) -> int:
    """A rank that `rank`, standing at `call`, waits for."""
    if call.peer is not None and call.is_message:
        return call.peer
    return next(
        member
        for member in call.group
        if member in ranks and ((other := ranks[member].collective) is None or other.group != call.group)
    )


def _told(rank: int, call: Collective) -> str:
    what = f"{call.name} with rank {call.peer}" if call.is_message else f"{call.name} of ranks {list(call.group)}"
    root = "" if call.is_message or call.peer is None else f" from rank {call.peer}"
    sizes = ", ".join(f"{elements} x {dtype}" for elements, dtype in call.tensors)
    return f"rank {rank} at {what}{root} ({sizes}), {call.where}"
