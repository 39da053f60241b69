"""What the learner decides: which rows are scored and trained, with which weights, and what a KL does to the reward.

The policy is a recorder here: what a real one computes is in model/test_parity.py and policy/test_exactness.py.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from remax_megatron.config.load import load_config
from remax_megatron.flops import RowGroup
from remax_megatron.types import Completion, Prompt, Rollout, Row
from remax_megatron.update import Learner
from tests.logged import logged_lines

ACTOR = "actor_rollout_ref.actor"


class Recorder:
    """Scores token t with -t / 10 (the reference with -t / 10 - 1) and notes what it was asked."""

    def __init__(self, offset: float = 0.0):
        self.offset, self.scored, self.updates = offset, [], []

    def logprobs(self, rows: list[Row]) -> list[list[float]]:
        self.scored.append(list(rows))
        return [[-token / 10 + self.offset for token in row.response_ids] for row in rows]

    def schedule(self, rows: list[Row]) -> list[list[list[int]]]:
        return [[[i for i in range(len(rows))]]]

    def num_computed_tokens(self, rows: list[Row], batch: list[int]) -> int:
        return sum(rows[i].num_tokens for i in batch)

    def update(self, rows: list[Row], schedule, reference, mismatch_limit) -> SimpleNamespace:
        self.updates.append([(row.response_ids[0], row.weight, row.old_logprobs) for row in rows])
        tokens = sum(row.num_tokens for row in rows)
        return SimpleNamespace(num_tokens=tokens, num_computed_tokens=tokens, skipped="")


def completion(first: int, length: int, reward: float) -> Completion:
    return Completion([first] * length, [-0.5] * length, True, 0, reward=reward)


def rollouts() -> list[Rollout]:
    """Two prompts x two answers; advantages +1 (tokens 10), 0 (token 11) | -1 (token 12), 0 (token 13)."""
    return [
        Rollout(Prompt(0, (1, 2), "s", ""), [completion(10, 2, 1.0), completion(11, 4, 0.0)], completion(9, 1, 0.0)),
        Rollout(Prompt(1, (3,), "s", ""), [completion(12, 1, 0.0), completion(13, 1, 1.0)], completion(9, 1, 1.0)),
    ]


def learn(*overrides: str, batch: list[Rollout] | None = None):
    """(what was learned, policy, reference, log) under the demo's settings with `overrides`."""
    given = ["data.train_batch_size=2", "actor_rollout_ref.rollout.n=2", *overrides]
    config = load_config("demo", given).config
    policy, reference = Recorder(), Recorder(offset=-1.0)
    with logged_lines() as log:
        learned = Learner(config, policy, reference).learn(rollouts() if batch is None else batch, "Epoch 1, Step 1")
    return learned, policy, reference, log


def test_rows_without_advantage_are_left_out_but_counted() -> None:
    learned, policy, reference, _ = learn()
    # 8 response tokens in the batch, so every token weighs 1/8 although only 3 of them are trained.
    assert policy.updates == [[(10, 1 / 8, None), (12, 1 / 8, None)]]
    assert policy.scored == reference.scored == []  # one update: every ratio is 1
    assert learned.packed == [RowGroup(2, [2]), RowGroup(1, [1])]  # what is left out is not computed
    # Rows of 4, 6, 2 and 2 tokens, of which 6 are trained.
    assert learned.metrics == {
        "batch/left_out_token_share": pytest.approx(8 / 14),
        "batch/shared_token_share": 0.0,
        "guard/nonfinite_updates": 0,
        "guard/nonfinite_in_a_row": 0,
        **{f"stall/{kind}": 0 for kind in ("equal_rewards", "cut_answers", "same_samples", "no_update")},
    }
    assert len(learned.rows) == 4


def test_keeping_them_is_a_setting() -> None:
    _, policy, _, _ = learn(f"{ACTOR}.skip_zero_advantage=False")
    assert [token for token, _, _ in policy.updates[0]] == [10, 11, 12, 13]


@pytest.mark.parametrize("term", [f"{ACTOR}.entropy_coeff=0.01", f"{ACTOR}.use_kl_loss=True"])
def test_other_terms_keep_all_rows(term: str) -> None:
    _, policy, _, _ = learn(term)
    assert [token for token, _, _ in policy.updates[0]] == [10, 11, 12, 13]


def test_an_update_of_nothing_is_left_out_and_said() -> None:
    batch = rollouts()
    for rollout in batch:
        for sample in rollout.samples:
            sample.reward = rollout.greedy.reward
    learned, policy, _, log = learn(batch=batch)
    assert policy.updates == [] and learned.updates == []
    assert log == ["Epoch 1, Step 1: 1 update(s) left out: every advantage in them is 0"]
    assert learned.metrics["batch/left_out_token_share"] == 1.0


def test_several_updates_keep_the_logprobs_from_before_the_first() -> None:
    learned, policy, _, _ = learn(f"{ACTOR}.ppo_mini_batch_size=1", f"{ACTOR}.ppo_epochs=2")
    # Weights count each mini-batch: 6 and 2 response tokens. Only the trained rows are scored, once.
    first, second = [(10, 1 / 6, [-1.0, -1.0])], [(12, 1 / 2, [-1.2])]
    assert policy.updates == [first, second, first, second]
    assert learned.packed == [RowGroup(2, [2]), RowGroup(1, [1])] * 2  # once per pass
    assert [[row.response_ids[0] for row in rows] for rows in policy.scored] == [[10, 12]]


@pytest.mark.parametrize(
    ("mode", "weights"),
    [("seq-mean-token-sum", [1 / 4, 1 / 4]), ("seq-mean-token-mean", [1 / 8, 1 / 4])],
)
def test_aggregation_counts_all_rows(mode: str, weights: list[float]) -> None:
    _, policy, _, _ = learn(f"{ACTOR}.loss_agg_mode={mode}")
    assert [weight for _, weight, _ in policy.updates[0]] == weights


def test_the_engines_logprobs_may_stand_for_the_old_ones() -> None:
    _, policy, _, _ = learn("algorithm.rollout_correction.bypass_old_logprobs=True")
    assert [old for _, _, old in policy.updates[0]] == [[-0.5, -0.5], [-0.5]]
    assert policy.scored == []


def test_refilled_prompts_are_weighed_by_where_the_drawing_stopped() -> None:
    """A prompt that ties is drawn before the second informative one: 2 of 3 draws, so (2 - 1) / (3 - 1) x the mean."""
    first, last = rollouts()
    tie = Rollout(Prompt(2, (3,), "s", ""), [completion(14, 1, 1.0), completion(15, 1, 1.0)], completion(9, 1, 1.0))
    given = ("algorithm.refill=True", f"{ACTOR}.loss_agg_mode=seq-mean-token-sum")
    learned, policy, _, _ = learn(*given, batch=[first, tie, last])
    # One update over all six answers, of which two are trained: 1/2 x 1/2 x 1/2 instead of 1/6 each.
    assert policy.updates == [[(10, pytest.approx(1 / 8), None), (12, pytest.approx(1 / 8), None)]]
    assert learned.metrics["refill/drawn_prompts"] == 3
    assert learned.metrics["refill/informative_share"] == pytest.approx(2 / 3)
    assert learned.metrics["refill/weight_factor"] == pytest.approx(3 / 4)
    # Nothing to refill: what it is without.
    learned, policy, _, _ = learn(*given)
    assert policy.updates == [[(10, 1 / 4, None), (12, 1 / 4, None)]] and learned.metrics["refill/weight_factor"] == 1.0
    # The limit ended it with one of three: all count, as without.
    _, policy, _, _ = learn(*given, batch=[first, tie, tie])
    assert policy.updates == [[(10, 1 / 6, None)]]


CORRECTION = "algorithm.rollout_correction"
# The recorder's log-probabilities minus the engine's -0.5: -0.5, -0.6 | -0.7, -0.8, their exponentials 0.61 to 0.45.
REJECTS = (f"{CORRECTION}.rollout_rs=geometric", f"{CORRECTION}.rollout_rs_threshold=0.5_2.0")


def test_rejected_answers_may_leave_the_denominator() -> None:
    learned, policy, _, _ = learn(*REJECTS, f"{CORRECTION}.rollout_rs_denominator=kept")
    # All four are scored, those of advantage 0 too; 6 response tokens are kept, of which 2 are trained.
    assert [row.response_ids[0] for row in policy.scored[0]] == [10, 11, 12, 13] and len(policy.scored) == 1
    assert policy.updates == [[(10, 1 / 6, None)]]
    assert learned.metrics["rejection/answer_share"] == 0.5
    assert learned.metrics["rejection/token_share"] == pytest.approx(2 / 8)
    # Without the rows of advantage 0 the weights are the same.
    _, policy, _, _ = learn(*REJECTS, f"{CORRECTION}.rollout_rs_denominator=kept", f"{ACTOR}.skip_zero_advantage=False")
    assert policy.updates == [[(10, 1 / 6, None), (11, 1 / 6, None)]]


def test_rejected_answers_stay_in_the_denominator_by_default() -> None:
    learned, policy, _, _ = learn(*REJECTS)
    assert policy.updates == [[(10, 1 / 8, None), (12, 1 / 8, None)]]  # the objective rejects, in the update's own pass
    assert policy.scored == [] and not any(name.startswith("rejection/") for name in learned.metrics)


def test_a_batch_of_rejected_answers_is_left_out_and_said() -> None:
    learned, policy, _, log = learn(
        REJECTS[0], f"{CORRECTION}.rollout_rs_threshold=0.9_1.1", f"{CORRECTION}.rollout_rs_denominator=kept"
    )
    assert policy.updates == [] and learned.metrics["rejection/answer_share"] == 1.0
    assert log == ["Epoch 1, Step 1: 1 update(s) left out: every advantage in them is 0, or every answer is rejected"]


@pytest.mark.parametrize(
    ("mode", "advantages"),
    # The reference is 1 nat lower on every token: k1 is 1, the coefficient 0.1.
    [
        ("to_go", [[0.8, 0.9], [-0.4, -0.3, -0.2, -0.1], [-1.1], [-0.1]]),
        ("one_step", [[0.9, 0.9], [-0.1] * 4, [-1.1], [-0.1]]),
    ],
)
def test_kl_in_the_reward(mode: str, advantages: list[list[float]]) -> None:
    control = "algorithm.kl_ctrl"
    learned, policy, reference, _ = learn(
        "algorithm.use_kl_in_reward=True",
        f"algorithm.kl_reward_mode={mode}",
        f"{control}.kl_coef=0.1",
        f"{control}.type=adaptive",
        f"{control}.target_kl=0.5",
        f"{control}.horizon=100",
    )
    for row, expected in zip(learned.rows, advantages, strict=True):
        assert row.advantages == pytest.approx(expected)
    assert len(policy.scored[0]) == len(reference.scored[0]) == 4
    assert learned.metrics["kl/reward_mean"] == pytest.approx(1.0)
    assert learned.metrics["kl/coef"] == 0.1  # that of this batch
    assert [old for _, _, old in policy.updates[0]] == [None] * 4  # still one update


def test_the_coefficient_adapts_after_the_batch() -> None:
    config = load_config(
        "demo",
        [
            "data.train_batch_size=2",
            "actor_rollout_ref.rollout.n=2",
            "algorithm.use_kl_in_reward=True",
            "algorithm.kl_ctrl.type=adaptive",
            "algorithm.kl_ctrl.kl_coef=0.1",
            "algorithm.kl_ctrl.target_kl=0.5",
            "algorithm.kl_ctrl.horizon=100",
        ],
    ).config
    learner = Learner(config, Recorder(), Recorder(offset=-1.0))
    learner.learn(rollouts(), "")
    # KL 1 is twice the target: clip(1, -0.2, 0.2) = 0.2, times 4 answers / 100.
    assert learner.learn(rollouts(), "").metrics["kl/coef"] == pytest.approx(0.1 * 1.008)


def test_a_kl_loss_scores_the_reference_once() -> None:
    learned, policy, reference, _ = learn(f"{ACTOR}.use_kl_loss=True", f"{ACTOR}.ppo_epochs=2")
    assert len(reference.scored) == 1
    assert [row.ref_logprobs for row in learned.rows] == [[-2.0] * 2, [pytest.approx(-2.1)] * 4, [-2.2], [-2.3]]


class CriticRecorder:
    """Says that a state before token t is worth t / 100, and notes the rows that it is taught."""

    num_updates, layout = 0, SimpleNamespace(rank=0)

    def __init__(self, policy: Recorder, skipped: bool = False):
        self.policy, self.skipped, self.updates, self.events = policy, skipped, [], []

    def values(self, rows: list[Row]) -> list[list[float]]:
        self.events.append("values")
        return [[token / 100 for token in row.response_ids] for row in rows]

    def update(self, rows: list[Row]) -> SimpleNamespace:
        assert not self.policy.updates, "the critic's updates come first"
        self.updates.append([(row.response_ids[0], row.weight, row.values, row.returns) for row in rows])
        self.num_updates += 1
        metrics = {"critic/loss": float(self.num_updates)}
        return SimpleNamespace(
            metrics=metrics, grad_norm=2.0, learning_rate=1e-5, skipped=self.skipped, nonfinite_rows=[], loss=1.0
        )

    def gather_weights(self) -> None:
        self.events.append("gathered")

    def release_training_memory(self) -> None:
        self.events.append("released")


def learn_with_critic(*overrides: str, step: int = 1, batch: list[Rollout] | None = None, skipped: bool = False):
    from remax_megatron.critic_update import CriticLearner
    from remax_megatron.phases import PhaseTimer

    given = ["data.train_batch_size=2", "actor_rollout_ref.rollout.n=2", "algorithm.adv_estimator=gae", *overrides]
    config, policy = load_config("demo", given).config, Recorder()
    critic, timer = CriticRecorder(policy, skipped), PhaseTimer()
    learner = Learner(config, policy, Recorder(offset=-1.0), timer, CriticLearner(config, critic, timer))
    learned = learner.learn(rollouts() if batch is None else batch, "Epoch 1, Step 1", step)
    return learned, policy, critic, learner


def test_a_critic_makes_advantages_and_learns_first() -> None:
    learned, policy, critic, learner = learn_with_critic()
    assert critic.events == ["values", "gathered", "released"]
    # Rewards 1, 0, 0, 1 and values 0.10, 0.11, 0.12, 0.13 at every token; gamma = lambda = 1: return - value.
    returns = [[1.0, 1.0], [0.0] * 4, [0.0], [1.0]]
    values = [[0.1, 0.1], [0.11] * 4, [0.12], [0.13]]
    assert [row.returns for row in learned.rows] == [pytest.approx(one) for one in returns]
    raw = [r - v for rr, vv in zip(returns, values, strict=True) for r, v in zip(rr, vv, strict=True)]
    mean = sum(raw) / 8
    std = (sum((one - mean) ** 2 for one in raw) / 7) ** 0.5
    flat = [one for row in learned.rows for one in row.advantages]
    assert flat == pytest.approx([(one - mean) / std for one in raw], rel=1e-6)
    # All four rows, each token 1/8, in both updates.
    assert [(token, weight) for token, weight, *_ in critic.updates[0]] == [(t, 1 / 8) for t in (10, 11, 12, 13)]
    assert [(token, weight) for token, weight, _ in policy.updates[0]] == [(t, 1 / 8) for t in (10, 11, 12, 13)]
    assert learned.metrics["critic/num_updates"] == 1 and learned.metrics["critic/lr"] == 1e-5
    assert learned.metrics["critic/return_mean"] == pytest.approx(3 / 8)
    assert learner.state_dict()["critic"] == {"num_updates": 1, "nonfinite_in_a_row": 0}


def test_the_critic_has_its_own_mini_batches_epochs_and_weights() -> None:
    given = ("critic.ppo_mini_batch_size=1", "critic.ppo_epochs=2", "critic.loss_agg_mode=seq-mean-token-sum")
    learned, policy, critic, _ = learn_with_critic(*given)
    tokens = [[(token, weight) for token, weight, *_ in update] for update in critic.updates]
    assert tokens == [[(10, 1 / 2), (11, 1 / 2)], [(12, 1 / 2), (13, 1 / 2)]] * 2
    assert len(policy.updates) == 1 and learned.metrics["critic/loss"] == pytest.approx((1 + 2 + 3 + 4) / 4)


def test_it_learns_alone_while_it_warms_up() -> None:
    learned, policy, critic, _ = learn_with_critic("trainer.critic_warmup=2", step=2)
    assert policy.updates == [] and len(critic.updates) == 1 and learned.updates == []
    assert learned.metrics["stall/no_update"] == 0
    _, policy, _, _ = learn_with_critic("trainer.critic_warmup=2", step=3)
    assert len(policy.updates) == 1


def test_a_masked_answer_teaches_neither() -> None:
    batch = rollouts()
    batch[0].samples[1].masked = True
    learned, _, critic, _ = learn_with_critic(batch=batch)
    assert [token for token, *_ in critic.updates[0]] == [10, 12, 13]
    assert learned.rows[1].advantages == [0.0] * 4
    raw = [0.9, 0.9, -0.12, 0.87]  # whitened without it
    mean = sum(raw) / 4
    std = (sum((one - mean) ** 2 for one in raw) / 3) ** 0.5
    others = [one for i in (0, 2, 3) for one in learned.rows[i].advantages]
    assert others == pytest.approx([(one - mean) / std for one in raw], rel=1e-6)


def test_a_kl_in_the_reward_is_the_tokens_own() -> None:
    """The reference is a nat below at every token: each token's reward is -0.1, and its return what is left of them."""
    given = ("algorithm.use_kl_in_reward=True", "algorithm.kl_penalty=kl", "algorithm.kl_ctrl.kl_coef=0.1")
    learned, _, _, _ = learn_with_critic(*given)
    expected = [[0.8, 0.9], [-0.4, -0.3, -0.2, -0.1], [-0.1], [0.9]]
    assert [row.returns for row in learned.rows] == [pytest.approx(one) for one in expected]


def test_too_many_updates_of_the_critic_that_are_not_finite_end_the_run(tmp_path, monkeypatch) -> None:
    from remax_megatron import critic_update
    from remax_megatron.guards import NonFiniteError

    kept = []
    monkeypatch.setattr(
        critic_update, "save_rows", lambda path, records, rank: kept.append((path.name, records)) or "x"
    )
    batch = rollouts()
    batch[0].samples[0].reward = float("nan")
    given = (f"trainer.default_local_dir={tmp_path}", "trainer.max_nonfinite_updates=1")
    with pytest.raises(NonFiniteError, match="update 1 of the critic was skipped.*a lower critic.optim.lr"):
        learn_with_critic(*given, batch=batch, skipped=True)
    ((name, records),) = kept
    assert name == "nonfinite-step1-critic1.jsonl" and records[0]["why"] == "returns[0] is nan" and len(records) == 4
