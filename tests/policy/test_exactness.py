"""What must not change the gradient: leaving zero-advantage rows out, sharing prompts, the budget, the layout,
recomputation. Real Megatron on real gloo ranks, float32, recorded rows with n = 4 answers per prompt."""

from __future__ import annotations

import random

import pytest
import torch

from remax_megatron.algorithm.aggregation import weigh_rows
from remax_megatron.types import Recompute, Row
from tests.ranks import run_ranks
from tests.small_models import LAYERS, make_qwen2

VOCAB = 211
LAYOUTS = {  # ranks -> (dp, tp, pp)
    2: [(2, 1, 1), (1, 2, 1), (1, 1, 2)],
    4: [(4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2)],
    8: [(4, 2, 1), (4, 1, 2), (2, 2, 2)],
    16: [(4, 2, 2)],
}
FULL = Recompute("full")
HOW = {  # share_prompts, skip, budget (None: one row per micro-batch), recompute
    "plain": (False, False, 160, Recompute()),
    "skip": (False, True, 160, Recompute()),
    "shared": (True, False, 160, Recompute()),
    "shared and skip": (True, True, 160, Recompute()),
    "one row": (False, False, None, Recompute()),
    "all in one": (False, False, 10**6, Recompute()),
    "all in one, shared": (True, True, 10**6, Recompute()),
    "tight, shared": (True, True, 70, Recompute()),
    "recompute": (False, True, 160, FULL),
    "recompute, shared": (True, True, 160, FULL),
}


def recorded_rows() -> list[Row]:
    """6 prompts x 4 answers; advantages as under ReMax with binary rewards: one prompt has none but zeros."""
    draw = random.Random(5)
    rows = []
    for prompt in range(6):
        prompt_ids = tuple(draw.randrange(2, VOCAB) for _ in range(draw.randrange(4, 30)))
        for _ in range(4):
            response = [draw.randrange(2, VOCAB) for _ in range(draw.randrange(1, 25))]
            advantage = 0.0 if prompt == 2 else draw.choice([-1.0, 0.0, 0.0, 1.0])
            rows.append(Row(prompt_ids, response, [advantage] * len(response), [-5.0] * len(response)))
    return rows


def build(folder: str, device, *, tp: int, pp: int, how: tuple, layers: str = LAYERS):
    from remax_megatron.config.schema import Actor
    from remax_megatron.model_facts import ModelFacts
    from remax_megatron.parallel.layout import init_model_parallel
    from remax_megatron.policy.policy import Policy
    from remax_megatron.policy.settings import PolicySettings

    share, _, budget, recompute = how
    actor = Actor()
    actor.megatron.dtype, actor.megatron.sequence_parallel = "float32", tp > 1
    actor.megatron.layers = layers
    actor.megatron.use_distributed_optimizer = False  # so that every rank ends with whole gradients
    actor.optim.clip_grad = 0.0
    actor.share_prompts = share
    actor.use_dynamic_bsz = budget is not None
    actor.ppo_max_token_len_per_gpu = budget or 0
    actor.ppo_micro_batch_size_per_gpu = 1
    layout = init_model_parallel(device, tp=tp, pp=pp, vpp=None, seed=1)
    facts = ModelFacts.from_folder(folder)
    return Policy(facts, layout, PolicySettings(actor, recompute=recompute), folder)


def gradients(policy) -> dict[str, torch.Tensor]:
    """The gradient of the last update under Hugging Face names, in float64."""
    from remax_megatron.model.live_weights import table_parameters

    stream = policy.weight_stream(torch.float32, 2**20)
    chunks = [table_parameters(chunk) for chunk in policy.bare_chunks]
    stream._parameters = [{name: p.main_grad for name, p in chunk.items()} for chunk in chunks]
    return {name: tensor.double().clone() for name, tensor in stream}


def worker(payload):
    from megatron.core import parallel_state as mpu

    from remax_megatron.parallel.layout import init_distributed

    device = init_distributed("cpu", 120)
    results = []
    for _, tp, pp in payload["layouts"]:
        for name in payload["how"]:
            how = HOW[name]
            policy = build(payload["folder"], device, tp=tp, pp=pp, how=how)
            rows = recorded_rows()
            weigh_rows(rows, "token-mean")
            trained = [row for row in rows if any(row.advantages)] if how[1] else rows
            update = policy.update(trained)
            found = gradients(policy)  # collective
            if device is not None and policy.layout.rank == 0:
                results.append((name, update.loss, update.num_computed_tokens, found))
            mpu.destroy_model_parallel()
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(make_qwen2(tmp_path_factory.mktemp("exact") / "model", tied=False, vocab=VOCAB, kv=2, heads=4, std=0.03))


@pytest.fixture(scope="module")
def alone(folder):
    """Every way of computing the update on one rank."""
    payload = {"folder": folder, "layouts": [(1, 1, 1)], "how": list(HOW)}
    return {name: rest for name, *rest in run_ranks("tests.policy.test_exactness:worker", 1, payload)[0]}


def relative_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return (sum((a[n] - b[n]).square().sum() for n in a) / sum(a[n].square().sum() for n in a)).sqrt().item()


def test_every_way_of_computing_an_update_gives_one_gradient(alone):
    loss, _, plain = alone["plain"]
    for name, (one_loss, _, gradient) in alone.items():
        assert one_loss == pytest.approx(loss, abs=1e-6), name
        assert relative_difference(plain, gradient) <= 1e-6, name


def test_what_is_left_out_is_not_computed(alone):
    rows = recorded_rows()
    kept = [row for row in rows if any(row.advantages)]
    assert len({row.prompt_ids for row in kept}) < 6 and 0 < len(kept) < len(rows)
    tokens = {name: computed for name, (_, computed, _) in alone.items()}
    assert tokens["plain"] == tokens["one row"] == sum(row.num_tokens for row in rows)
    assert tokens["skip"] == sum(row.num_tokens for row in kept)
    prompts = {row.prompt_ids for row in kept}
    once = sum(map(len, prompts)) + sum(len(row.response_ids) for row in kept)
    assert tokens["all in one, shared"] == once < tokens["skip"]
    assert once <= tokens["tight, shared"] <= tokens["skip"]  # a prompt may be needed in two micro-batches


@pytest.mark.parametrize("world", [2, 4, 8, pytest.param(16, marks=pytest.mark.slow)])
def test_every_layout_gives_the_same_gradient(world, folder, alone):
    names = ["plain", "shared and skip"]
    payload = {"folder": folder, "layouts": LAYOUTS[world], "how": names}
    results = run_ranks("tests.policy.test_exactness:worker", world, payload)[0]
    layouts = [layout for layout in LAYOUTS[world] for _ in names]
    loss, _, plain = alone["plain"]
    for layout, (name, one_loss, _, gradient) in zip(layouts, results, strict=True):
        assert one_loss == pytest.approx(loss, abs=1e-6), (layout, name)
        assert relative_difference(plain, gradient) <= 1e-6, (layout, name)
