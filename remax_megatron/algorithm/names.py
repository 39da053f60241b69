"""Legal names of what a run chooses, where the module that gives them a meaning imports torch.

Plain Python, so that settings are checked before torch is loaded. The estimators' and the aggregation's names lie with
their modules, which need no torch.
"""

from __future__ import annotations

POLICY_LOSSES = ("ppo_clip", "reinforce")  # objective.py

# kl.py: the estimators of the KL; a "+" behind a name keeps its value and takes k2's gradient.
KL_ALIASES = {"k1": "kl", "k2": "mse", "k3": "low_var_kl"}
_SAMPLED_KL = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")
KL_KINDS = (*_SAMPLED_KL, "full", *(f"{name}+" for name in _SAMPLED_KL))
KL_CONTROLLERS = ("fixed", "adaptive")
KL_REWARD_MODES = ("to_go", "one_step")

IMPORTANCE_LEVELS = ("token", "sequence")  # importance.py
REJECTIONS = ("geometric", "seq_mean_k1")  # bounds.py, rejection.py
REJECTION_DENOMINATORS = ("all", "kept")
