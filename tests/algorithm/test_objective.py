"""The objective of an update by hand: loss, sums, maxima and the metrics that are made of them."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from remax_megatron.algorithm.bounds import Bounds
from remax_megatron.algorithm.losses import Clip
from remax_megatron.algorithm.objective import MISMATCH, Objective


def batch(**fields) -> SimpleNamespace:
    """Two rows of one and two tokens; ratios 1, 2 and 1/2, advantages 1, 1 and -1, weights 1/3."""
    given = {
        "advantage_R": torch.tensor([1.0, 1.0, -1.0]),
        "weight_R": torch.full((3,), 1 / 3),
        "rollout_logprob_R": torch.tensor([-1.0, -1.5, -2.0]),
        "old_logprob_R": LOGPROB_R - torch.tensor([0.0, math.log(2.0), -math.log(2.0)]),
        "ref_logprob_R": LOGPROB_R - 0.5,
        "response_lengths": [1, 2],
    }
    return SimpleNamespace(**given | fields)


LOGPROB_R = torch.tensor([-1.0, -1.0, -2.5])
ENTROPY_R = torch.tensor([0.3, 0.6, 0.9])


def metrics(objective: Objective, terms, num_tokens: int = 3) -> dict[str, float]:
    sums, maxima = ({name: float(value) for name, value in part.items()} for part in (terms.sums, terms.maxima))
    return objective.metrics(sums, maxima, num_tokens)


def test_clipped_loss_with_entropy_and_kl() -> None:
    """Token losses -1, -1.2 (clipped) and 0.8 (clipped), - 0.1 x entropy, + 0.2 x k1 of 0.5; then divided by 3."""
    objective = Objective(clip=Clip(0.2, 0.2, 3.0), entropy_coeff=0.1, kl_kind="k1", kl_coef=0.2)
    terms = objective(batch(), LOGPROB_R.clone().requires_grad_(), ENTROPY_R)
    assert terms.total.requires_grad and terms.finite_R.tolist() == [True] * 3
    found = metrics(objective, terms)
    assert found["actor/loss"] == pytest.approx((-1.4 - 0.1 * 1.8 + 0.2 * 1.5) / 3, abs=1e-6)
    assert found["actor/entropy"] == pytest.approx(0.6, abs=1e-6)
    assert found["actor/clip_share"] == pytest.approx(2 / 3)
    assert found["actor/approx_kl"] == pytest.approx(0.0, abs=1e-6)  # log 2 - log 2
    assert found["actor/kl"] == pytest.approx(0.5, abs=1e-6)
    assert found[MISMATCH] == pytest.approx(1 / 3, abs=1e-6)  # |0|, |0.5|, |-0.5|
    assert found["rollout/logprob_diff_signed_mean"] == pytest.approx(0.0, abs=1e-6)
    assert found["rollout/logprob_diff_max"] == pytest.approx(0.5)
    assert not any(name.startswith("importance/") for name in found)


def test_reinforce_has_no_ratio() -> None:
    objective = Objective(policy_loss="reinforce")
    found = metrics(objective, objective(batch(), LOGPROB_R, ENTROPY_R))
    assert found["actor/loss"] == pytest.approx((1.0 + 1.0 - 2.5) / 3, abs=1e-6)
    assert found["actor/clip_share"] == found["actor/kl"] == 0.0


def test_importance_weights_are_those_before_the_update() -> None:
    """exp(old - rollout): 1, exp(0.5 - log 2) and exp(-0.5 + log 2), the last cut at 1.1."""
    objective = Objective(importance_level="token", importance_bounds=Bounds(1.1))
    found = metrics(objective, objective(batch(), LOGPROB_R, ENTROPY_R))
    weights = [1.0, math.exp(0.5) / 2, 2 * math.exp(-0.5)]
    cut = [min(weight, 1.1) for weight in weights]
    assert found["actor/loss"] == pytest.approx((-cut[0] - 1.2 * cut[1] + 0.8 * cut[2]) / 3, abs=1e-6)
    assert found["importance/mean"] == pytest.approx(sum(weights) / 3)
    assert found["importance/max"] == pytest.approx(weights[2])
    assert found["importance/truncated_share"] == pytest.approx(1 / 3)


def test_masked_tokens_stay_in_the_denominator() -> None:
    """Weights 1, 0.82 and 1.21 (masked above 1.1): the sum of what is left is still weighed by 1/3."""
    objective = Objective(importance_level="token", importance_bounds=Bounds(1.1, 0.5), entropy_coeff=0.1)
    found = metrics(objective, objective(batch(), LOGPROB_R, ENTROPY_R))
    expected = -1.0 - 1.2 * math.exp(0.5) / 2 + 0.0 - 0.1 * 1.8  # the masked token keeps its entropy
    assert found["actor/loss"] == pytest.approx(expected / 3, abs=1e-6)
    assert found["importance/masked_above_share"] == pytest.approx(1 / 3)
    assert found["importance/masked_below_share"] == 0.0


def test_a_rejected_answer_has_no_loss_and_stays_in_the_denominator() -> None:
    """Old minus engine is 0 | 0.5 - log 2, log 2 - 0.5: geometric means 1 and 1; with -1.0 for -1.5, 1 and 0.78."""
    engine_R = torch.tensor([-1.0, -1.0, -2.0])
    objective = Objective(rejection_bounds=Bounds(1.25, 0.8), entropy_coeff=0.1)
    logprob_R = LOGPROB_R.clone().requires_grad_()
    terms = objective(batch(rollout_logprob_R=engine_R), logprob_R, ENTROPY_R)
    found = metrics(objective, terms)
    assert found["actor/loss"] == pytest.approx((-1.0 - 0.1 * 0.3) / 3, abs=1e-6)
    assert found["rejection/answer_share"] == 0.5 and found["rejection/token_share"] == pytest.approx(2 / 3)
    assert found["rejection/ratio_mean"] == pytest.approx((1 + math.exp(-0.25)) / 2)
    terms.total.backward()
    assert logprob_R.grad is not None and logprob_R.grad.tolist() == pytest.approx([-1 / 3, 0.0, 0.0])


def test_rejection_is_that_of_each_part() -> None:
    """The loss of two micro-batches of a row each is that of one with both."""
    objective = Objective(rejection_bounds=Bounds(1.25, 0.8), importance_level="token")
    whole = batch(rollout_logprob_R=torch.tensor([-1.0, -1.0, -2.0]))
    fields = ("advantage_R", "weight_R", "rollout_logprob_R", "old_logprob_R", "ref_logprob_R")
    total = torch.zeros(())
    for part, length in ((slice(0, 1), 1), (slice(1, 3), 2)):
        cut = batch(response_lengths=[length], **{name: getattr(whole, name)[part] for name in fields})
        total = total + objective(cut, LOGPROB_R[part], ENTROPY_R[part]).total
    torch.testing.assert_close(total, objective(whole, LOGPROB_R, ENTROPY_R).total)


def test_the_full_kl_is_the_callers() -> None:
    objective = Objective(kl_kind="full", kl_coef=1.0)
    terms = objective(batch(ref_logprob_R=None), LOGPROB_R, ENTROPY_R, torch.tensor([0.1, 0.2, 0.3]))
    assert metrics(objective, terms)["actor/kl"] == pytest.approx(0.2)


def test_a_loss_that_is_not_finite_is_found() -> None:
    terms = Objective()(batch(advantage_R=torch.tensor([1.0, math.nan, -1.0])), LOGPROB_R, ENTROPY_R)
    assert terms.finite_R.tolist() == [True, False, True]


@pytest.mark.parametrize("level", [None, "token", "sequence"])
def test_ranks_without_tokens_know_the_names(level: str | None) -> None:
    rejection = None if level is None else Bounds(1.25, 0.8)
    objective = Objective(importance_level=level, kl_kind="full", rejection_bounds=rejection)
    terms = objective(batch(), LOGPROB_R, ENTROPY_R, torch.zeros(3))
    assert objective.names == (tuple(terms.sums), tuple(terms.maxima))
