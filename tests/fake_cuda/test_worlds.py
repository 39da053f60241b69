"""All ranks of a world make the same collectives in the same order: whole worlds up to 64 ranks, samples of larger."""

from __future__ import annotations

from collections.abc import Sequence

from tests.fake_cuda.scenario import small_config, train
from tests.stand_ins.fake_cuda.models import FACTS
from tests.stand_ins.fake_cuda.processes import Job, Report, play_each
from tests.stand_ins.fake_cuda.replay import replay


def play_world(
    *overrides: str, tp: int = 1, pp: int = 1, dp: int = 1, model: str = "tiny", ranks: Sequence[int] | None = None
) -> list[Report]:
    """A training of one step on all ranks of a world, or on `ranks` of it."""
    config = small_config(*overrides, tp=tp, pp=pp, dp=dp)
    world_size = tp * pp * dp
    chosen = range(world_size) if ranks is None else ranks
    return play_each([Job(config, FACTS[model], rank, world_size, train, ((17, 26),)) for rank in chosen])


def meet(reports: list[Report]) -> int:
    return replay({report.rank: report.collectives for report in reports})


def test_a_world() -> None:
    assert meet(play_world(tp=2, pp=2, dp=2)) > 100
