"""The Megatron policy against transformers, and against itself over every layout: real gloo ranks, float32."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from remax_megatron.guards import Skip
from remax_megatron.types import Recompute, Row
from tests.ranks import run_ranks
from tests.small_models import LAYERS, YARN, make_qwen2, make_qwen3

VOCAB = 211  # padded to 256 (TP 1, 2) and 512 (TP 4)
LAYOUTS = {  # ranks -> (tp, pp, vpp, sequence parallel)
    1: [(1, 1, None, False)],
    2: [(2, 1, None, False), (2, 1, None, True), (1, 2, None, False), (1, 2, 2, False), (1, 1, None, False)],
    4: [(4, 1, None, True), (1, 4, None, False), (2, 2, None, True), (2, 2, 2, False), (2, 1, None, False)],
}


def make_rows(seed: int = 0, count: int = 12) -> list[Row]:
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt = tuple(draw.randrange(2, VOCAB) for _ in range(draw.randrange(3, 20)))
        response = [draw.randrange(2, VOCAB) for _ in range(draw.randrange(1, 30))]
        advantage = draw.choice([-1.0, 0.0, 1.0, 1.0])
        rows.append(Row(prompt, response, [advantage] * len(response), [-5.0] * len(response)))
    return rows


def build_policy(folder: str, layout, device, *, budget: int = 120, rows_per_batch: int | None = None, recompute=None):
    from remax_megatron.config.schema import Actor
    from remax_megatron.model_facts import ModelFacts
    from remax_megatron.parallel.layout import init_model_parallel
    from remax_megatron.policy.policy import Policy
    from remax_megatron.policy.settings import PolicySettings

    tp, pp, vpp, sequence_parallel = layout
    actor = Actor()
    actor.megatron.dtype = "float32"
    actor.megatron.layers = LAYERS
    actor.megatron.sequence_parallel = sequence_parallel
    actor.megatron.logprob_chunk_size = 37
    actor.ppo_max_token_len_per_gpu = budget
    actor.use_dynamic_bsz = rows_per_batch is None
    actor.ppo_micro_batch_size_per_gpu = rows_per_batch
    actor.optim.lr, actor.optim.eps = 1e-4, 1e-5
    ranks = init_model_parallel(device, tp=tp, pp=pp, vpp=vpp, seed=1)
    facts = ModelFacts.from_folder(folder)
    return Policy(facts, ranks, PolicySettings(actor, recompute=recompute or Recompute()), folder)


def take_update(policy, rows: list[Row]):
    """An optimizer step on all of `rows`, token mean."""
    from remax_megatron.algorithm.aggregation import weigh_rows

    weigh_rows(rows, "token-mean")
    return policy.update(rows)


def logits_of(policy, rows: list[Row]) -> list[torch.Tensor] | None:
    """Full logits [tokens, vocabulary] of every row, from the policy's own hidden states and head; on the ranks that
    hold the last stage."""
    import torch.distributed as dist

    found: dict[int, torch.Tensor] = {}
    score = policy._score

    def capture(chunk, hidden_T1H, batch, temperature):
        from megatron.core import tensor_parallel

        hidden = hidden_T1H
        if policy.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden)
        while hasattr(chunk, "module"):
            chunk = chunk.module
        shard = hidden.squeeze(1) @ chunk.head_weight().T
        parts = [torch.empty_like(shard) for _ in range(policy.layout.tp)]
        dist.all_gather(parts, shard.contiguous(), group=policy.layout.tp_group)
        logits = torch.cat(parts, dim=-1)[:, : policy.facts.vocab_size]
        for i, row in enumerate(batch.rows):
            found[row] = logits[batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]].clone()
        return score(policy.chunks[-1], hidden_T1H, batch, temperature)

    policy._score = capture
    policy.logprobs(rows)
    policy._score = score
    mine = found if policy.layout.reports_for_replica else {}
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    together = {row: logits for part in parts for row, logits in part.items()}
    return [together[i] for i in range(len(rows))]


def worker(payload):
    """Every layout of one world size on every model: (largest logit difference, loss, gradient norm, weights
    after the step)."""
    from megatron.core import parallel_state as mpu

    from remax_megatron.parallel.layout import init_distributed

    device = init_distributed("cpu", 120)
    results = []
    for folder, reference in payload["models"]:
        for layout in payload["layouts"]:
            policy = build_policy(folder, layout, device)
            logits = logits_of(policy, payload["rows"])
            largest = max((a - b).abs().max().item() for a, b in zip(logits, reference, strict=True))
            update = take_update(policy, payload["rows"])
            weights = {name: tensor.clone() for name, tensor in policy.weight_stream(torch.float32, 2**20)}
            results.append((folder, layout, largest, update.loss, update.grad_norm, weights))
            mpu.destroy_model_parallel()
    return results


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(folder, logits of transformers for every row) of tied and untied models with 2 KV heads, of both families,
    with and without YaRN. The first two are plain Qwen2."""
    from transformers import AutoModelForCausalLM

    made = []
    for make, tied, rope in [
        *((make_qwen2, tied, None) for tied in (True, False)),
        *((make_qwen3, tied, None) for tied in (True, False)),
        (make_qwen2, False, YARN),
        (make_qwen3, True, YARN),
    ]:
        name = f"{make.__name__}-tied-{tied}-{'yarn' if rope else 'plain'}"
        folder = make(tmp_path_factory.mktemp("model") / name, tied=tied, vocab=VOCAB, rope=rope)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            ids = [torch.tensor([[*row.prompt_ids, *row.response_ids]]) for row in make_rows()]
            made.append((str(folder), [model(one).logits[0] for one in ids]))
    return made


@pytest.fixture(scope="module")
def single(models):
    """The result of one rank, which every layout must reproduce."""
    payload = {"models": models, "layouts": LAYOUTS[1], "rows": make_rows()}
    return run_ranks("tests.model.test_parity:worker", 1, payload)[0]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_logits_loss_and_gradient_are_those_of_transformers_and_of_one_rank(models, single, world):
    payload = {"models": models, "layouts": LAYOUTS[world], "rows": make_rows()}
    results = single if world == 1 else run_ranks("tests.model.test_parity:worker", world, payload)[0]
    one_rank = {folder: (loss, norm, weights) for folder, _, _, loss, norm, weights in single}
    for folder, layout, largest, loss, norm, weights in results:
        assert largest <= 1e-4, (Path(folder).name, layout)
        assert loss == pytest.approx(one_rank[folder][0], rel=1e-5), (Path(folder).name, layout)
        assert norm == pytest.approx(one_rank[folder][1], rel=1e-5), (Path(folder).name, layout)
        for name, tensor in one_rank[folder][2].items():
            assert (weights[name] - tensor).abs().max() <= 1e-6, (Path(folder).name, layout, name)


def packing_worker(payload):
    from megatron.core import parallel_state as mpu

    from remax_megatron.parallel.layout import init_distributed

    device = init_distributed("cpu", 120)
    results = []
    for settings in payload["settings"]:
        policy = build_policy(payload["folder"], (1, 1, None, False), device, **settings)
        update = take_update(policy, payload["rows"])
        results.append((settings, update.num_microbatches, update.loss, update.grad_norm))
        mpu.destroy_model_parallel()
    return results


def test_packing_and_recomputation_change_nothing(models, single):
    settings = [
        {"rows_per_batch": 1},  # one row per micro-batch
        {"budget": 10**6},  # all rows in one
        {"budget": 50},
        {"budget": 120, "recompute": Recompute("full")},
        {"budget": 120, "recompute": Recompute("full", "block", 1)},
        {"budget": 120, "recompute": Recompute("selective")},
    ]
    payload = {"folder": models[0][0], "settings": settings, "rows": make_rows()}
    results = run_ranks("tests.model.test_parity:packing_worker", 1, payload)[0]
    _, _, _, loss, norm, _ = single[0]
    assert [count for _, count, _, _ in results[:2]] == [12, 1]
    for setting, _, one_loss, one_norm in results:
        assert one_loss == pytest.approx(loss, rel=1e-5), setting
        assert one_norm == pytest.approx(norm, rel=1e-5), setting


def not_finite_worker(folder: str):
    """A NaN advantage: what the update says, and whether the weights are as before."""
    from remax_megatron.parallel.layout import init_distributed

    policy = build_policy(folder, (1, 1, None, False), init_distributed("cpu", 120))
    before = {name: tensor.clone() for name, tensor in policy.weight_stream(torch.float32, 2**20)}
    rows = make_rows()
    rows[3].advantages[0] = float("nan")
    update = take_update(policy, rows)
    after = dict(policy.weight_stream(torch.float32, 2**20))
    return update.skipped, update.nonfinite_rows, all(torch.equal(before[name], after[name]) for name in before)


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(models):
    found = run_ranks("tests.model.test_parity:not_finite_worker", 1, models[0][0])[0]
    assert found == (Skip.NONFINITE, [3], True)


# -- one step against a hand-written reference ------------------------------------------------------------------------


def reference_worker(payload):
    """Two optimizer steps of the real policy: results and weights."""
    from remax_megatron.parallel.layout import init_distributed

    device = init_distributed("cpu", 120)
    policy = build_policy(payload["folder"], (1, 1, None, False), device)
    updates = []
    for _ in range(2):
        update = take_update(policy, payload["rows"])
        updates.append((update.loss, update.grad_norm))
    stream = policy.weight_stream(torch.float32, 10**6)
    return updates, {name: tensor.clone() for name, tensor in stream}


def reference_steps(folder: str, rows: list[Row], num_steps: int):
    """The same by hand: transformers' model, log-softmax, token mean, gradient clipping at 1, AdamW (lr 1e-4, betas
    0.9 and 0.999, eps 1e-5, weight decay 0.01 on matrices), nothing of Megatron."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.999), eps=1e-5)
    num_tokens = sum(len(row.response_ids) for row in rows)
    results = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        total = torch.zeros(())
        for row in rows:
            logits = model(torch.tensor([[*row.prompt_ids, *row.response_ids]])).logits[0]
            start = len(row.prompt_ids) - 1
            logprobs = logits[start : start + len(row.response_ids)].log_softmax(-1)
            picked = logprobs[range(len(row.response_ids)), row.response_ids]
            ratio = (picked - picked.detach()).exp()
            total = total - (torch.tensor(row.advantages) * ratio).sum()
        loss = total / num_tokens
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        results.append((loss.item(), norm.item()))
    return results, model.state_dict()


def test_two_steps_equal_a_hand_written_reference(models):
    from remax_megatron.algorithm.advantages import advantages, training_rows
    from remax_megatron.algorithm.estimators import get_estimator
    from remax_megatron.types import Completion, Prompt, Rollout

    draw = random.Random(3)

    def completion(reward: float) -> Completion:
        ids = [draw.randrange(2, VOCAB) for _ in range(draw.randrange(2, 20))]
        return Completion(ids, [-5.0] * len(ids), True, weight_version=4, reward=reward)

    rewards = [([1.0, 0.0, 1.0], 0.0), ([0.0, 0.0, 1.0], 1.0), ([0.0, 0.0, 0.0], 0.0)]
    rollouts = [
        Rollout(
            Prompt(i, tuple(draw.randrange(2, VOCAB) for _ in range(9)), "x", "y"),
            [completion(r) for r in sampled],
            completion(greedy),
        )
        for i, (sampled, greedy) in enumerate(rewards)
    ]
    remax = get_estimator("remax")
    assert advantages(rollouts, remax) == [[1.0, 0.0, 1.0], [-1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]
    rows = training_rows(rollouts, remax)
    for folder, _ in models:
        payload = {"folder": folder, "rows": rows}
        updates, weights = run_ranks("tests.model.test_parity:reference_worker", 1, payload)[0]
        expected, expected_weights = reference_steps(folder, rows, 2)
        for (loss, norm), (expected_loss, expected_norm) in zip(updates, expected, strict=True):
            assert loss == pytest.approx(expected_loss, abs=1e-6)
            assert norm == pytest.approx(expected_norm, rel=1e-5)
        for name, tensor in weights.items():
            assert (tensor - expected_weights[name]).abs().max() <= 1e-6, name
