"""What rank 0 does for all: its answer, or its error, on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from remax_megatron.errors import UserError

T = TypeVar("T")


def from_first_rank(act: Callable[[], T], error_type: type[UserError]) -> T:
    """What `act` returns on rank 0, on every rank. Its UserError or OSError is raised on every rank as `error_type`.

    Collective over the world; the answer is pickled on its way.
    """
    answer: list = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = act()
        except (UserError, OSError) as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise error_type(answer[1])
    return answer[0]
