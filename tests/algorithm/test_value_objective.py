"""The value loss by a hand table."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from remax_megatron.algorithm.value_objective import ValueObjective

# The value before, the value, the return -> 1/2 max of the squared errors, clipped?, its gradient; it may move by 0.5.
TABLE = [
    (0.0, 0.2, 1.0, 0.32, False, -0.8),
    (0.0, 0.8, 1.0, 0.125, True, 0.0),  # held at 0.5
    (0.0, 0.8, 0.0, 0.32, False, 0.8),  # moved away from the return: never held
    (0.0, -0.9, 1.0, 1.805, False, -1.9),
    (2.0, 1.0, 0.0, 1.125, True, 0.0),  # held at 1.5
]


def batch(weights: list[float]) -> SimpleNamespace:
    old, _, returns, *_ = zip(*TABLE, strict=True)
    return SimpleNamespace(value_R=torch.tensor(old), return_R=torch.tensor(returns), weight_R=torch.tensor(weights))


@pytest.mark.parametrize("number", range(len(TABLE)))
def test_one_token(number: int) -> None:
    _, value, _, loss, clipped, gradient = TABLE[number]
    weights = [float(i == number) for i in range(len(TABLE))]
    value_R = torch.tensor([row[1] for row in TABLE], requires_grad=True)
    terms = ValueObjective(0.5)(batch(weights), value_R)
    assert terms.total.item() == pytest.approx(loss, abs=1e-6)
    (grad_R,) = torch.autograd.grad(terms.total, value_R)
    assert grad_R.tolist() == pytest.approx([gradient * weight for weight in weights], abs=1e-6)


def test_sums_and_metrics() -> None:
    value_R = torch.tensor([row[1] for row in TABLE])
    objective = ValueObjective(0.5)
    terms = objective(batch([0.2] * 5), value_R)
    assert objective.names == (tuple(terms.sums), tuple(terms.maxima))
    metrics = objective.metrics({name: value.item() for name, value in terms.sums.items()}, {}, 5)
    assert metrics == {
        "critic/loss": pytest.approx(0.2 * (0.32 + 0.125 + 0.32 + 1.805 + 1.125)),
        "critic/value_mean": pytest.approx((0.2 + 0.8 + 0.8 - 0.9 + 1.0) / 5),
        "critic/squared_error": pytest.approx((0.64 + 0.04 + 0.64 + 3.61 + 1.0) / 5),
        "critic/clip_share": 2 / 5,
    }


def test_what_is_not_finite_is_found() -> None:
    value_R = torch.tensor([0.0, float("nan"), 0.0, 0.0, 0.0])
    assert ValueObjective()(batch([1.0] * 5), value_R).finite_R.tolist() == [True, False, True, True, True]


def test_a_micro_batch_without_tokens() -> None:
    nothing = SimpleNamespace(value_R=None, return_R=None, weight_R=torch.zeros(0))
    terms = ValueObjective()(nothing, torch.zeros(0, requires_grad=True))
    assert terms.total.item() == 0.0 and terms.total.requires_grad
