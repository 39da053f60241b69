"""Policy losses by a hand table."""

from __future__ import annotations

import pytest
import torch

from remax_megatron.algorithm.losses import Clip, clipped_policy_loss, reinforce_loss

# ratio w, advantage A -> loss, clipped?, dual-clipped?, and d loss / d logprob (clip 0.2, dual clip 3).
# Where nothing is clipped loss = -A w and its gradient is the same number; where it is, the gradient is 0.
TABLE = [
    (0.5, +1.0, -0.5, False, False, -0.5),
    (1.0, +1.0, -1.0, False, False, -1.0),
    (1.5, +1.0, -1.2, True, False, 0.0),
    (4.0, +1.0, -1.2, True, False, 0.0),
    (0.5, -1.0, 0.8, True, False, 0.0),
    (1.0, -1.0, 1.0, False, False, 1.0),
    (1.5, -1.0, 1.5, False, False, 1.5),
    (4.0, -1.0, 3.0, False, True, 0.0),
    (0.5, 0.0, 0.0, False, False, 0.0),
    (1.0, 0.0, 0.0, False, False, 0.0),
    (1.5, 0.0, 0.0, False, False, 0.0),
    (4.0, 0.0, 0.0, False, False, 0.0),
]


def tensors(*columns: list[float]) -> list[torch.Tensor]:
    return [torch.tensor(column) for column in columns]


def logprob_at(ratios: torch.Tensor, old_R: torch.Tensor) -> torch.Tensor:
    return (old_R + ratios.log()).requires_grad_()


@pytest.mark.parametrize(("ratio", "advantage", "loss", "clipped", "dual", "gradient"), TABLE)
def test_one_token(ratio, advantage, loss, clipped, dual, gradient) -> None:
    ratio_R, advantage_R, old_R = tensors([ratio], [advantage], [-0.7])
    logprob_R = logprob_at(ratio_R, old_R)
    result = clipped_policy_loss(logprob_R, old_R, advantage_R, Clip())
    assert result.loss_R.sum().item() == pytest.approx(loss, abs=1e-6)
    assert (result.clipped_R.sum().item(), result.dual_clipped_R.sum().item()) == (clipped, dual)
    assert result.old_minus_new_R.sum().item() == pytest.approx(-torch.tensor(ratio).log().item(), abs=1e-6)
    (grad_R,) = torch.autograd.grad(result.loss_R.sum(), logprob_R)
    assert grad_R.item() == pytest.approx(gradient, abs=1e-6)
    assert not result.old_minus_new_R.requires_grad


def test_tokens_are_summed() -> None:
    ratio_R, advantage_R = tensors([row[0] for row in TABLE], [row[1] for row in TABLE])
    old_R = torch.linspace(-3.0, -0.1, len(TABLE))
    logprob_R = logprob_at(ratio_R, old_R)
    result = clipped_policy_loss(logprob_R, old_R, advantage_R, Clip())
    assert result.loss_R.sum().item() == pytest.approx(2.4, abs=1e-5)  # -3.9 + 6.3 + 0
    assert (result.clipped_R.sum().item(), result.dual_clipped_R.sum().item()) == (3, 1)
    # 0.5 x 1 x 1.5 x 4 = 3 for each of the three advantages
    assert result.old_minus_new_R.sum().item() == pytest.approx(-3 * torch.tensor(3.0).log().item(), abs=1e-5)
    (grad_R,) = torch.autograd.grad(result.loss_R.sum(), logprob_R)
    torch.testing.assert_close(grad_R, torch.tensor([row[5] for row in TABLE]), rtol=1e-5, atol=1e-6)


def test_clip_settings_are_used() -> None:
    # Clip-higher 0.28: w = 1.5 -> 1.28. Low 0.1: w = 0.5 -> 0.9 at A = -1. Dual clip 2: w = 4, A = -2 -> 4.
    ratio_R, advantage_R, old_R = tensors([1.5, 0.5, 4.0], [1.0, -1.0, -2.0], [0.0, 0.0, 0.0])
    result = clipped_policy_loss(ratio_R.log(), old_R, advantage_R, Clip(low=0.1, high=0.28, dual=2.0))
    assert result.loss_R.sum().item() == pytest.approx(-1.28 + 0.9 + 4.0, abs=1e-5)


def test_gradient_at_ratio_one_is_reinforce() -> None:
    generator = torch.Generator().manual_seed(0)
    logprob_R = (-torch.rand(50, generator=generator)).requires_grad_()
    advantage_R = torch.randn(50, generator=generator)
    (reinforce,) = torch.autograd.grad(-(advantage_R * logprob_R).sum(), logprob_R)
    losses = []
    for old_R in (None, logprob_R.detach().clone()):
        result = clipped_policy_loss(logprob_R, old_R, advantage_R, Clip())
        (grad_R,) = torch.autograd.grad(result.loss_R.sum(), logprob_R)
        assert torch.equal(grad_R, reinforce)  # bitwise
        assert (result.clipped_R.sum().item(), result.dual_clipped_R.sum().item()) == (0, 0)
        assert result.old_minus_new_R.sum().item() == 0.0
        losses.append(result.loss_R.sum().detach())
    # No old logprobs is the same as old == new: -sum(A).
    assert torch.equal(losses[0], losses[1])
    torch.testing.assert_close(losses[0], -advantage_R.sum())


def test_an_extreme_ratio_stays_finite() -> None:
    # exp(200) is infinite in float32: the log-ratio is held to +-20, with a gradient of 0 beyond.
    advantage_R, old_R = tensors([-1.0, 1.0, -1.0, 0.0], [-200.0, 0.0, 0.0, -200.0])
    logprob_R = torch.tensor([0.0, -200.0, -200.0, 0.0]).requires_grad_()
    result = clipped_policy_loss(logprob_R, old_R, advantage_R, Clip())
    assert result.loss_R.sum().item() == pytest.approx(3.0 - 0.0 + 0.8 + 0.0, abs=1e-6)
    (grad_R,) = torch.autograd.grad(result.loss_R.sum(), logprob_R)
    assert grad_R.tolist() == [0.0, 0.0, 0.0, 0.0]


def test_no_token() -> None:
    empty_R = torch.zeros(0, requires_grad=True)
    result = clipped_policy_loss(empty_R, torch.zeros(0), torch.zeros(0), Clip())
    assert result.loss_R.sum().item() == 0.0 and result.clipped_R.sum().item() == 0
    (grad_R,) = torch.autograd.grad(result.loss_R.sum(), empty_R)
    assert grad_R.shape == (0,)


def test_cutting_the_update_into_micro_batches_does_not_change_loss_or_gradient() -> None:
    generator = torch.Generator().manual_seed(1)
    logprob_R, advantage_R = -torch.rand(8, generator=generator), torch.randn(8, generator=generator)
    old_R = logprob_R + 0.4 * torch.randn(8, generator=generator)
    found = []
    for parts in ([slice(0, 8)], [slice(0, 1), slice(1, 6), slice(6, 6), slice(6, 8)]):
        leaf_R = logprob_R.clone().requires_grad_()
        losses = [clipped_policy_loss(leaf_R[p], old_R[p], advantage_R[p], Clip()).loss_R.sum() / 8 for p in parts]
        for loss in losses:
            loss.backward()
        found.append((sum(loss.item() for loss in losses), leaf_R.grad))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    assert torch.equal(found[0][1], found[1][1])


def test_losses_per_token_are_those_of_the_table() -> None:
    ratio_R, advantage_R = tensors([row[0] for row in TABLE], [row[1] for row in TABLE])
    old_R = torch.linspace(-3.0, -0.1, len(TABLE))
    logprob_R = logprob_at(ratio_R, old_R)
    tokens = clipped_policy_loss(logprob_R, old_R, advantage_R, Clip())
    assert tokens.loss_R.tolist() == pytest.approx([row[2] for row in TABLE], abs=1e-5)
    assert tokens.clipped_R.tolist() == [row[3] for row in TABLE]
    assert tokens.dual_clipped_R.tolist() == [row[4] for row in TABLE]
    assert not tokens.old_minus_new_R.requires_grad
    # Weighted tokens have weighted gradients: 0.1, 0.2, ... of the last column.
    weight_R = 0.1 * torch.arange(1, len(TABLE) + 1)
    (grad_R,) = torch.autograd.grad((weight_R * tokens.loss_R).sum(), logprob_R)
    torch.testing.assert_close(grad_R, weight_R * torch.tensor([row[5] for row in TABLE]), rtol=1e-5, atol=1e-6)


def test_plain_reinforce() -> None:
    # -A log pi: 0.5 x 2 = 1, -1 x 3 = -3, 0; the gradient is -A, that of the clipped loss at ratio 1.
    logprob_R, advantage_R = tensors([-2.0, -3.0, -1.0], [0.5, -1.0, 0.0])
    logprob_R.requires_grad_()
    loss_R = reinforce_loss(logprob_R, advantage_R)
    assert loss_R.tolist() == [1.0, -3.0, 0.0]
    (grad_R,) = torch.autograd.grad(loss_R.sum(), logprob_R)
    assert grad_R.tolist() == [-0.5, 1.0, 0.0]
    clipped = clipped_policy_loss(logprob_R, None, advantage_R, Clip())
    assert torch.equal(torch.autograd.grad(clipped.loss_R.sum(), logprob_R)[0], grad_R)
