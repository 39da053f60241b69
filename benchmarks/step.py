"""One update of the same answers, computed four ways: padded, packed, without zero-advantage rows, with shared prompts.

    python benchmarks/step.py [--prompts 16] [--samples 4] [--rows 8] [--budget 4096] [--repeats 3] [--json FILE]

    a  padded   micro-batches of a fixed number of rows in order of arrival, each row padded to the longest of its batch
    b  packed   rows end to end under a token budget, attention per row
    c  skip     b without the rows whose advantage is 0
    d  shared   c with the prompt once for all its answers in a micro-batch

Real Megatron policy (26.6M parameters, float32, one rank), optimizer step included; medians. Lengths are drawn like
GSM8K's: prompts of 106 tokens on average with the chat template, answers log-normal with mean 249, cut at 1024.
Rewards of samples and greedy answers are 1 with probability 0.3, 0.6 or 0.9, independently: at 0.6 that leaves most
rows with a gradient that binary rewards can. c and d give b's gradient (tests/policy/test_exactness.py); a's differs by
nothing but padding. The ratios are those at 60 %.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import tempfile
import time
from pathlib import Path

from common import finish, machine
from random_model import config_of, make_folder

from remax_megatron.algorithm.aggregation import weigh_rows
from remax_megatron.config.schema import Actor
from remax_megatron.model_facts import ModelFacts
from remax_megatron.parallel.layout import init_distributed, init_model_parallel
from remax_megatron.types import Row

MODEL = config_of((10, 448, 1216, 7, 1, 12032, True))
ACCURACIES = (0.3, 0.6, 0.9)
MAX_RESPONSE = 1024
SIGMA = 0.6  # of the logarithm of an answer's length: 1 % of them reach 1024


def draw_rows(num_prompts: int, samples: int, vocab_size: int = MODEL["vocab_size"]) -> list[Row]:
    """Rows in order of arrival, prompt by prompt; advantages are drawn later."""
    draw = random.Random(0)
    rows = []
    for _ in range(num_prompts):
        length = max(60, round(draw.gauss(106, 30)))
        prompt = tuple(draw.randrange(vocab_size) for _ in range(length))
        for _ in range(samples):
            length = min(MAX_RESPONSE, max(20, round(draw.lognormvariate(math.log(249) - SIGMA**2 / 2, SIGMA))))
            response = [draw.randrange(vocab_size) for _ in range(length)]
            rows.append(Row(prompt, response, [1.0] * length, [-9.0] * length))
    return rows


def set_advantages(rows: list[Row], samples: int, accuracy: float) -> None:
    """Reward of the sample minus that of the prompt's greedy answer, all of them 1 with probability `accuracy`."""
    draw = random.Random(1)
    for first in range(0, len(rows), samples):
        greedy = draw.random() < accuracy
        for row in rows[first : first + samples]:
            row.advantages = [float(draw.random() < accuracy) - greedy] * len(row.response_ids)


def padded(rows: list[Row], rows_per_batch: int) -> list[Row]:
    """The same rows, those of a micro-batch made equally long by tokens in front of the prompt."""
    longer = []
    for first in range(0, len(rows), rows_per_batch):
        batch = rows[first : first + rows_per_batch]
        longest = max(row.num_tokens for row in batch)
        for row in batch:
            prompt = (0,) * (longest - row.num_tokens) + row.prompt_ids
            longer.append(Row(prompt, row.response_ids, row.advantages, row.rollout_logprobs, weight=row.weight))
    return longer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=4, help="answers per prompt")
    parser.add_argument("--rows", type=int, default=8, help="rows of a padded micro-batch")
    parser.add_argument("--budget", type=int, default=4096, help="tokens of a packed micro-batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    details = {"machine": machine(), "config": vars(options), "model": MODEL}
    print(f"machine: {details['machine']}\nconfig: {details['config']}", flush=True)
    from remax_megatron.policy.policy import Policy
    from remax_megatron.policy.settings import PolicySettings

    device = init_distributed("cpu", 600)
    layout = init_model_parallel(device, tp=1, pp=1, vpp=None, seed=0)
    actor = Actor()
    actor.megatron.dtype = "float32"
    actor.ppo_max_token_len_per_gpu, actor.ppo_micro_batch_size_per_gpu = options.budget, options.rows
    with tempfile.TemporaryDirectory() as work:
        make_folder(Path(work) / "model", MODEL)
        facts = ModelFacts.from_folder(Path(work) / "model")
        policy = Policy(facts, layout, PolicySettings(actor), str(Path(work) / "model"))

    def measure(rows: list[Row], *, packs: bool, shares: bool) -> dict[str, float]:
        actor.use_dynamic_bsz, policy.shares_prompts = packs, shares
        seconds = []
        for _ in range(options.repeats):
            started = time.perf_counter()
            update = policy.update(rows)
            seconds.append(time.perf_counter() - started)
        return {"tokens": update.num_computed_tokens, "seconds": statistics.median(seconds)}

    rows = draw_rows(options.prompts, options.samples)
    results: dict[float, dict[str, dict[str, float]]] = {}
    policy.update(_weighed(rows[:2]))  # warm-up
    for accuracy in ACCURACIES:
        set_advantages(rows, options.samples, accuracy)
        weigh_rows(rows, "token-mean")
        kept = [row for row in rows if any(row.advantages)]
        if not results:  # what is computed in a and b does not depend on the rewards
            a = measure(padded(rows, options.rows), packs=False, shares=False)
            b = measure(rows, packs=True, shares=False)
        c = measure(kept, packs=True, shares=False)
        d = measure(kept, packs=True, shares=True)
        results[accuracy] = {"a padded": a, "b packed": b, "c skip": c, "d shared": d}
        print(f"accuracy {accuracy:.0%}: {len(kept)} of {len(rows)} rows have a gradient")
        for name, found in results[accuracy].items():
            ratio = a["seconds"] / found["seconds"]
            print(f"  {name:10}{found['tokens']:8.0f} tokens{found['seconds']:8.2f} s{ratio:7.2f} x", flush=True)
    at_60 = {name: found["seconds"] for name, found in results[0.6].items()}
    speedup = {name: at_60["a padded"] / seconds for name, seconds in at_60.items()}
    details["results"] = results
    result = {"speedup_packed": speedup["b packed"], "speedup_skip": speedup["c skip"]}
    finish(result | {"speedup_shared": speedup["d shared"]}, details, options.json)


def _weighed(rows: list[Row]) -> list[Row]:
    weigh_rows(rows, "token-mean")
    return rows


if __name__ == "__main__":
    main()
