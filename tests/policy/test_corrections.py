"""Corrections of the mismatch with the engine: no layout, and no packing, changes an update that they are part of. Real
Megatron on real gloo ranks, float32. What each of them computes is in tests/algorithm by hand."""

from __future__ import annotations

import random

import pytest

from remax_megatron.algorithm.aggregation import weigh_rows
from remax_megatron.config.schema import RolloutCorrection
from remax_megatron.types import Row
from tests.policy.test_exactness import gradients, recorded_rows, relative_difference
from tests.ranks import run_ranks
from tests.small_models import LAYERS, make_qwen2

LAYOUTS = {1: [(1, 1)], 2: [(1, 1), (2, 1), (1, 2)], 4: [(2, 2)]}  # ranks -> (tp, pp); the rest is data-parallel
CORRECTIONS = {
    "truncated": RolloutCorrection(rollout_is="token", rollout_is_threshold="1.3"),
    "truncated answers": RolloutCorrection(rollout_is="sequence", rollout_is_threshold="1.3"),
    "masked": RolloutCorrection(rollout_is="token", rollout_is_threshold="0_1.3"),
    "IcePop": RolloutCorrection(rollout_is="token", rollout_is_threshold="0.8_1.3"),
    "rejected": RolloutCorrection(rollout_rs="geometric", rollout_rs_threshold="0.95_1.05"),
    "IcePop, rejected": RolloutCorrection(
        rollout_is="token", rollout_is_threshold="0.8_1.3", rollout_rs="geometric", rollout_rs_threshold="0.95_1.05"
    ),
}
BUDGETS = {1: (160, 70), 2: (160,), 4: (160,)}  # tokens of a micro-batch


def rows_with(logprobs: list[list[float]]) -> list[Row]:
    """The engine's log-probabilities are the policy's with noise, so that every bound is crossed on both sides."""
    draw, rows = random.Random(11), recorded_rows()
    for row, policy in zip(rows, logprobs, strict=True):
        shift = draw.gauss(0, 0.1)
        row.rollout_logprobs = [one + shift + draw.gauss(0, 0.3) for one in policy]
    return rows


def worker(payload):
    from megatron.core import parallel_state as mpu

    from remax_megatron.config.schema import Actor
    from remax_megatron.model_facts import ModelFacts
    from remax_megatron.parallel.layout import init_distributed, init_model_parallel
    from remax_megatron.policy.policy import Policy
    from remax_megatron.policy.settings import PolicySettings

    device, found, facts = init_distributed("cpu", 120), [], ModelFacts.from_folder(payload["folder"])
    for tp, pp in payload["layouts"]:
        for budget in payload["budgets"]:
            layout = init_model_parallel(device, tp=tp, pp=pp, vpp=None, seed=1)
            for name, correction in CORRECTIONS.items():
                actor = Actor()
                actor.megatron.dtype, actor.megatron.sequence_parallel, actor.megatron.layers = (
                    "float32",
                    tp > 1,
                    LAYERS,
                )
                actor.megatron.use_distributed_optimizer = False  # so that every rank ends with whole gradients
                actor.optim.clip_grad, actor.ppo_max_token_len_per_gpu = 0.0, budget
                policy = Policy(facts, layout, PolicySettings(actor, correction=correction), payload["folder"])
                rows = rows_with(payload["logprobs"] or policy.logprobs(recorded_rows()))
                weigh_rows(rows, "token-mean")
                update = policy.update(rows)
                engine = [row.rollout_logprobs for row in rows]
                found.append(((tp, pp, budget, name), update.metrics, gradients(policy), engine))
            mpu.destroy_model_parallel()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(make_qwen2(tmp_path_factory.mktemp("corrections") / "model", tied=False, std=0.03))


def updates(folder: str, world: int, logprobs: list[list[float]] | None) -> list:
    payload = {"folder": folder, "layouts": LAYOUTS[world], "budgets": BUDGETS[world], "logprobs": logprobs}
    return run_ranks("tests.policy.test_corrections:worker", world, payload)[0]


def policy_logprobs(folder: str) -> list[list[float]]:
    """By transformers, so that all layouts get the same numbers."""
    import torch
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(folder).eval(), []
    for row in recorded_rows():
        with torch.no_grad():
            logits = model(torch.tensor([[*row.prompt_ids, *row.response_ids]])).logits[0, len(row.prompt_ids) - 1 : -1]
        chosen = logits.log_softmax(-1).gather(1, torch.tensor(row.response_ids)[:, None])
        found.append(chosen.squeeze(1).tolist())
    return found


@pytest.fixture(scope="module")
def alone(folder):
    logprobs = policy_logprobs(folder)
    found = updates(folder, 1, logprobs)
    return logprobs, {name: rest for (_, _, budget, name), *rest in found if budget == 160}, found


def test_each_correction_does_something(alone) -> None:
    _, plain, _ = alone
    metrics = {name: metrics for name, (metrics, _, _) in plain.items()}
    assert metrics["truncated"]["importance/truncated_share"] > 0.05
    assert (
        metrics["IcePop"]["importance/masked_below_share"] > 0.05 < metrics["IcePop"]["importance/masked_above_share"]
    )
    assert 0.1 < metrics["rejected"]["rejection/answer_share"] < 0.9
    names = list(plain)
    for one, other in zip(names, names[1:], strict=False):
        assert relative_difference(plain[one][1], plain[other][1]) > 0.05, (one, other)


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_no_layout_changes_a_corrected_update(world, folder, alone) -> None:
    logprobs, plain, of_one = alone
    for (*_, name), metrics, gradient, _ in of_one if world == 1 else updates(folder, world, logprobs):
        expected, wanted, _ = plain[name]
        shared = {
            key: value for key, value in metrics.items() if key.split("/")[0] in ("importance", "rejection", "actor")
        }
        assert shared == pytest.approx({key: expected[key] for key in shared}, rel=1e-5, abs=1e-6), (world, name)
        assert relative_difference(wanted, gradient) <= 2e-6, (world, name)
