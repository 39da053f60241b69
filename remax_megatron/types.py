"""The values that travel between the parts of a step. No torch, no Megatron, no vLLM.

Shape legend, used as suffixes where tensors meet:

    T  tokens of one packed micro-batch (all its rows, one after the other)
    R  scored positions of one micro-batch: the positions whose *next* token is a response token
    S  rows (sampled answers) of an update
    H  hidden size      V  vocabulary (of one tensor-parallel rank where a layout says so)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

CUT_ANSWERS = ("score", "zero", "mask")  # what an answer that the length limit cut is worth (rewards/length.py)


@dataclass(frozen=True)
class Prompt:
    """One row of a data set, tokenised with the chat template and the generation prompt.

    `index` is the row's number in the data set: stable over epochs and shuffles, so seeds can derive from it.
    `ground_truth` and `extra_info` are the values in the file, the former as the scorer of the source takes it; `turns`
    are the prompt's {role, content} before the template.
    Example: Prompt(index=3, token_ids=(5, 9, 2), data_source="openai/gsm8k", ground_truth="18")
    """

    index: int
    token_ids: tuple[int, ...]
    data_source: str
    ground_truth: Any
    extra_info: dict[str, Any] = field(default_factory=dict)
    turns: list[dict[str, str]] = field(default_factory=list)


@dataclass
class Completion:
    """One answer of the engine.

    `logprobs[i]` is log pi(token_ids[i] | prompt, token_ids[:i]) in nats under the sampling temperature, of the
    weights numbered `weight_version`. `finished` is False when the length limit cut the answer. `token_ids` holds
    the end-of-sequence token when the model wrote it; `text` is decoded without special tokens.
    """

    token_ids: list[int]
    logprobs: list[float]
    finished: bool
    weight_version: int
    text: str = ""
    reward: float = 0.0
    reward_outcome: str = "ok"  # or why there is no score: error, timeout, crash (then the reward is 0)
    reward_message: str = ""
    scores: dict[str, float] = field(default_factory=dict)  # the scorer's other numbers
    notes: dict[str, str] = field(default_factory=dict)  # and its texts
    masked: bool = False  # left out of the update, by an advantage of 0


@dataclass
class Rollout:
    """A prompt, its n sampled answers, and the greedy answer whose reward is ReMax's baseline (None where the
    estimator needs none)."""

    prompt: Prompt
    samples: list[Completion]
    greedy: Completion | None

    @property
    def completions(self) -> list[Completion]:
        """The greedy answer, where there is one, and the samples."""
        return [*([] if self.greedy is None else [self.greedy]), *self.samples]


@dataclass
class Row:
    """One sampled answer as the update sees it: tokens, and the advantage of each response token (per token,
    because a KL in the reward makes it differ along the answer).

    `weight` is that of each token in the loss, counted over the whole update (algorithm.aggregation); None until then.
    `old_logprobs` is None when every ratio is exactly 1 (one update per rollout batch), `ref_logprobs` when nothing
    asks for a KL, `values` and `returns` (the critic's, and what it is taught, of each response token) without a
    critic. `masked` answers are left out of the update by an advantage of 0.
    """

    prompt_ids: tuple[int, ...]
    response_ids: list[int]
    advantages: list[float]
    rollout_logprobs: list[float]
    old_logprobs: list[float] | None = None
    ref_logprobs: list[float] | None = None
    weight: float | None = None
    values: list[float] | None = None
    returns: list[float] | None = None
    masked: bool = False

    @property
    def num_tokens(self) -> int:
        """Count the tokens of prompt and response."""
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class Recompute:
    """Which activations the backward pass computes again. `granularity` is none, selective or full; `method` and
    `num_layers` go with full, `modules` with selective."""

    granularity: str = "none"
    method: str = "uniform"
    num_layers: int = 1
    modules: tuple[str, ...] = ("mlp",)


NO_RECOMPUTE = Recompute()
