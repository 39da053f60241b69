"""The demo's policy: a tokenizer and a model of a million parameters, warm-started on word problems.

An ordinary Hugging Face folder; `demo/prepare.py` is the command that makes it. It takes one to two minutes on two
cores, in plain torch and float32, and is the same to the bit for the same seed, torch build, processor and number of
threads.

What the warm start is, and is not. The model learns by plain supervised learning from demonstrations of *mixed*
quality, as scraped text is. They part in two places: whether the sentence takes the right operation, and whether a
final line `#### N` follows it (`demonstration`, `RIGHT_SHARE`, `FINAL_LINE_SHARE`). The final line is always the less
common way, and for one family of problems the right operation is: so greedy decoding starts low, while a fair share of
samples is right, which ReMax can sharpen. The arithmetic itself is learned here, not by ReMax. The demonstrations leave
out every question of the test file.
"""

from __future__ import annotations

import copy
import importlib
import math
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.utils.logging import disable_progress_bar

from remax_megatron.demo.model_config import MODEL_CONFIG, MODEL_CONFIGS
from remax_megatron.demo.once import build_once
from remax_megatron.demo.word_problems import INSTRUCTION, Problem, problems, splits
from remax_megatron.errors import UserError

# ---- the recipe: a policy of other values is built anew --------------------------------------------------------------

RIGHT_SHARE = {"join": 0.85, "separate": 0.85, "two_steps": 0.85, "groups": 0.75, "compare": 0.35}
FINAL_LINE_SHARE = {"join": 0.40, "separate": 0.45, "two_steps": 0.25, "groups": 0.30, "compare": 0.30}

NUM_STEPS = 320
BATCH_SIZE = 64
LEARNING_RATE = 2e-3
BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.01
CLIP_GRAD = 1.0

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MAX_VOCAB_SIZE = 1024


def demonstration(problem: Problem, rng: random.Random) -> str:
    """One answer to learn from: right or with the wrong operation, with or without the final line, by chance."""
    if rng.random() < RIGHT_SHARE[problem.family]:
        sentence, result = problem.solution, problem.result
    else:
        sentence, result = problem.wrong_solution, problem.wrong_result
    return f"{sentence}\n#### {result}" if rng.random() < FINAL_LINE_SHARE[problem.family] else sentence


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Qwen2's byte-level BPE, trained on the problems' text: takes any text, gives one token per usual word.

    Each number from 10 to 99 is one token of its own (Qwen2 itself splits all digits), so that a sum is one look-up for
    the model and not a carry over digits. `<|im_end|>` ends a turn and is the end of sequence, `<|endoftext|>` pads.
    It must be a real Qwen2Tokenizer: `AutoTokenizer` of transformers 5.19 makes one of whatever tokenizer lies beside a
    config of type qwen2 or qwen3, and would put Qwen2's splitting rule in the place of any other.
    """
    blank = Qwen2Tokenizer(
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=MODEL_CONFIG["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )
    corpus = [f"{p.prompt}\n{p.answer}\n{p.wrong_solution}" for p in islice(problems(random.Random("tokenizer")), 4000)]
    corpus += ["system\nuser\nassistant\n"] * 4
    tokenizer = blank.train_new_from_iterator(corpus, MAX_VOCAB_SIZE, min_frequency=2, show_progress=False)
    tokenizer.add_tokens([str(number) for number in range(10, 100)])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields (input_ids, labels), both [BATCH_SIZE, longest row], labels -100 except on the answer and its end.

    Rows are padded on the right, where a causal model without a mask computes nothing that a label reads.
    """
    rng = random.Random(f"demonstrations-{seed}")
    stream = problems(rng, exclude={problem.question for problem in splits()[1]})
    while True:
        rows = []
        for problem in islice(stream, BATCH_SIZE):
            turn = [{"role": "user", "content": problem.prompt}]
            text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            answer = demonstration(problem, rng) + tokenizer.eos_token
            rows.append((tokenizer.encode(text), tokenizer.encode(answer)))
        length = max(len(prompt) + len(answer) for prompt, answer in rows)
        input_ids = torch.full((BATCH_SIZE, length), tokenizer.pad_token_id)
        labels = torch.full((BATCH_SIZE, length), -100)
        for i, (prompt, answer) in enumerate(rows):
            end = len(prompt) + len(answer)
            input_ids[i, :end] = torch.tensor(prompt + answer)
            labels[i, len(prompt) : end] = torch.tensor(answer)
        yield input_ids, labels


def train_policy(
    tokenizer: PreTrainedTokenizerFast,
    seed: int = 0,
    num_steps: int = NUM_STEPS,
    progress: bool = True,
    family: str = "qwen2",
) -> PreTrainedModel:
    """A fresh model of `family` after `num_steps` steps of AdamW (short warm-up, cosine decay to 5 %), float32, CPU.

    The caller's random state is left as it was. Raises ValueError when the vocabulary is not the config's.
    """
    if len(tokenizer) != MODEL_CONFIG["vocab_size"]:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, MODEL_CONFIG['vocab_size'] is {MODEL_CONFIG['vocab_size']}; "
            f"set that to {len(tokenizer)}"
        )
    values = MODEL_CONFIGS[family]
    model_class = getattr(importlib.import_module("transformers"), values["architectures"][0])
    config = model_class.config_class.from_dict(
        copy.deepcopy(values)
        | {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY)
    warmup = max(1, num_steps // 20)

    def factor(step: int) -> float:
        decayed = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        return min(1.0, (step + 1) / warmup) * decayed

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    batches = islice(_batches(tokenizer, seed), num_steps)
    for input_ids, labels in tqdm(batches, "Warm start", num_steps, disable=not progress):
        hidden_states = model.model(input_ids=input_ids).last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        scored = targets != -100  # logits of answer tokens only
        loss = F.cross_entropy(model.lm_head(hidden_states[scored]), targets[scored])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRAD)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def save_policy(
    folder: Path, seed: int = 0, num_steps: int = NUM_STEPS, progress: bool = True, family: str = "qwen2"
) -> None:
    """Builds tokenizer and model and writes both into `folder`, which must exist."""
    tokenizer = make_tokenizer()
    model = train_policy(tokenizer, seed, num_steps, progress, family)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    disable_progress_bar()  # one small file
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _recipe(seed: int, num_steps: int, family: str = "qwen2") -> dict[str, Any]:
    probe = list(islice(problems(random.Random("recipe")), 256))  # changes when the generator changes
    return {
        "seed": seed,
        "num_steps": num_steps,
        "shares": [RIGHT_SHARE, FINAL_LINE_SHARE],
        "model": MODEL_CONFIGS[family],
        "training": [BATCH_SIZE, LEARNING_RATE, BETAS, WEIGHT_DECAY, CLIP_GRAD],
        "tokenizer": [CHAT_TEMPLATE, MAX_VOCAB_SIZE],
        "problems": [INSTRUCTION, [[p.question, p.answer, p.wrong_solution] for p in probe]],
    }


def ensure_policy(
    folder: Path, seed: int = 0, num_steps: int = NUM_STEPS, progress: bool = True, family: str = "qwen2"
) -> Path:
    """Build the warm-started policy of `family` in `folder` unless it is there, of the same recipe; returns `folder`.

    Safe when several processes call at once: one builds, the others wait. Uses as many threads as torch is set to.
    UserError when num_steps is below 1, or `folder` was not made here.
    """
    if num_steps < 1:
        raise UserError(f"num_steps={num_steps}: the warm start needs at least 1 step; set num_steps={NUM_STEPS}")
    recipe = _recipe(seed, num_steps, family)
    return build_once(folder, recipe, lambda aside: save_policy(aside, seed, num_steps, progress, family))
