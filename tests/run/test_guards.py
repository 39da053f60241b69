"""Updates that must not be made: skipped or refused on every rank alike, without a trace in weights and optimizer,
their rows kept, the run stopped when told to. Real Megatron on two gloo ranks; the rest by hand."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch

from remax_megatron.algorithm.aggregation import weigh_rows
from remax_megatron.guards import (
    NUM_WORST_ROWS,
    MismatchError,
    NonFiniteError,
    Skip,
    mismatch_limit,
    mismatch_records,
    nonfinite_records,
    skip_reason,
)
from remax_megatron.types import Completion, Prompt, Rollout, Row
from tests.logged import logged_lines
from tests.ranks import run_ranks
from tests.small_models import LAYERS, make_qwen2

VOCAB = 211
NAN, INF = math.nan, math.inf
LAYOUTS = {  # -> (tp, pp, vpp, distributed optimizer, dtype)
    "DP 2": (1, 1, None, True, "float32"),
    "DP 2, whole optimizer": (1, 1, None, False, "float32"),
    "DP 2, bfloat16": (1, 1, None, True, "bfloat16"),
    "TP 2": (2, 1, None, True, "float32"),
    "PP 2": (1, 2, None, True, "float32"),
    "PP 2, 2 chunks": (1, 2, 2, False, "float32"),
}
BAD_ROW = 5


def make_rows(seed: int) -> list[Row]:
    """8 rows with two old log-probabilities to speak of: ratios away from 1, advantages +-1."""
    draw = random.Random(seed)
    rows = []
    for _ in range(8):
        response = [draw.randrange(2, VOCAB) for _ in range(draw.randrange(2, 12))]
        advantages = [draw.choice([-1.0, 1.0])] * len(response)
        prompt = tuple(draw.randrange(2, VOCAB) for _ in range(6))
        rows.append(Row(prompt, response, advantages, [-5.0] * len(response), old_logprobs=[-5.4] * len(response)))
    weigh_rows(rows, "token-mean")
    return rows


def spoil(rows: list[Row], how: str) -> None:
    row = rows[BAD_ROW]
    if how == "nan advantage":
        row.advantages[1] = NAN
    elif how == "infinite advantage":
        row.advantages = [INF] * len(row.advantages)
    elif how == "nan logprob":
        row.old_logprobs[1] = NAN
    elif how == "gradient":  # finite, but the square of its norm is not
        for row in rows:
            row.advantages = [1e30] * len(row.advantages)


BAD = {"nan advantage": [BAD_ROW], "infinite advantage": [BAD_ROW], "nan logprob": [BAD_ROW], "gradient": []}  # -> rows
FINITE = {  # loss, gradient norm: a NaN ratio is clipped, and has no gradient
    "nan advantage": (False, False),
    "infinite advantage": (False, False),
    "nan logprob": (False, True),
    "gradient": (True, False),
    "one rank": (True, False),
}


def build(folder: str, device, layout: tuple, actor=None):
    from remax_megatron.config.schema import Actor
    from remax_megatron.model_facts import ModelFacts
    from remax_megatron.parallel.layout import init_model_parallel
    from remax_megatron.policy.policy import Policy
    from remax_megatron.policy.settings import PolicySettings

    tp, pp, vpp, distributed_optimizer, dtype = layout
    actor = actor or Actor()
    actor.megatron.dtype, actor.megatron.use_distributed_optimizer = dtype, distributed_optimizer
    actor.megatron.layers = LAYERS
    actor.ppo_max_token_len_per_gpu, actor.optim.lr = 64, 1e-3
    ranks = init_model_parallel(device, tp=tp, pp=pp, vpp=vpp, seed=1)
    return Policy(ModelFacts.from_folder(folder), ranks, PolicySettings(actor), folder)


def state_of(policy) -> list[torch.Tensor]:
    """Copies of this rank's parameters, master weights, moments and step counts."""
    tensors = [parameter for chunk in policy.bare_chunks for parameter in chunk.parameters()]
    for optimizer in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer]):
        adam = optimizer.optimizer
        for main in [main for group in adam.param_groups for main in group["params"]]:
            tensors += [main, *(torch.as_tensor(value) for _, value in sorted(adam.state[main].items()))]
        tensors += [torch.as_tensor(group.get("step", 0)) for group in adam.param_groups]
    return [tensor.detach().clone() for tensor in tensors]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def policy_worker(folder: str):
    """layout -> ([(what was bad, skipped, rows, loss, gradient norm, state as before)], the good update afterwards is
    as without them)."""
    from megatron.core import parallel_state as mpu

    from remax_megatron.parallel.layout import init_distributed

    device = init_distributed("cpu", 120)
    results = {}
    for name, layout in LAYOUTS.items():
        policy = build(folder, device, layout)
        first = policy.update(make_rows(1))
        before, found = state_of(policy), []
        for how in BAD:
            rows = make_rows(2)
            spoil(rows, how)
            bad = policy.update(rows)
            untouched = same(before, state_of(policy)) and policy.num_updates == 1
            found.append((how, bad.skipped, bad.nonfinite_rows, str(bad.loss), str(bad.grad_norm), untouched))
        if policy.layout.rank == 1:  # alone sees a reason
            norm = policy.optimizer.get_grad_norm
            policy.optimizer.get_grad_norm = lambda norm=norm: norm() * NAN
        alone = policy.update(make_rows(2))
        untouched = same(before, state_of(policy)) and policy.num_updates == 1
        found.append(("one rank", alone.skipped, alone.nonfinite_rows, str(alone.loss), "nan", untouched))
        vars(policy.optimizer).pop("get_grad_norm", None)
        second = policy.update(make_rows(3))
        after = state_of(policy)
        mpu.destroy_model_parallel()

        policy = build(folder, device, layout)
        expected = [policy.update(make_rows(seed)) for seed in (1, 3)]
        as_without = [first, second] == expected and same(after, state_of(policy)) and not same(before, after)
        results[name] = found, as_without, (second.loss, second.grad_norm)
        mpu.destroy_model_parallel()
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(make_qwen2(tmp_path_factory.mktemp("guards") / "model", tied=False, vocab=VOCAB, layers=4))


def test_a_bad_update_leaves_no_trace(folder: str) -> None:
    results = run_ranks("tests.run.test_guards:policy_worker", 2, folder)
    for name, (found, as_without, good) in results[0].items():
        assert as_without, name
        assert all(map(math.isfinite, good)), name
        for how, skipped, rows, loss, norm, untouched in found:
            assert skipped == Skip.NONFINITE and untouched, (name, how)
            assert rows == BAD.get(how, []), (name, how)
            assert (math.isfinite(float(loss)), math.isfinite(float(norm))) == FINITE[how], (name, how)
    assert results[0] == results[1]  # every number, on both ranks


# -- the learner: files, the count, the end of the run -----------------------------------------------------------------


def learner_on(folder: str, device, layout: tuple, out: Path, *overrides: str):
    from remax_megatron.config.load import load_config
    from remax_megatron.update import Learner

    actor = "actor_rollout_ref.actor"
    given = [f"trainer.default_local_dir={out}", "trainer.max_nonfinite_updates=2", f"{actor}.ppo_epochs=1"]
    config = load_config("demo", [*given, "actor_rollout_ref.rollout.mismatch_threshold=0.01", *overrides]).config
    policy = build(folder, device, layout, config.actor_rollout_ref.actor)
    return Learner(config, policy, None)


def make_rollouts(policy, seed: int, off_by: float = 0.0) -> list[Rollout]:
    """4 prompts x 4 answers whose engine's log-probabilities are the policy's + `off_by`. Collective."""
    draw = random.Random(seed)
    rollouts = []
    for number in range(4):
        samples = []
        for i in range(4):
            ids = [draw.randrange(2, VOCAB) for _ in range(draw.randrange(2, 12))]
            samples.append(Completion(ids, [], True, 0, reward=float(i % 2 * 2 - 1)))
        prompt = Prompt(number, tuple(draw.randrange(2, VOCAB) for _ in range(5)), "x", "y")
        rollouts.append(Rollout(prompt, samples, Completion([1], [-1.0], True, 0, reward=0.0)))
    rows = [Row(r.prompt.token_ids, s.token_ids, [], []) for r in rollouts for s in r.samples]
    logprobs = policy.logprobs(rows)
    for sample, policys in zip([s for r in rollouts for s in r.samples], logprobs, strict=True):
        sample.logprobs = [one + off_by for one in policys]
    return rollouts


def without_reward(rollouts: list[Rollout]) -> list[Rollout]:
    rollouts[1].samples[2].reward = NAN  # row 6 of 16
    return rollouts


def learner_worker(payload):
    with logged_lines() as said:
        return _learner_worker(payload, said)


def _learner_worker(payload, said: list[str]):
    from megatron.core import parallel_state as mpu

    from remax_megatron.parallel.layout import init_distributed

    device = init_distributed("cpu", 120)
    results = {}
    for name in payload["layouts"]:
        out = Path(payload["out"]) / name
        said.clear()
        learner = learner_on(payload["folder"], device, LAYOUTS[name], out)
        policy, counts = learner.policy, []

        def learn(rollouts, step, learner=learner, counts=counts):
            learned = learner.learn(rollouts, f"Epoch 1, Step {step}", step=step)
            guard = [learned.metrics[f"guard/nonfinite_{key}"] for key in ("updates", "in_a_row")]
            counts.append((*guard, learned.updates[0].skipped))

        learn(without_reward(make_rollouts(policy, 1)), 1)
        state = json.loads(json.dumps(learner.state_dict()))
        learner.guards.nonfinite_in_a_row = 0
        learner.load_state_dict(state)
        resumed = learner.guards.nonfinite_in_a_row
        learn(make_rollouts(policy, 2, off_by=0.009), 2)  # just below the limit, and good: the count begins anew
        learn(without_reward(make_rollouts(policy, 3)), 3)
        ends = []
        try:
            learn(without_reward(make_rollouts(policy, 4)), 4)
        except NonFiniteError as error:
            ends.append(str(error))
        before = state_of(policy)
        rollouts = make_rollouts(policy, 5, off_by=0.011)
        rollouts[2].samples[1].logprobs[1] += 0.5  # row 9
        try:
            learn(rollouts, 5)
        except MismatchError as error:
            ends.append(str(error))
        ends.append(same(before, state_of(policy)))
        results[name] = counts, resumed, ends, [line for line in said if "skipped" in line]
        mpu.destroy_model_parallel()
    blocked = Path(payload["out"]) / "blocked"
    blocked.mkdir(exist_ok=True)
    (blocked / "guards").write_text("a file where the folder should be")
    said.clear()
    learner = learner_on(payload["folder"], device, LAYOUTS["DP 2"], blocked, "trainer.max_nonfinite_updates=9")
    learner.learn(without_reward(make_rollouts(learner.policy, 1)), "Step 1")
    results["blocked"] = [line for line in said if "skipped" in line]

    # Two updates of one batch: the second is not compared, for its weights did not write the answers.
    learner.guards._mismatch_limit = 1e-4
    learner.config.actor_rollout_ref.actor.ppo_epochs = 2
    results["epochs"] = [u.skipped for u in learner.learn(make_rollouts(learner.policy, 2), "Step 2").updates]
    return results


@pytest.fixture(scope="module")
def learned(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    payload = {"folder": folder, "out": str(out), "layouts": ["DP 2", "TP 2", "PP 2"]}
    return out, run_ranks("tests.run.test_guards:learner_worker", 2, payload)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("layout", ["DP 2", "TP 2", "PP 2"])
def test_bad_updates_are_counted_and_end_the_run_on_every_rank(learned, layout: str) -> None:
    out, ranks = learned
    counts, resumed, ends, said = ranks[0][layout]
    assert counts == [(1, 1, Skip.NONFINITE), (0, 0, Skip.NONE), (1, 1, Skip.NONFINITE)]
    assert resumed == 1
    file = out / layout / "guards" / "nonfinite-step4-update1.jsonl"
    assert ends[0].startswith(
        "Epoch 1, Step 4: update 1 of 1 was skipped, the weights were not changed: loss nan, gradient norm nan; "
        f"1 of 16 rows have such a loss, see {file}. It is number 2 in a row, and trainer.max_nonfinite_updates=2."
    )
    assert [line.split(":")[0] for line in said] == ["Epoch 1, Step 1", "Epoch 1, Step 3"]
    assert said[0].endswith("1 in a row, trainer.max_nonfinite_updates=2 end the run")
    assert ranks[0] == ranks[1]


@pytest.mark.parametrize("layout", ["DP 2", "TP 2", "PP 2"])
def test_the_bad_row_is_kept(learned, layout: str) -> None:
    folder = learned[0] / layout / "guards"
    assert sorted(path.name for path in folder.iterdir()) == [
        "mismatch-step5.jsonl",
        *(f"nonfinite-step{step}-update1.jsonl" for step in (1, 3, 4)),
    ]
    (record,) = read(folder / "nonfinite-step1-update1.jsonl")
    assert record["row"] == 6 and len(record["prompt_ids"]) == 5
    assert record["why"] == "the loss is not finite; advantages[0] is nan"
    assert set(record["advantages"]) == {"nan"} and math.isnan(float(record["advantages"][0]))
    assert len(record["response_ids"]) == len(record["advantages"]) == len(record["rollout_logprobs"])
    assert record["policy_logprobs"] == pytest.approx(record["rollout_logprobs"], abs=1e-5)
    assert 0 < record["weight"] < 1


@pytest.mark.parametrize("layout", ["DP 2", "TP 2", "PP 2"])
def test_another_engine_stops_the_run_before_the_step(learned, layout: str) -> None:
    out, ranks = learned
    _, message, untouched = ranks[0][layout][2]
    assert untouched
    records = read(out / layout / "guards" / "mismatch-step5.jsonl")
    assert len(records) == NUM_WORST_ROWS  # of 16
    differences = [record["worst"]["difference"] for record in records]
    assert differences == sorted(differences, reverse=True)
    assert differences[0] == pytest.approx(0.511, abs=1e-5) and differences[1] == pytest.approx(0.011, abs=1e-5)
    worst = records[0]["worst"]
    assert (records[0]["row"], worst["position"]) == (9, 1)
    assert worst["engine"] == records[0]["rollout_logprobs"][1] and worst["policy"] == records[0]["policy_logprobs"][1]
    assert worst["token"] == records[0]["response_ids"][1]
    num_tokens = sum(len(record["response_ids"]) for record in records)
    mean = 0.011 + 0.5 / num_tokens
    assert f"differ by {mean:.3g} nats on average over {num_tokens} response tokens, limit 0.01 " in message
    assert "worst in row 9 at response position 1, " in message and "mismatch-step5.jsonl" in message


def test_a_file_that_cannot_be_written_does_not_end_the_run(learned) -> None:
    for rank in learned[1]:
        (line,) = rank["blocked"]
        assert "nonfinite-step0-update1.jsonl could not be written (" in line


def test_later_updates_of_a_batch_are_not_compared(learned) -> None:
    assert learned[1][0]["epochs"] == [Skip.NONE, Skip.NONE]


# -- by hand -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "norm", "mismatch", "limit", "reason"),
    [
        (0.1, 1.0, 0.01, 0.01, Skip.NONE),  # the limit itself is in order
        (0.1, 1.0, 0.0101, 0.01, Skip.MISMATCH),
        (0.1, 1.0, NAN, 0.01, Skip.MISMATCH),
        (0.1, 1.0, NAN, None, Skip.NONE),
        (NAN, 1.0, 0.0, 0.01, Skip.NONFINITE),
        (0.1, INF, 0.0, 0.01, Skip.NONFINITE),
        (-INF, NAN, NAN, 0.01, Skip.NONFINITE),
    ],
)
def test_why_a_step_is_skipped(loss: float, norm: float, mismatch: float, limit: float | None, reason: Skip) -> None:
    assert skip_reason(loss, norm, mismatch, limit) == reason


def test_the_limit_of_the_mismatch() -> None:
    assert mismatch_limit(0.5, "float32", "float32") == 0.5
    assert mismatch_limit(None, "float32", "float32") == 1e-3
    assert mismatch_limit(None, "float32", "bfloat16") == mismatch_limit(None, "bfloat16", "bfloat16") == 0.2


def test_records_say_what_is_not_finite() -> None:
    rows = [
        Row((1, 2), [3, 4], [1.0, 1.0], [-1.0, -2.0], weight=0.5),
        Row((1,), [5, 6], [1.0, NAN], [-1.0, -INF], old_logprobs=[-1.0, -2.0]),
    ]
    (record,) = nonfinite_records(rows, [1], [[-1.0, -2.0]])
    assert record["row"] == 1
    assert record["why"] == "the loss is not finite; advantages[1] is nan; rollout_logprobs[1] is -inf"
    both = nonfinite_records(rows[:1] * 2, [], [[-1.0, -2.0], [-1.0, NAN]])
    assert [record["row"] for record in both] == [0, 1]
    assert both[0]["why"] == "the gradient of the update is not finite, its rows are"
    assert both[1]["why"].endswith("; policy_logprobs[1] is nan")


def test_nan_is_the_worst_mismatch() -> None:
    rows = [Row((1,), [2, 3], [], [-1.0, -1.0]) for _ in range(3)] + [Row((1,), [], [], [])]
    records = mismatch_records(rows, [[-1.0, -3.0], [-1.5, NAN], [-1.25, -1.0], []])
    assert [(record["row"], record["worst"]["position"]) for record in records] == [(1, 1), (0, 1), (2, 0)]
    assert [record["mean_difference"] for record in records[1:]] == [1.0, 0.125]
