"""KL estimators, controllers and the KL in the reward, by hand tables and by exact expectations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from remax_megatron.algorithm.kl import (
    AdaptiveKl,
    FixedKl,
    canonical_kind,
    full_kl,
    kl_controller,
    token_kl,
    with_kl_in_reward,
)

LN2 = math.log(2.0)
X = [LN2, 0.0, -LN2]  # the policy finds the token twice, as, half as likely as the reference

# kind -> value and d value / d logprob at each x. k3 is exp(-x) - 1 + x with slope 1 - exp(-x).
TABLE = {
    "kl": ([LN2, 0.0, -LN2], [1.0, 1.0, 1.0]),
    "abs": ([LN2, 0.0, LN2], [1.0, 0.0, -1.0]),
    "mse": ([LN2**2 / 2, 0.0, LN2**2 / 2], [LN2, 0.0, -LN2]),
    "low_var_kl": ([LN2 - 0.5, 0.0, 1.0 - LN2], [0.5, 0.0, -1.0]),
    "kl+": ([LN2, 0.0, -LN2], [LN2, 0.0, -LN2]),  # the value of the one, the gradient of mse
    "low_var_kl+": ([LN2 - 0.5, 0.0, 1.0 - LN2], [LN2, 0.0, -LN2]),
}
ALIASES = {"k1": "kl", "k2": "mse", "k3": "low_var_kl", "k1+": "kl+", "k3+": "low_var_kl+", "k2+": "mse+"}


def estimate(x: list[float], kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    ref_R = torch.full((len(x),), -1.5)
    logprob_R = (ref_R + torch.tensor(x)).requires_grad_()
    value_R = token_kl(logprob_R, ref_R, kind)
    return value_R.detach(), torch.autograd.grad(value_R.sum(), logprob_R)[0]


@pytest.mark.parametrize("kind", TABLE)
def test_values_and_gradients(kind: str) -> None:
    value_R, grad_R = estimate(X, kind)
    assert value_R.dtype == torch.float32
    assert value_R.tolist() == pytest.approx(TABLE[kind][0], abs=1e-6)
    assert grad_R.tolist() == pytest.approx(TABLE[kind][1], abs=1e-6)


def test_names_and_aliases() -> None:
    for alias, kind in ALIASES.items():
        assert canonical_kind(alias) == canonical_kind(kind) == kind
        for one, other in zip(estimate(X, alias), estimate(X, kind), strict=True):
            assert torch.equal(one, other)
    assert canonical_kind("full") == "full"
    for unknown in ("k4", "", "+", "full+", "k3++"):
        with pytest.raises(AssertionError):
            canonical_kind(unknown)
    with pytest.raises(ValueError, match="call full_kl"):
        estimate(X, "full")


def test_k3_is_held_as_in_verl() -> None:
    # exp(2.5) - 3.5 = 8.68 is below 10, exp(2.7) - 3.7 = 11.2 above; exp(-30) - 1 + 30 = 29 too; exp(100) is infinite.
    value_R, grad_R = estimate([-2.5, -2.7, 30.0, -100.0], "k3")
    assert value_R.tolist() == pytest.approx([math.exp(2.5) - 3.5, 10.0, 10.0, 10.0], rel=1e-5)
    assert grad_R.tolist() == pytest.approx([1 - math.exp(2.5), 0.0, 0.0, 0.0], rel=1e-5)


@settings(max_examples=300, deadline=None)
@given(st.floats(-40.0, 40.0, width=32))
def test_k3_is_never_negative(x: float) -> None:
    value = token_kl(torch.tensor([x]), torch.zeros(1), "k3").item()
    assert 0.0 <= value <= 10.0
    if abs(x) < 2.0:  # and keeps its digits where it is small: x^2 / 2 - x^3 / 6 + ...
        assert value == pytest.approx(math.expm1(-x) + x, rel=1e-3, abs=1e-11)


P = torch.tensor([0.5, 0.25, 0.25])
Q = torch.tensor([0.25, 0.25, 0.5])
KL_PQ = 0.25 * LN2  # 0.5 ln 2 + 0.25 ln 1 - 0.25 ln 2; KL(Q || P) is the same by symmetry


def test_full_kl() -> None:
    # The second position has a padding column; the third is its own reference; q = 0 where p > 0 is infinite.
    inf = math.inf
    log_p_RV = torch.stack([P, torch.tensor([0.5, 0.5, 0.0]), P, P]).log()
    log_q_RV = torch.stack([Q, torch.tensor([0.25, 0.75, 0.0]), P, torch.tensor([0.5, 0.5, 0.0])]).log()
    expected = [KL_PQ, 0.5 * LN2 + 0.5 * math.log(2 / 3), 0.0, inf]
    assert full_kl(log_p_RV, log_q_RV).tolist() == pytest.approx(expected, abs=1e-6)
    assert full_kl(log_p_RV[:, :1], log_q_RV[:, :1])[0].item() == pytest.approx(0.5 * LN2)  # one rank's column
    leaf_RV = log_p_RV[:3].clone().requires_grad_()
    (grad_RV,) = torch.autograd.grad(full_kl(leaf_RV, log_q_RV[:3]).sum(), leaf_RV)
    assert grad_RV.isfinite().all()


def expectations(kind: str) -> tuple[float, torch.Tensor]:
    """(sum_a p_a kl_a, sum_a p_a grad_theta kl_a) for p = softmax(theta), over the three tokens, exactly."""
    theta_V = P.log().double().requires_grad_()
    log_p_V = theta_V.log_softmax(0)
    value_V = token_kl(log_p_V, Q.log(), kind)
    (grad_V,) = torch.autograd.grad((P * value_V).sum(), theta_V)
    return (P * value_V).sum().item(), grad_V.float()


def test_expectations_of_value_and_gradient_are_as_said() -> None:
    for kind in ("k1", "k3", "k1+", "k3+"):
        assert expectations(kind)[0] == pytest.approx(KL_PQ, abs=1e-6)
    assert expectations("abs")[0] == pytest.approx(0.75 * LN2)  # above the KL
    theta_V = P.log().requires_grad_()
    (right_V,) = torch.autograd.grad(full_kl(theta_V.log_softmax(0), Q.log()), theta_V)
    # p_k (x_k - KL): 0.5 x 0.75 ln 2, -0.25 x 0.25 ln 2, -0.25 x 1.25 ln 2
    torch.testing.assert_close(right_V, torch.tensor([0.375, -0.0625, -0.3125]) * LN2)
    for kind in ("k2", "k1+", "k3+", "abs+"):
        torch.testing.assert_close(expectations(kind)[1], right_V)
    torch.testing.assert_close(expectations("k1")[1], torch.zeros(3))  # useless as a loss
    torch.testing.assert_close(expectations("k3")[1], P - Q)  # of KL(Q || P)


def test_adaptive_controller() -> None:
    # Twice the target is clipped to +0.2: 0.1 (1 + 0.2 x 500 / 1000) = 0.11; then kl = 0.95 target: 0.11 (1 - 0.05 / 2)
    # = 0.10725; then far below, clipped to -0.2: x 0.9 = 0.096525; on target nothing.
    controller = kl_controller("adaptive", 0.1, 0.2, 1000)
    found = []
    for kl in (0.4, 0.19, -3.0, 0.2):
        controller.update(kl, 500)
        found.append(controller.coef)
    assert found == pytest.approx([0.11, 0.10725, 0.096525, 0.096525])
    other = AdaptiveKl(0.7, 0.2, 1000)
    other.load_state_dict(controller.state_dict())
    assert other.coef == controller.coef  # bit for bit


def test_fixed_controller() -> None:
    controller = kl_controller("fixed", 0.01, 0.1, 10000)
    controller.update(5.0, 4096)
    assert controller.coef == 0.01 and controller.state_dict() == {"coef": 0.01}
    controller.load_state_dict({"coef": 0.5})
    assert controller.coef == 0.01  # the configuration decides
    assert FixedKl(0.0).coef == 0.0


def test_controllers_refuse() -> None:
    for values in [
        ("linear", 0.1, 0.1, 1000),
        ("fixed", -0.1, 0.1, 1000),
        ("adaptive", math.nan, 0.1, 1000),
        ("adaptive", 0.0, 0.1, 1000),
        ("adaptive", 0.1, 0.0, 1000),
        ("adaptive", 0.1, 0.1, 0),
    ]:
        with pytest.raises(AssertionError):
            kl_controller(*values)
    controller = AdaptiveKl(0.1, 0.1, 800)
    with pytest.raises(AssertionError, match=r"\(4000, 800\)"):
        controller.update(0.1, 4000)
    with pytest.raises(ValueError, match="the mean KL of the batch is nan"):
        controller.update(math.nan, 10)
    assert controller.coef == 0.1


def test_kl_in_the_reward() -> None:
    # Outcome advantage 1, beta 0.5, kl 0.2, -0.4, 0.6. To go: 0.4, 0.2, 0.6; one step: each its own.
    kl = [0.2, -0.4, 0.6]
    assert with_kl_in_reward(1.0, kl, 0.5, "to_go") == pytest.approx([0.8, 0.9, 0.7])
    assert with_kl_in_reward(1.0, kl, 0.5, "one_step") == pytest.approx([0.9, 1.2, 0.7])
    # A tie with the greedy answer still learns the KL; no beta leaves the outcome; no token, no advantage.
    assert with_kl_in_reward(0.0, kl, 0.5, "to_go") == pytest.approx([-0.2, -0.1, -0.3])
    for mode in ("to_go", "one_step"):
        assert with_kl_in_reward(-1.0, kl, 0.0, mode) == [-1.0, -1.0, -1.0]
        assert with_kl_in_reward(1.0, [], 0.5, mode) == []
    with pytest.raises(AssertionError, match="outcome"):
        with_kl_in_reward(1.0, kl, 0.5, "outcome")


def test_to_go_is_the_reward_to_go_minus_the_baseline() -> None:
    """Token rewards -beta kl_t with the outcome 1 on the last token, summed from the right, minus the greedy 0.25."""
    kl, beta, outcome, greedy = [0.5, 1.0, -0.25, 0.125], 0.5, 1.0, 0.25
    rewards = [-beta * k for k in kl]
    rewards[-1] += outcome
    expected = [sum(rewards[t:]) - greedy for t in range(4)]
    assert with_kl_in_reward(outcome - greedy, kl, beta, "to_go") == expected  # powers of two: exact
