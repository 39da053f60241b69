"""The policy against transformers in float32, from the same bfloat16 weights: log-probabilities and gradients.

A case is a policy that scores rows and takes an update. `transformers bfloat16` is what rounding alone costs: the
same reference in bfloat16. Differences of log-probabilities are nats, of gradients the norm over all tensors together,
relative to that of the reference; gradient_worst is the tensor where it is largest.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import torch

from gpu_parts.part import Numbers, Part, relative
from remax_megatron.algorithm.aggregation import weigh_rows
from remax_megatron.model.live_weights import WeightStream
from remax_megatron.types import Row

SHAPE = (4, 512, 1408, 8, 2, 8192, True)  # head_dim 64, which all flash kernels take
STD = 0.06  # of the weights: attention and answers are then far from uniform
ACTOR = "actor_rollout_ref.actor"
CASES = (  # layers, dtype, attention, shared prompts, recompute
    ("local", "float32", "sdpa", False, "none"),
    ("local", "float32", "sdpa", True, "none"),
    ("local", "float32", "flex", False, "none"),
    ("local", "float32", "flex", True, "none"),
    ("local", "bfloat16", "sdpa", False, "none"),
    ("local", "bfloat16", "varlen", False, "none"),
    ("local", "bfloat16", "flex", False, "none"),
    ("local", "bfloat16", "flex", True, "none"),
    ("transformer_engine", "bfloat16", "transformer_engine", False, "none"),
    ("transformer_engine", "bfloat16", "transformer_engine", False, "selective"),
    ("transformer_engine", "bfloat16", "transformer_engine", False, "full"),
    ("transformer_engine", "bfloat16", "varlen", False, "none"),
    ("transformer_engine", "bfloat16", "flex", True, "none"),
)


def run(part: Part) -> None:
    folder = part.model("parity", SHAPE, STD)
    rows = make_rows(500, num_prompts=4, longest=30) if part.tiny else make_rows(8000, num_prompts=8, longest=400)
    expected = reference(folder, rows, part.layout().device, torch.float32)
    part.case(
        "transformers bfloat16",
        lambda: differences(reference(folder, rows, part.layout().device, torch.bfloat16), expected),
    )
    no_te = part.lacks_transformer_engine()
    for layers, dtype, attention, shared, recompute in CASES:
        name = f"{layers} {dtype} {attention}{' shared' * shared} {recompute}"
        if layers == "transformer_engine" and no_te:
            part.not_available(name, no_te)
            continue
        config = part.settings(
            folder,
            f"{ACTOR}.megatron.dtype={dtype}",
            f"{ACTOR}.megatron.layers={layers}",
            f"{ACTOR}.megatron.attention_backend={attention}",
            f"{ACTOR}.megatron.override_transformer_config.recompute_granularity={recompute}",
            f"{ACTOR}.share_prompts={shared}",
            f"{ACTOR}.ppo_max_token_len_per_gpu={max(row.num_tokens for row in rows) * 4}",
            f"{ACTOR}.optim.clip_grad=0",  # gradients as they are
        )
        part.case(name, lambda config=config: differences(policy_result(part.policy(config), rows), expected))


def make_rows(vocab_size: int, *, num_prompts: int, longest: int) -> list[Row]:
    """Two answers to every prompt, of random tokens, with advantages of 1 and -1 and the weights of a token mean."""
    draw, rows = random.Random(0), []
    for _ in range(num_prompts):
        prompt = tuple(draw.randrange(2, vocab_size) for _ in range(draw.randrange(2, longest)))
        for advantage in (1.0, draw.choice([-1.0, 1.0])):
            response = [draw.randrange(2, vocab_size) for _ in range(draw.randrange(1, longest))]
            rows.append(Row(prompt, response, [advantage] * len(response), [-9.0] * len(response)))
    weigh_rows(rows, "token-mean")
    return rows


Result = tuple[torch.Tensor, dict[str, torch.Tensor]]  # log-probabilities of all response tokens; gradients by name


def reference(folder: Path, rows: list[Row], device: torch.device, dtype: torch.dtype) -> Result:
    """transformers' model, row by row, attention as plain matrix products; the loss in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").to(device)
    logprobs = []
    for row in rows:
        logits = model(torch.tensor([[*row.prompt_ids, *row.response_ids]], device=device)).logits[0].float()
        scored = logits[len(row.prompt_ids) - 1 : -1].log_softmax(-1)
        logprob = scored.gather(1, torch.tensor(row.response_ids, device=device).unsqueeze(1)).squeeze(1)
        assert row.weight is not None
        # The gradient of the policy's loss where every ratio is 1.
        (-row.weight * torch.tensor(row.advantages, device=device) * logprob).sum().backward()
        logprobs.append(logprob.detach().cpu())
    gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return torch.cat(logprobs), gradients


class _Gradients:
    """A model chunk whose parameters are their gradients, as the weight stream wants to see it."""

    def __init__(self, chunk: torch.nn.Module):
        self.chunk = chunk

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, parameter.main_grad) for name, parameter in self.chunk.named_parameters())


def policy_result(policy, rows: list[Row]) -> Result:
    """The policy's log-probabilities, and the gradients that an update leaves in Megatron's buffers."""
    logprobs = torch.tensor([x for one in policy.logprobs(rows) for x in one])
    update = policy.update(rows)
    assert not update.skipped, update
    chunks = [_Gradients(chunk) for chunk in policy.bare_chunks]
    stream = WeightStream(chunks, policy.facts, policy.layout, torch.float32, 2**28)
    return logprobs, {name: gradient.cpu() for name, gradient in stream}


def differences(found: Result, expected: Result) -> Numbers:
    far = (found[0] - expected[0]).abs()
    names = sorted(expected[1])
    assert names == sorted(found[1]), set(names) ^ set(found[1])
    by_tensor = {name: relative([found[1][name]], [expected[1][name]]) for name in names}
    worst = max(names, key=lambda name: by_tensor[name])
    return {
        "logprob_mean": far.mean().item(),
        "logprob_max": far.max().item(),
        "gradient": relative([found[1][name] for name in names], [expected[1][name] for name in names]),
        "gradient_worst": by_tensor[worst],
        "gradient_worst_tensor": worst,
    }
