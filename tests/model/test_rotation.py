"""Queries and keys rotated by token at once, against Megatron's own rotation row by row: bit for bit."""

from __future__ import annotations

import math

from remax_megatron.types import Row
from tests.model.test_parity import make_rows
from tests.ranks import run_ranks
from tests.small_models import make_qwen2


def shared_rows() -> list[Row]:
    """6 prompts with 3 answers each."""
    answers = [[5], [5, 9], [5, 9, 7]]
    prompts = [row.prompt_ids for row in make_rows(count=6)]
    return [Row(prompt, answer, [1.0] * len(answer), [-5.0] * len(answer)) for prompt in prompts for answer in answers]


def rotation_worker(folder: str) -> list[tuple]:
    """Per case and way to rotate: log-probabilities before, loss, gradient norm and weights after an update."""
    from remax_megatron.algorithm.aggregation import weigh_rows
    from remax_megatron.config.schema import Actor
    from remax_megatron.model_facts import ModelFacts
    from remax_megatron.parallel.layout import init_distributed, init_model_parallel
    from remax_megatron.policy import packed_model
    from remax_megatron.policy.policy import Policy
    from remax_megatron.policy.settings import PolicySettings

    layout = init_model_parallel(init_distributed("cpu", 120), tp=1, pp=1, vpp=None, seed=1)
    by_token = packed_model.packed_rows

    def by_row(segments, cu_seqlens, max_seqlen, *, shares_prompts, fused_rotation):
        """Rows named to Megatron, whose rotation then is its own; under shared prompts one row of all tokens."""
        return by_token(segments, cu_seqlens, max_seqlen, shares_prompts=shares_prompts, fused_rotation=True)

    results = []
    for share, rows in ((False, make_rows()), (True, shared_rows())):
        weigh_rows(rows, "token-mean")
        for dtype in ("float32", "bfloat16"):
            ways = []
            for packed_model.packed_rows in (by_token, by_row):
                actor = Actor(share_prompts=share, ppo_max_token_len_per_gpu=120)
                actor.megatron.dtype = dtype
                policy = Policy(ModelFacts.from_folder(folder), layout, PolicySettings(actor), folder)
                before, update = policy.logprobs(rows), policy.update(rows)
                weights = [tensor.float().numpy().tobytes() for _, tensor in policy.weight_stream(policy.dtype, 2**20)]
                ways.append([before, update.loss, update.grad_norm, weights])
            results.append((share, dtype, *ways))
    return results


def test_rotation_by_token_is_that_of_megatron_bit_for_bit(tmp_path):
    folder = str(make_qwen2(tmp_path / "model", tied=True))
    (results,) = run_ranks("tests.model.test_rotation:rotation_worker", 1, folder)
    assert len(results) == 4
    for share, dtype, by_token, by_row in results:
        assert by_token == by_row, (share, dtype)
        assert math.isfinite(by_token[1]) and by_token[2] > 0
