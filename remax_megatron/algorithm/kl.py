"""KL between policy and reference: estimates per token, controllers of its coefficient, its place in the reward.

With x = log pi(a) - log pi_ref(a) of the sampled token a (J. Schulman 2020, http://joschu.net/blog/kl-approx.html;
the names are those of verl's `kl_penalty`, core_algos.py; all legal ones are in algorithm/names.py):

    name         alias   value                 expectation         expected gradient as a loss
    kl           k1      x                     KL(pi || pi_ref)    0: of use in the reward only
    abs                  |x|                   |KL| or more        that of no divergence
    mse          k2      x^2 / 2               close to KL         that of KL(pi || pi_ref)
    low_var_kl   k3      exp(-x) - 1 + x >= 0  KL(pi || pi_ref)    that of KL(pi_ref || pi)
    full                 sum_a pi(a) x(a)      it is the KL        that of KL(pi || pi_ref)

(Expected gradients are those at samples of the current policy.) A "+" behind a name keeps its value and takes k2's
gradient, so that "k3+" as a loss is a low-variance number with the right gradient. As in verl, k3 holds x to +-20 and
its value to at most 10: beyond that (a token that the reference finds 2.6 nats more likely, or 11 nats less likely)
its gradient is 0.

A KL in the reward is subtracted token by token, and never from the greedy baseline. This file knows nothing of
batches: which tokens, which mean is given to a controller, and when, is the trainer's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from remax_megatron.algorithm.names import KL_ALIASES, KL_CONTROLLERS, KL_KINDS, KL_REWARD_MODES


def canonical_kind(kind: str) -> str:
    """verl's long name of one of KL_KINDS, the "+" kept."""
    assert kind in KL_KINDS, kind
    name = kind.removesuffix("+")
    return KL_ALIASES.get(name, name) + kind[len(name) :]


def token_kl(logprob_R: Tensor, ref_logprob_R: Tensor, kind: str) -> Tensor:
    """[R] float32 estimates in nats, of any kind but "full" (see `full_kl`); differentiable in logprob_R."""
    kind = canonical_kind(kind)
    x_R = logprob_R.float() - ref_logprob_R.float()
    if kind.endswith("+"):
        value_R, k2_R = _token_kl(x_R, kind[:-1]), _token_kl(x_R, "mse")
        return value_R.detach() + (k2_R - k2_R.detach())
    return _token_kl(x_R, kind)


def _token_kl(x_R: Tensor, kind: str) -> Tensor:
    if kind == "kl":
        return x_R
    if kind == "abs":
        return x_R.abs()
    if kind == "mse":
        return 0.5 * x_R.square()
    if kind == "low_var_kl":
        minus_x_R = (-x_R).clamp(-20.0, 20.0)
        # expm1 because exp(-x) - 1 loses all digits of a small x in float32, and can come out below 0.
        return (torch.expm1(minus_x_R) - minus_x_R).clamp(0.0, 10.0)
    raise ValueError("the full KL needs the log-probabilities of the whole vocabulary: call full_kl")


def full_kl(log_p_RV: Tensor, log_q_RV: Tensor) -> Tensor:
    """KL(p || q) per position, [R] float32 in nats, from normalised log-probabilities; differentiable in both.

    Columns with p = 0 (log_p of -inf, as padding of the vocabulary has) contribute 0. Over one rank's columns of a
    vocabulary cut between ranks it is that rank's part of the sum.
    """
    none_RV = log_p_RV == -torch.inf
    # Filled before they meet: 0 * (-inf - -inf) would be NaN, in the value and in the gradient.
    log_p_RV = log_p_RV.float().masked_fill(none_RV, 0.0)
    log_q_RV = log_q_RV.float().masked_fill(none_RV, 0.0)
    return (log_p_RV.exp() * (log_p_RV - log_q_RV)).masked_fill(none_RV, 0.0).sum(dim=-1)


class FixedKl:
    """A coefficient that stays as configured, also when a checkpoint was written with another one."""

    def __init__(self, coef: float) -> None:
        assert 0.0 <= coef < math.inf, coef
        self.coef = coef

    def update(self, kl: float, num_samples: int) -> None:
        """Nothing."""

    def state_dict(self) -> dict[str, float]:
        """Return what a checkpoint keeps."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Nothing: the configuration decides."""


class AdaptiveKl:
    """A coefficient that follows a target (arXiv 1909.08593; verl's `AdaptiveKLController`):

        coef <- coef (1 + clip(kl / target - 1, -0.2, 0.2) num_samples / horizon)

    It belongs in the checkpoint: a run that resumes with the configured coefficient is another run. `target` in nats
    per token, `horizon` in samples.
    """

    def __init__(self, coef: float, target: float, horizon: float) -> None:
        assert 0.0 < coef < math.inf, coef  # 0 would stay 0
        assert 0.0 < target < math.inf, target
        assert 0.0 < horizon < math.inf, horizon
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl: float, num_samples: int) -> None:
        """After a batch, whose reward has used the coefficient as it was: `kl` is its mean KL (verl's: the mean over
        answers of the mean over an answer's tokens), `num_samples` its number of answers (prompts x n).

        The horizon must be above 0.2 num_samples: in a shorter one a batch could take the coefficient to 0 or below.
        ValueError when kl is not finite.
        """
        assert 0.2 * num_samples < self.horizon, (num_samples, self.horizon)
        if not math.isfinite(kl):
            raise ValueError(f"the mean KL of the batch is {kl}, so its coefficient cannot be adapted")
        self.coef *= 1.0 + min(max(kl / self.target - 1.0, -0.2), 0.2) * num_samples / self.horizon

    def state_dict(self) -> dict[str, float]:
        """Return what a checkpoint keeps."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Target and horizon are the configuration's, the coefficient is the checkpoint's."""
        self.coef = state["coef"]


def kl_controller(kind: str, coef: float, target: float, horizon: float) -> FixedKl | AdaptiveKl:
    """The controller of one of KL_CONTROLLERS; `target` and `horizon` are those of an adaptive one."""
    assert kind in KL_CONTROLLERS, kind
    return FixedKl(coef) if kind == "fixed" else AdaptiveKl(coef, target, horizon)


def with_kl_in_reward(advantage: float, kl: Sequence[float], beta: float, mode: str) -> list[float]:
    """The advantage of every response token of a row, from that of its outcome and the KL estimate of every token.

    "to_go": A_t = advantage - beta sum_{s >= t} kl_s, the undiscounted reward to go of the per-token rewards
    -beta kl_t with the outcome on the last token, minus the baseline. As in verl (`apply_kl_penalty` of
    ray_trainer.py, then `compute_remax_outcome_advantage` of core_algos.py). With kl
    estimated by k1 it gives the policy gradient of E[reward] - beta KL.

    "one_step": A_t = advantage - beta kl_t, each token answers for its own KL only. As in the author's repository
    (`compute_returns` of liziniu/ReMax, step3_rlhf_finetuning/remax_trainer.py), without its discount (the same at
    gamma = 1) and without its clip of the outcome to +-5 (the same for rewards within that).

    No response token gives no advantage.
    """
    assert mode in KL_REWARD_MODES, mode
    if mode == "one_step":
        return [advantage - beta * one for one in kl]
    to_go, found = 0.0, []
    for one in reversed(kl):
        to_go += one
        found.append(advantage - beta * to_go)
    return found[::-1]
