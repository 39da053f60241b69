"""PPO's actor and critic against plain torch and transformers on one process: values, gradients and an optimizer step,
over layouts and packing. Real Megatron on real gloo ranks, float32, rows with 4 answers per prompt."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import torch

from remax_megatron.algorithm.aggregation import weigh_rows
from remax_megatron.algorithm.gae import gae, token_rewards, whitened
from remax_megatron.types import Row
from tests.policy.test_exactness import relative_difference
from tests.ranks import run_ranks
from tests.small_models import LAYERS, make_critic, make_qwen2

VOCAB, GAMMA, LAM, CLIP = 211, 0.98, 0.9, 0.2
LAYOUTS = {1: [(1, 1)], 2: [(1, 1), (2, 1), (1, 2)], 4: [(2, 2)]}  # ranks -> (tp, pp); the rest is data-parallel
PACKING = {"packed": (160, False), "one row": (0, False), "shared": (160, True)}  # token budget, share_prompts


def recorded_rows() -> list[Row]:
    """4 prompts x 4 answers with outcomes of 0 and 1; one answer is empty, one is masked."""
    draw = random.Random(7)
    rows = []
    for _ in range(4):
        prompt_ids = tuple(draw.randrange(2, VOCAB) for _ in range(draw.randrange(4, 30)))
        for _ in range(4):
            response = [draw.randrange(2, VOCAB) for _ in range(draw.randrange(1, 25))]
            outcome = float(draw.random() < 0.5)
            rows.append(Row(prompt_ids, response, [outcome] * len(response), [-5.0] * len(response)))
    rows[5] = dataclasses.replace(rows[5], response_ids=[], advantages=[], rollout_logprobs=[])
    rows[9].masked = True
    return rows


def outcomes(rows: list[Row]) -> list[float]:
    return [row.advantages[0] if row.advantages else 0.0 for row in rows]


def old_logprobs(rows: list[Row]) -> list[list[float]]:
    """So far from a small model's that some ratios are clipped, on both sides."""
    draw = random.Random(8)
    return [[-5.35 + draw.uniform(-0.4, 0.4) for _ in row.response_ids] for row in rows]


def settings(overrides: list[str]):
    from remax_megatron.config.load import load_config

    given = [
        "algorithm.adv_estimator=gae",
        f"algorithm.gamma={GAMMA}",
        f"algorithm.lam={LAM}",
        f"critic.cliprange_value={CLIP}",
        "critic.optim.lr=0.01",
        "critic.optim.clip_grad=0",
        "actor_rollout_ref.actor.optim.clip_grad=0",
        "actor_rollout_ref.rollout.n=4",
        f"actor_rollout_ref.actor.megatron.layers={LAYERS}",
        "actor_rollout_ref.actor.megatron.use_distributed_optimizer=False",  # every rank ends with whole gradients
        "actor_rollout_ref.actor.megatron.overlap_grad_reduce=False",
        *overrides,
    ]
    return load_config("demo", given).config


def gradients(model) -> dict[str, torch.Tensor]:
    """The gradient of the last update under Hugging Face names, in float64."""
    from remax_megatron.model.live_weights import table_parameters

    stream = model.weight_stream(torch.float32, 2**20)
    chunks = [table_parameters(chunk) for chunk in model.bare_chunks]
    stream._parameters = [{name: p.main_grad for name, p in chunk.items()} for chunk in chunks]
    return {name: tensor.double().clone() for name, tensor in stream}


def worker(payload):
    from megatron.core import parallel_state as mpu

    from remax_megatron.critic_update import CriticLearner
    from remax_megatron.model_facts import ModelFacts
    from remax_megatron.parallel.layout import init_distributed, init_model_parallel
    from remax_megatron.phases import PhaseTimer
    from remax_megatron.policy.critic import Critic
    from remax_megatron.policy.policy import Policy
    from remax_megatron.policy.settings import PolicySettings

    device, results = init_distributed("cpu", 120), []
    for tp, pp in payload["layouts"]:
        for name in payload["packing"]:
            budget, shares = PACKING[name]
            config = settings(
                [
                    f"actor_rollout_ref.actor.megatron.tensor_model_parallel_size={tp}",
                    f"actor_rollout_ref.actor.megatron.sequence_parallel={tp > 1}",
                    f"actor_rollout_ref.actor.share_prompts={shares}",
                    f"actor_rollout_ref.actor.use_dynamic_bsz={budget > 0}",
                    f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu={budget or 4096}",
                    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
                ]
            )
            layout = init_model_parallel(device, tp=tp, pp=pp, vpp=None, seed=1)
            facts = ModelFacts.from_folder(payload["critic"], critic=True).as_critic()
            of_critic = PolicySettings.of_critic(config)
            critic = Critic(facts, layout, of_critic, payload["critic"], cliprange=CLIP)
            policy = Policy(
                ModelFacts.from_folder(payload["policy"]), layout, PolicySettings.of(config), payload["policy"]
            )
            learner, rows = CriticLearner(config, critic, PhaseTimer()), recorded_rows()
            learner.advantages(rows, outcomes(rows), None, 0.0)
            values = [row.values for row in rows]
            for row, old in zip(rows, old_logprobs(rows), strict=True):
                row.old_logprobs = old
                row.values = [value + 0.3 for value in row.values or []]  # as if it were a second update of the batch
            metrics = learner.learn(rows, 4, "test", 1)
            taught = gradients(critic)
            weights = {name: tensor.double().clone() for name, tensor in critic.weight_stream(torch.float32, 2**20)}
            weigh_rows(rows, "token-mean")
            policy.update(rows)
            results.append((values, metrics, taught, weights, gradients(policy)))
            mpu.destroy_model_parallel()
    return results


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("ppo")
    policy = make_qwen2(root / "policy", tied=False, vocab=VOCAB, kv=2, heads=4, std=0.03)
    return {"policy": str(policy), "critic": str(make_critic(root / "critic", vocab=VOCAB, std=0.1, seed=3))}


@pytest.fixture(scope="module")
def expected(folders):
    return by_plain_torch(folders)


def by_plain_torch(folders):
    """(values, gradient of the critic, its weights after Adam's first step, gradient of the policy), row by row."""
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    critic = AutoModelForTokenClassification.from_pretrained(folders["critic"]).double().eval()
    policy = AutoModelForCausalLM.from_pretrained(folders["policy"]).double().eval()
    rows, old = recorded_rows(), old_logprobs(recorded_rows())
    num_tokens = sum(len(row.response_ids) for row in rows)

    def at_responses(outputs: torch.Tensor, row: Row) -> torch.Tensor:
        start = len(row.prompt_ids) - 1
        return outputs[0, start : start + len(row.response_ids)]

    values, raw = [], []
    for row, outcome in zip(rows, outcomes(rows), strict=True):
        tokens = torch.tensor([[*row.prompt_ids, *row.response_ids]])
        value_R = at_responses(critic(tokens).logits, row).squeeze(-1)
        values.append(value_R.tolist())
        advantages, row.returns = gae(token_rewards(outcome, len(value_R)), values[-1], GAMMA, LAM)
        raw.append([] if row.masked else advantages)
        if row.masked or not row.response_ids:
            continue
        return_R, old_R = torch.tensor(row.returns).double(), value_R.detach() + 0.3
        held_R = old_R + (value_R - old_R).clamp(-CLIP, CLIP)
        loss_R = 0.5 * torch.maximum((value_R - return_R) ** 2, (held_R - return_R) ** 2)
        (loss_R.sum() / num_tokens).backward()
    for row, advantages, old_R in zip(rows, whitened(raw), map(torch.tensor, old), strict=True):
        if not advantages:
            continue
        tokens = torch.tensor([[*row.prompt_ids, *row.response_ids]])
        logits_RV = at_responses(policy(tokens).logits, row)
        logprob_R = logits_RV.log_softmax(-1).gather(1, torch.tensor(row.response_ids)[:, None]).squeeze(1)
        ratio_R, advantage_R = (logprob_R - old_R.double()).exp(), torch.tensor(advantages).double()
        pessimistic_R = torch.minimum(ratio_R * advantage_R, ratio_R.clamp(0.8, 1.2) * advantage_R)
        loss_R = -torch.where(advantage_R < 0, torch.maximum(pessimistic_R, 3 * advantage_R), pessimistic_R)
        (loss_R.sum() / num_tokens).backward()
    gradient = {name: parameter.grad.clone() for name, parameter in critic.named_parameters()}
    # Adam's first step is lr x g / (|g| + eps), after the decay of the matrices.
    with torch.no_grad():
        for parameter in critic.parameters():
            decay = 1 - 0.01 * 0.01 * (parameter.dim() > 1)
            parameter.mul_(decay).sub_(0.01 * parameter.grad / (parameter.grad.abs() + 1e-8))
    weights = {name: parameter.detach() for name, parameter in critic.named_parameters()}
    return values, gradient, weights, {name: parameter.grad for name, parameter in policy.named_parameters()}


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_layout_is_plain_torch(world, folders, expected) -> None:
    values, gradient, weights, of_policy = expected
    packing = list(PACKING) if world == 1 else ["packed"]
    payload = {**folders, "layouts": LAYOUTS[world], "packing": packing}
    found = run_ranks("tests.policy.test_critic:worker", world, payload, preload=("remax_megatron.policy.critic",))[0]
    cases = [(layout, name) for layout in LAYOUTS[world] for name in packing]
    for case, (one_values, metrics, taught, updated, of_actor) in zip(cases, found, strict=True):
        flat, wanted = ([x for row in rows for x in row] for rows in (one_values, values))
        assert max(abs(a - b) for a, b in zip(flat, wanted, strict=True)) < 1e-5, case
        for reference, ours in ((gradient, taught), (of_policy, of_actor)):
            assert max((reference[name] - ours[name]).abs().max().item() for name in reference) <= 1e-6, case
            assert relative_difference(reference, ours) <= 2e-6, case  # plain torch is in float64
        # Where a gradient is within rounding of 0 its sign, which is all of Adam's first step, is that of the rounding.
        sure = {name: one.abs() > 1e-7 for name, one in gradient.items()}
        assert all((updated[n] - weights[n])[sure[n]].abs().max() < 1e-4 for n in weights if sure[n].any()), case
        assert metrics["critic/num_updates"] == 1 and 0 < metrics["critic/clip_share"] < 1, case


def test_a_critic_from_a_language_model_knows_nothing_at_first(folders) -> None:
    """Its layers are the model's and its head is 0: every value is 0, and the first gradient is the head's alone."""
    payload = {**folders, "critic": folders["policy"], "layouts": [(1, 1)], "packing": ["packed"]}
    values, _, taught, _, _ = run_ranks("tests.policy.test_critic:worker", 1, payload)[0][0]
    assert not any(value for row in values for value in row)
    assert {name for name, gradient in taught.items() if gradient.any()} == {"score.weight", "score.bias"}


def offload_worker(payload):
    """(values, values after the weights were on the host, whether their memory was given up, the state in between)."""
    from remax_megatron.model_facts import ModelFacts
    from remax_megatron.parallel.layout import init_distributed, init_model_parallel
    from remax_megatron.policy.critic import Critic
    from remax_megatron.policy.settings import PolicySettings
    from remax_megatron.policy.training_state import TrainingState

    device, rows = init_distributed("cpu", 120), recorded_rows()
    distributed = f"actor_rollout_ref.actor.megatron.use_distributed_optimizer={payload['distributed']}"
    config = settings([distributed])
    layout = init_model_parallel(device, tp=1, pp=1, vpp=None, seed=1)
    facts = ModelFacts.from_folder(payload["critic"], critic=True).as_critic()
    critic = Critic(facts, layout, PolicySettings.of_critic(config), payload["critic"], cliprange=CLIP)
    state = TrainingState(critic, "critic.")

    def saved() -> dict[str, torch.Tensor]:
        return {name: block.data.clone() for name, block in state.sharded().items()}

    before, blocks = critic.values(rows), saved()
    critic.offload_weights()
    away = sum(parameter.untyped_storage().nbytes() for parameter in critic.chunks[0].parameters())
    again = saved()
    same = blocks.keys() == again.keys() and all(torch.equal(blocks[name], again[name]) for name in blocks)
    return before, critic.values(rows), away, same, sorted({name.split("/")[0] for name in blocks})[:2]


@pytest.mark.parametrize("distributed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_weights_wait_on_the_host(distributed, folders) -> None:
    payload = {**folders, "distributed": distributed}
    before, after, away, same, names = run_ranks("tests.policy.test_critic:offload_worker", 2, payload)[0]
    assert before == after and away == 0 and same
    assert all(name.startswith("critic.") for name in names)


def test_the_folder_of_a_policy_is_not_a_critic_s(folders, tmp_path: Path) -> None:
    from remax_megatron.errors import UserError
    from remax_megatron.model_facts import ModelFacts

    assert ModelFacts.from_folder(folders["critic"], critic=True).value_head
    assert not ModelFacts.from_folder(folders["policy"], critic=True).value_head
    with pytest.raises(UserError, match="Qwen2ForTokenClassification.*expected Qwen2ForCausalLM or Qwen3ForCausalLM;"):
        ModelFacts.from_folder(folders["critic"])
