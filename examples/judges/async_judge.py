"""A judge that answers slowly, as a model behind an address does: a coroutine, so that many answers wait at once.

    torchrun ... -m remax_megatron custom_reward_function.path=examples/judges/async_judge.py \
      +custom_reward_function.reward_kwargs.seconds=0.5

`reward.async_concurrency` answers are scored at once in each of `reward.num_workers` processes; `reward.timeout_s` is
each one's deadline.
"""

from __future__ import annotations

import asyncio
from typing import Any


async def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any],
    prompt: list[dict[str, str]],
    finished: bool,
    seconds: float = 0.5,
) -> dict[str, Any]:
    """The reward, and why it was given, which is kept with the answer in `trainer.rollout_data_dir`.

    Beside verl's four arguments a function may name `prompt` (the turns), `token_ids`, `num_tokens` and `finished`.
    """
    await asyncio.sleep(seconds)  # here: the request to the model that judges, with the question in it
    question = prompt[-1]["content"]
    right = solution_str.rstrip().endswith(f"#### {ground_truth}")
    why = "right" if right else "cut" if not finished else "wrong"
    return {"score": float(right), "why": why, "question_characters": len(question)}
