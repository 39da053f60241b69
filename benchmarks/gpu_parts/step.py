"""Whole ReMax steps at 1.5B through the trainer's entry, and where their time goes.

The 3B preset on one device and a random model: n 4, budget 24000, recompute as there, word problems as prompts. A
random model writes no end of sequence, so every answer is as long as it may be; rewards are drawn, 0 or 1, so that half
of all answers have a gradient. The first step, which compiles, is left out.
"""

from __future__ import annotations

import statistics

from gpu_parts.part import Numbers, Part
from gpu_parts.training import model_with_tokenizer, train
from remax_megatron.demo.word_problems import ensure_data

REWARD = """import random


def compute_score(data_source, solution_str, ground_truth, extra_info):
    return float(random.random() < 0.5)
"""


def run(part: Part) -> None:
    part.case("1.5b", lambda: _steps(part))


def _steps(part: Part) -> Numbers:
    (part.work / "reward.py").write_text(REWARD)
    overrides = [
        f"actor_rollout_ref.model.path={model_with_tokenizer(part, '1.5b')}",
        f"data.train_files={ensure_data(part.work / 'data')[0]}",
        "data.val_files=null",
        f"data.train_batch_size={4 if part.tiny else 64}",
        "data.max_prompt_length=64",
        f"data.max_response_length={16 if part.tiny else 256}",
        f"custom_reward_function.path={part.work}/reward.py",
        f"trainer.total_training_steps={2 if part.tiny else 3}",
        "trainer.save_freq=-1",
        "trainer.test_freq=-1",
        "trainer.val_before_train=False",
    ]
    if part.tiny:
        overrides += ["actor_rollout_ref.actor.ppo_max_token_len_per_gpu=512"]
        overrides += ["actor_rollout_ref.rollout.kv_cache_gib=0.1"]
    steps = [record for record in train(part, "qwen2_5_3b", *overrides) if record["step"] > 1]

    def median(name: str) -> float | None:
        values = [record[name] for record in steps if name in record]
        return statistics.median(values) if values else None

    found: Numbers = {"steps": len(steps), "tokens": median("batch/num_tokens"), "step_s": median("time/step_s")}
    found |= {f"{phase}_s": median(f"time/{phase}_s") for phase in ("rollout", "reward", "update", "sync")}
    for name in (
        "sync/canary_seconds",
        "perf/mfu",
        "perf/tflops",
        "throughput/trained_tokens_per_s",
        "throughput/generated_tokens_per_s",
        "memory/device_used_max_gib",
    ):
        found[name.partition("/")[2]] = median(name)
    return {name: value for name, value in found.items() if value is not None}
