"""The demo preset on one device, in bfloat16 on a GPU: from the accuracy of the warm start to that of the end."""

from __future__ import annotations

import statistics

from gpu_parts.part import Numbers, Part
from gpu_parts.training import model_with_tokenizer, train
from remax_megatron.demo.word_problems import ensure_data


def run(part: Part) -> None:
    part.case("demo", lambda: _demo(part))


def _demo(part: Part) -> Numbers:
    overrides = ["actor_rollout_ref.rollout.gpu_memory_utilization=0.3"]
    if part.tiny:  # two steps on a random model, which knows nothing and learns nothing
        overrides += [f"actor_rollout_ref.model.path={model_with_tokenizer(part, '0.5b')}"]
        names = zip(("train", "val"), ensure_data(part.work / "data"), strict=True)
        overrides += [f"data.{name}_files={path}" for name, path in names]
        overrides += ["trainer.total_training_steps=2", "data.train_batch_size=4", "data.val_max_samples=8"]
        overrides += ["actor_rollout_ref.rollout.kv_cache_gib=0.1"]
    records = train(part, "demo", *overrides)
    validated = [record for record in records if "val/accuracy" in record]
    steps = [record for record in records if record["step"] > 0]
    return {
        "steps": len(steps),
        "accuracy_before": validated[0]["val/accuracy"],
        "accuracy_after": validated[-1]["val/accuracy"],
        "step_s": statistics.median(record["time/step_s"] for record in steps),
        "canary_mean_max": max(record["sync/canary_mean_abs_diff"] for record in records),
        "mismatch_mean_max": max(record.get("rollout/logprob_diff_mean", 0.0) for record in steps),
    }
