"""KL terms against two transformers models: per token, over the whole vocabulary, and their gradient as a loss."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from remax_megatron.algorithm.aggregation import weigh_rows
from remax_megatron.algorithm.kl import full_kl, token_kl
from remax_megatron.types import Row
from tests.ranks import run_ranks
from tests.small_models import LAYERS, make_qwen2

VOCAB, TEMPERATURE, COEF = 211, 0.8, 0.5
LAYOUTS = {1: [(1, 1)], 2: [(2, 1), (1, 2), (1, 1)]}  # ranks -> (tp, pp)


def rows() -> list[Row]:
    draw = random.Random(9)
    made = []
    for _ in range(8):
        prompt = tuple(draw.randrange(2, VOCAB) for _ in range(draw.randrange(2, 9)))
        response = [draw.randrange(2, VOCAB) for _ in range(draw.randrange(1, 9))]
        advantage = draw.choice([-1.0, 0.0, 1.0])
        made.append(Row(prompt, response, [advantage] * len(response), [-5.0] * len(response)))
    weigh_rows(made, "token-mean")
    return made


def worker(payload):
    """Per layout: the reference's log-probabilities, the full KL, and the gradient with a KL loss of either kind."""
    from megatron.core import parallel_state as mpu

    from remax_megatron.config.schema import Actor
    from remax_megatron.model_facts import ModelFacts
    from remax_megatron.parallel.layout import init_distributed, init_model_parallel
    from remax_megatron.policy.policy import Policy
    from remax_megatron.policy.reference import Reference
    from remax_megatron.policy.settings import PolicySettings
    from tests.policy.test_exactness import gradients

    device = init_distributed("cpu", 120)
    results = []
    for tp, pp in payload["layouts"]:
        layout = init_model_parallel(device, tp=tp, pp=pp, vpp=None, seed=1)
        facts = ModelFacts.from_folder(payload["policy"])
        actor = Actor()
        actor.megatron.dtype, actor.megatron.sequence_parallel = "float32", tp > 1
        actor.megatron.layers = LAYERS
        actor.megatron.use_distributed_optimizer, actor.optim.clip_grad, actor.optim.lr = False, 0.0, 1e-12
        actor.ppo_max_token_len_per_gpu, actor.share_prompts = 40, True
        actor.use_kl_loss, actor.kl_loss_coef = True, COEF
        settings = PolicySettings(actor, TEMPERATURE)
        policy = Policy(facts, layout, settings, payload["policy"])
        reference = Reference(facts, layout, settings, payload["reference"], offload=True)
        batch = rows()
        found = {"logprobs": reference.logprobs(batch), "kl": policy.full_kl(batch, reference)}
        for row, logprobs in zip(batch, found["logprobs"], strict=True):
            row.ref_logprobs = logprobs
        for kind in ("mse", "full"):
            policy._objective = replace(policy._objective, kl_kind=kind)
            update = policy.update(batch, None, reference)
            found[kind] = update.metrics["actor/kl"], gradients(policy)
        results.append(found)
        mpu.destroy_model_parallel()
    return results


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("kl")
    return {
        name: str(make_qwen2(folder / name, tied=False, vocab=VOCAB, seed=seed, std=0.03))
        for seed, name in enumerate(("policy", "reference"))
    }


@pytest.fixture(scope="module")
def expected(folders):
    """The same from transformers and plain torch."""
    from transformers import AutoModelForCausalLM

    policy, reference = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in folders.values())
    found: dict = {"logprobs": [], "kl": []}
    totals = {"mse": torch.zeros(()), "full": torch.zeros(())}
    for row in rows():
        ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
        start, count = len(row.prompt_ids) - 1, len(row.response_ids)
        log_p, log_q = (
            (model(ids).logits[0, start : start + count] / TEMPERATURE).log_softmax(-1) for model in (policy, reference)
        )
        mine, other = (one[range(count), row.response_ids] for one in (log_p, log_q.detach()))
        whole = full_kl(log_p, log_q.detach())
        found["logprobs"].append(other.tolist())
        found["kl"].append(whole.tolist())
        for kind, kl in (("mse", token_kl(mine, other, "mse")), ("full", whole)):
            totals[kind] = totals[kind] + row.weight * (COEF * kl - torch.tensor(row.advantages) * mine).sum()
    names = dict(policy.named_parameters())
    for kind, total in totals.items():
        gradients = torch.autograd.grad(total, list(names.values()), retain_graph=True)
        found[kind] = {name: gradient.double() for name, gradient in zip(names, gradients, strict=True)}
    return found


@pytest.mark.parametrize("world", LAYOUTS)
def test_reference_and_kl_are_those_of_transformers(world, folders, expected):
    payload = folders | {"layouts": LAYOUTS[world]}
    results = run_ranks("tests.policy.test_reference:worker", world, payload)[0]
    for layout, found in zip(LAYOUTS[world], results, strict=True):
        for what in ("logprobs", "kl"):
            for mine, other in zip(found[what], expected[what], strict=True):
                assert mine == pytest.approx(other, abs=2e-5), (layout, what)
        assert min(min(row) for row in found["kl"]) > 0.0
        mean = sum(map(sum, expected["kl"])) / sum(map(len, expected["kl"]))
        assert found["full"][0] == pytest.approx(mean, rel=1e-4) and mean > 0.01  # two models that differ
        for kind in ("mse", "full"):
            gradient = found[kind][1]
            for name, one in expected[kind].items():
                difference = (gradient[name] - one).norm() / expected[kind]["lm_head.weight"].norm()
                assert difference <= 2e-5, (layout, kind, name)
