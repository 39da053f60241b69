"""Checkpoints that cross from one kind of layers to the other, and FusedAdam through a resume that changes nothing.

    without Transformer Engine   A: three updates on local layers, with torch's Adam
    with it                      B: from A's step 1, one update on its layers   C: B's step 2 on local layers
                                 D: three updates at once on its layers         E: from D's step 1, two updates
    without                      F: from B's step 2, one update on local layers, with torch's Adam

A checkpoint that was loaded is written again before the next update, so that the two can be compared.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from remax_megatron.checkpoint.folders import iteration_folder
from tests.checkpoint.test_saver import PRELOAD, equal
from tests.ranks import run_ranks
from tests.small_models import make_qwen2

CASES = ["tp2", "dp2, bfloat16"]  # layouts of tests/checkpoint/test_saver.py: a tied model in float32, an untied one
TE, LOCAL = "transformer_engine", "local"
RUNS = {  # name -> (layers, the run it starts from, updates done by then, until)
    "A": (LOCAL, None, 0, 3),
    "B": (TE, "A", 1, 2),
    "C": (LOCAL, "B", 2, 2),
    "D": (TE, None, 0, 3),
    "E": (TE, "D", 1, 3),
    "F": (LOCAL, "B", 2, 3),
}


def worker(payload) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """{(case, run): [(loss, gradient norm) of every update]} of the runs named in `payload`."""
    from megatron.core import parallel_state as mpu

    from remax_megatron.parallel.layout import init_distributed
    from tests.checkpoint.test_saver import train
    from tests.te.test_layers import forget_attention

    device = init_distributed("cpu", 100)
    found = {}
    for case in CASES:
        root = payload["folder"] / case
        for name in payload["runs"]:
            layers, source, done, until = RUNS[name]
            start = iteration_folder(root / source, done) if source else root / "hf"
            settings = {"layout": case, "model": str(root / "hf"), "start": str(start), "root": str(root / name)}
            settings |= {"done": done, "until": until, "background": False}
            found[case, name] = train(settings, device, layers)
            mpu.destroy_model_parallel()
        forget_attention()
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(the folder with CASE/RUN, what the updates gave)."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for case in CASES:
        make_qwen2(folder / case / "hf", tied=case == "tp2", layers=2, std=0.03)
    with pytest.MonkeyPatch.context() as patch:
        for layers, names in ((LOCAL, "A"), (TE, "BCDE"), (LOCAL, "F")):
            patch.setenv("REMAX_TEST_LAYERS", layers)
            payload = {"folder": folder, "runs": names}
            found |= run_ranks("tests.te.test_resume:worker", 2, payload, preload=PRELOAD)[0]
    return folder, found


def step(runs, case: str, name: str, number: int) -> Path:
    return iteration_folder(runs[0] / case / name, number)


@pytest.mark.parametrize("case", CASES)
def test_weights_moments_and_masters_cross_bit_for_bit(case, runs):
    equal(step(runs, case, "A", 1), step(runs, case, "B", 1))  # local -> Transformer Engine
    equal(step(runs, case, "B", 2), step(runs, case, "C", 2))  # -> local
    equal(step(runs, case, "B", 2), step(runs, case, "F", 2))  # -> local, with torch's Adam


@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_as_if_nothing_had_changed(case, runs):
    found = [*runs[1][case, "B"], *runs[1][case, "F"]]
    within = dict(abs=1e-5, rel=1e-4) if case == "tp2" else dict(abs=2e-2, rel=5e-2)
    for one, other in zip(found, runs[1][case, "A"][1:], strict=True):
        assert one == pytest.approx(other, **within)


@pytest.mark.parametrize("case", CASES)
def test_a_resume_with_fused_adam_changes_nothing(case, runs):
    assert runs[1][case, "E"] == runs[1][case, "D"][1:]  # loss and gradient norm, to the last bit
    equal(step(runs, case, "D", 3), step(runs, case, "E", 3))
