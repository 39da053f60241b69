"""The engine's life cycle at 1.5B with CUDA graphs: update, sleep, wake, weights, wake of the cache, canary; repeated.

Every round changes the weights first, so that the canary proves that new ones arrived. `seconds` of a round are by
what vLLM is asked for; asleep_gib is what the device has in use while the engine sleeps, less what it had before there
was an engine; growth_gib is how much more that is in the last round than in the first. Bandwidth is bytes of the
weights per second: of the reload alone, of the whole sync with its two wakes, and of a copy of as many bytes from one
place of the device's memory to another. On a CPU the engine never sleeps, and memory is the process's.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict

import torch
from transformers import PreTrainedTokenizerFast

from gpu_parts.part import Numbers, Part
from gpu_parts.update import make_rows
from remax_megatron.gauges import resident_bytes
from remax_megatron.rollout.bridge import Bridge
from remax_megatron.rollout.engine import Engine
from remax_megatron.types import Prompt

CALLS = ("sleep", "wake_up", "collective_rpc", "reset_prefix_cache")
PROMPT_TOKENS, ANSWER_TOKENS = 128, 128


def run(part: Part) -> None:
    folder = part.model("1.5b")
    config = part.settings(
        folder,
        "actor_rollout_ref.rollout.max_num_seqs=128",
        "actor_rollout_ref.rollout.kv_cache_gib=0.1",
        f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu={512 if part.tiny else 8192}",
    )
    rollout = config.actor_rollout_ref.rollout
    dtype = config.actor_rollout_ref.actor.megatron.dtype
    policy = part.policy(config)
    vocab_size = policy.facts.vocab_size
    rows = make_rows(vocab_size, 1024 if part.tiny else 8192)
    policy.update(rows)
    policy.release_training_memory()
    before_gib = _used_gib(part)
    engine: list[Engine] = []

    def build() -> None:
        engine.append(
            Engine(
                str(folder),
                PreTrainedTokenizerFast.from_pretrained(folder),
                rollout,
                dtype=dtype,
                max_prompt_length=PROMPT_TOKENS,
                max_response_length=ANSWER_TOKENS,
                seed=1,
                device=part.layout().device,
                tied_embeddings=policy.facts.tied_embeddings,
                stop_token_ids=[0],
            )
        )

    part.case("start", lambda: {"seconds": part.seconds(build), "used_gib": _used_gib(part) - before_gib})
    prompts = [
        Prompt(i, tuple((7 * i + 3 * j) % (vocab_size - 2) + 2 for j in range(PROMPT_TOKENS)), "", "") for i in range(8)
    ]
    bridge = Bridge(
        policy, engine[0], prompts, dtype=dtype, bucket_bytes=rollout.sync_bucket_mb * 2**20, threshold=None
    )
    spent = _timed(part, engine[0])
    rounds: list[Numbers] = []

    def one_round() -> Numbers:
        policy.update(rows)
        policy.release_training_memory()
        spent.clear()
        engine[0].sleep()
        asleep_gib = _used_gib(part) - before_gib
        report = bridge.sync()
        rounds.append(
            {"asleep_gib": asleep_gib, "sync_s": report.seconds, "canary_s": report.canary_seconds}
            | {"canary_mean": report.canary_mean, "canary_max": report.canary_max}
            | {f"{name}_s": seconds for name, seconds in sorted(spent.items())}
        )
        return rounds[-1]

    first = bridge.sync()  # and what is compiled at first use
    for number in range(2 if part.tiny else 10):
        part.case(f"round {number + 1}", one_round)
    part.case("bandwidth", lambda: _bandwidth(part, first.num_bytes, rounds))


def _used_gib(part: Part) -> float:
    """Of the device, by all that runs on it; on a CPU of this process."""
    if part.device == "cpu":
        return resident_bytes("self") / 2**30
    part.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


def _timed(part: Part, engine: Engine) -> dict[str, float]:
    """Seconds that vLLM spends by call; wake_up by what it wakes. The dictionary fills as the engine is used."""
    spent: dict[str, float] = defaultdict(float)

    def timed(name: str, call):
        def wrapper(*args, **kwargs):
            started = time.perf_counter()
            answer = call(*args, **kwargs)
            part.synchronize()
            spent["_".join([name, *kwargs.get("tags", [])])] += time.perf_counter() - started
            return answer

        return wrapper

    for name in CALLS:
        setattr(engine._llm, name, timed(name, getattr(engine._llm, name)))
    return spent


def _bandwidth(part: Part, num_bytes: int, rounds: list[Numbers]) -> Numbers:
    source, target = torch.zeros(2, num_bytes, dtype=torch.uint8, device=part.layout().device)
    target.copy_(source)
    copy_s = statistics.median(part.seconds(lambda: target.copy_(source)) for _ in range(5))
    sync_s = statistics.median(found["sync_s"] for found in rounds)
    reload_s = statistics.median(found["collective_rpc_s"] for found in rounds)
    return {
        "bytes": num_bytes,
        "copy_gb_per_s": num_bytes / 1e9 / copy_s,
        "reload_gb_per_s": num_bytes / 1e9 / reload_s,
        "sync_gb_per_s": num_bytes / 1e9 / sync_s,
        "reload_over_copy": copy_s / reload_s,
        "sync_over_copy": copy_s / sync_s,
        "rounds": len(rounds),
        "growth_gib": rounds[-1]["asleep_gib"] - rounds[0]["asleep_gib"],
    }
