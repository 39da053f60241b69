"""The logits of a checkpoint of either kind, computed by transformers' own layers, one layer in memory at a time.

Float32 throughout. The embedding is read row by row, the head in blocks of rows. Of a Megatron checkpoint the fused
tensors are read as they are stored and taken apart here, by Megatron's definition of them and not by the weight table,
so that an error of the table, which both directions of the converters share, would show.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from remax_megatron.weights.hf_folder import HF_EMBEDDING, HF_HEAD, FolderError, HfWeights, expected_shapes
from remax_megatron.weights.mapped import Extent, MappedFiles
from remax_megatron.weights.megatron_folder import MegatronWeights, model_folder, open_model

HEAD_ROWS = 8192  # rows of the head that are multiplied at once
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.",
    "请用一句话介绍你自己。",
)
NUM_IDS = 24  # tokens per prompt where there is no tokenizer


class StreamedModel:
    """A model whose weights stay on disk. `logits` needs the memory of one layer in float32."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.weights: HfWeights | MegatronWeights
        self.weights, self.facts = open_model(folder)
        values = json.loads((model_folder(folder) / "config.json").read_text())
        self.config = self._class("Config").from_dict(values)
        self.config._attn_implementation = "sdpa"
        self._rotary = self._class("RotaryEmbedding")(self.config)
        self._maps = MappedFiles()

    def _class(self, name: str) -> Any:
        """transformers' class `name` of this family, for example Qwen2DecoderLayer."""
        family = self.facts.family
        kind = "configuration" if name == "Config" else "modeling"
        module = f"transformers.models.{family.model_type}.{kind}_{family.model_type}"
        return getattr(importlib.import_module(module), family.architecture.removesuffix("ForCausalLM") + name)

    def _rows(self, name: str, row: int, num_rows: int) -> Tensor:
        """[num_rows, H] in float32."""
        return self._read(self.weights.extents(name, row, num_rows), self.weights.dtype(name), num_rows)

    def _read(self, extents: list[Extent], dtype: torch.dtype, num_rows: int) -> Tensor:
        data = bytearray()
        for extent in extents:
            data += self._maps.read(extent)
            self._maps.release(extent)
        return torch.frombuffer(data, dtype=dtype).reshape(num_rows, -1).float()

    @torch.no_grad()
    def logits(self, prompts: list[list[int]]) -> list[Tensor]:
        """[T, V] in float32 for each prompt of T token ids."""
        facts = self.facts
        hidden = [torch.cat([self._rows(HF_EMBEDDING, token, 1) for token in ids])[None] for ids in prompts]
        positions = [torch.arange(len(ids))[None] for ids in prompts]
        rotations = [self._rotary(states, place) for states, place in zip(hidden, positions, strict=True)]
        with torch.device("meta"):
            layer = self._class("DecoderLayer")(self.config, 0)
            norm = self._class("RMSNorm")(facts.hidden_size, facts.rms_norm_eps)
        for number in tqdm(range(facts.num_layers), desc=f"layers of {self.folder}", file=sys.stderr):
            layer.load_state_dict(self._layer(number), assign=True)
            for i, states in enumerate(hidden):
                # Without a mask transformers' attention is causal; every prompt is a batch of its own.
                out = layer(states, attention_mask=None, position_ids=positions[i], position_embeddings=rotations[i])
                hidden[i] = out[0] if isinstance(out, tuple) else out
            layer.to("meta")
        norm.load_state_dict({"weight": self._rows("model.norm.weight", 0, facts.hidden_size).flatten()}, assign=True)
        head = HF_EMBEDDING if facts.tied_embeddings else HF_HEAD
        last = [norm(states)[0] for states in hidden]
        parts: list[list[Tensor]] = [[] for _ in prompts]
        for top in range(0, facts.vocab_size, HEAD_ROWS):
            rows = self._rows(head, top, min(HEAD_ROWS, facts.vocab_size - top))
            for mine, states in zip(parts, last, strict=True):
                mine.append(states @ rows.T)
        return [torch.cat(mine, dim=1) for mine in parts]

    def _layer(self, number: int) -> dict[str, Tensor]:
        """The weights of one layer under transformers' names."""
        if isinstance(self.weights, MegatronWeights):
            return self._fused_layer(self.weights, number)
        prefix = f"model.layers.{number}."
        shapes = {name: dims for name, dims in expected_shapes(self.facts).items() if name.startswith(prefix)}
        return {n.removeprefix(prefix): self._rows(n, 0, shape[0]).reshape(shape) for n, shape in shapes.items()}

    def _fused_layer(self, weights: MegatronWeights, number: int) -> dict[str, Tensor]:
        """linear_qkv: for each KV head its query heads, its key, its value; linear_fc1: gate, then up."""
        facts = self.facts
        attention, per_group = "self_attention", facts.num_attention_heads // facts.num_key_value_heads

        def stored(name: str, num_rows: int) -> Tensor:
            key = f"decoder.layers.{name}"
            dtype = weights.fused_dtype(key, number)
            return self._read(weights.fused_rows(key, number, 0, num_rows), dtype, num_rows)

        found = {
            "input_layernorm.weight": stored(f"{attention}.linear_qkv.layer_norm_weight", facts.hidden_size).flatten(),
            "post_attention_layernorm.weight": stored("mlp.linear_fc1.layer_norm_weight", facts.hidden_size).flatten(),
            "self_attn.o_proj.weight": stored(f"{attention}.linear_proj.weight", facts.hidden_size),
            "mlp.down_proj.weight": stored("mlp.linear_fc2.weight", facts.hidden_size),
        }
        fc1 = stored("mlp.linear_fc1.weight", 2 * facts.ffn_hidden_size)
        found["mlp.gate_proj.weight"], found["mlp.up_proj.weight"] = fc1[: len(fc1) // 2], fc1[len(fc1) // 2 :]
        head_rows = facts.num_key_value_heads * (per_group + 2) * facts.head_dim
        if facts.family.qk_norm:
            for x in "qk":
                norm = stored(f"{attention}.{x}_layernorm.weight", facts.head_dim)
                found[f"self_attn.{x}_norm.weight"] = norm.flatten()
        for what in ("weight", "bias") if facts.family.qkv_bias else ("weight",):
            heads = stored(f"{attention}.linear_qkv.{what}", head_rows).split(facts.head_dim)
            parts: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
            for i, head in enumerate(heads):
                place = i % (per_group + 2)
                parts["q" if place < per_group else "k" if place == per_group else "v"].append(head)
            for name, some in parts.items():
                whole = torch.cat(some)
                found[f"self_attn.{name}_proj.{what}"] = whole.flatten() if what == "bias" else whole
        return found


def prompt_ids(folder: str | Path, vocab_size: int) -> list[list[int]]:
    """The prompts as token ids: by the tokenizer of `folder`, else drawn from the vocabulary, always the same."""
    folder = model_folder(folder)
    if not (folder / "tokenizer.json").is_file():
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocab_size, (len(PROMPTS), NUM_IDS), generator=generator).tolist()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:  # what damaged tokenizer files raise
        raise FolderError(f"{folder}: the tokenizer cannot be read: {error}") from error
    return [ids for ids in (tokenizer(prompt, add_special_tokens=False).input_ids for prompt in PROMPTS) if ids]


def max_logit_difference(a: str | Path, b: str | Path) -> float:
    """Largest absolute difference of two models' logits over the prompts. FolderError when vocabularies differ."""
    models = [StreamedModel(folder) for folder in (a, b)]
    sizes = [model.facts.vocab_size for model in models]
    if sizes[0] != sizes[1]:
        raise FolderError(f"--logits: the vocabularies have {sizes[0]} rows in {a} and {sizes[1]} in {b}")
    prompts = prompt_ids(a, sizes[0])
    first, second = (model.logits(prompts) for model in models)
    far = [(left - right).abs().max() for left, right in zip(first, second, strict=True)]
    return torch.stack(far).max().item()  # unlike Python's, this maximum keeps a NaN
