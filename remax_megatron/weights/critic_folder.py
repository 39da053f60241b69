"""Where the weights of PPO's critic come from: a critic's own folder, or a language model's, to whose layers a value
head of 0 is put, so that every value is 0 at first, on every layout.

A critic's Hugging Face folder is that of a model that classifies tokens, with one class (transformers'
`Qwen2ForTokenClassification`), whose logit is the value. In a checkpoint of a run the critic's tensors lie beside the
policy's, under names that begin with CRITIC.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from remax_megatron.model_facts import ModelFacts
from remax_megatron.weights.hf_folder import expected_shapes
from remax_megatron.weights.megatron_folder import model_folder, open_weights
from remax_megatron.weights.weight_table import VALUE_HEAD

CRITIC = "critic."


class Weights(Protocol):
    """A folder's tensors by their Hugging Face names."""

    def get(self, name: str) -> Tensor:
        """Return the whole tensor."""


class WithNewHead:
    """The layers of a language model, and a value head of 0 of the critic `facts`."""

    def __init__(self, weights: Weights, facts: ModelFacts):
        self._weights, self._shapes = weights, expected_shapes(facts)

    def get(self, name: str) -> Tensor:
        """Return the whole tensor."""
        if name in VALUE_HEAD.values():
            return torch.zeros(self._shapes[name])
        return self._weights.get(name)


def open_critic(folder: str | Path, facts: ModelFacts, prefix: str = "") -> Weights:
    """The weights of the critic `facts` in `folder`, or those that it starts from.

    `prefix` is CRITIC for a checkpoint of a run with a critic. UserError when they do not fit.
    """
    assert facts.value_head, facts
    if prefix:
        return open_weights(folder, facts, prefix)
    stored = ModelFacts.from_folder(model_folder(folder), "critic.model.path", critic=True)
    weights = open_weights(folder, stored)
    return weights if stored.value_head else WithNewHead(weights, facts)


def critic_config(config: bytes) -> bytes:
    """The config.json of a critic from that of the model whose layers it has."""
    values = json.loads(config)
    family = ModelFacts.from_hf_config(values, "config.json", critic=True).family
    values |= {"architectures": [family.critic], "id2label": {"0": "VALUE"}, "label2id": {"VALUE": 0}}
    return (json.dumps(values, indent=2) + "\n").encode()
