"""The reference policy: the model as it was before training, which a KL term compares with. It is never updated."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from remax_megatron.config.model_facts import ModelFacts
from remax_megatron.config.schema import Actor
from remax_megatron.parallel.layout import Layout
from remax_megatron.policy.packed_model import PackedModel
from remax_megatron.types import Row


class Reference(PackedModel):
    """Frozen weights in the policy's layout and dtype; with `offload` on the CPU between uses (a GPU setting)."""

    def __init__(
        self,
        facts: ModelFacts,
        layout: Layout,
        actor: Actor,
        *,
        model_folder: str,
        temperature: float,
        offload: bool,
        log: Callable[[str], None] = lambda line: None,
    ):
        super().__init__(
            facts, layout, actor, model_folder=model_folder, temperature=temperature, recompute=False, log=log
        )
        for chunk in self.chunks:
            chunk.requires_grad_(False)
        self._offload = offload and layout.device.type == "cuda"
        self._move("cpu")

    def logprobs(self, rows: Sequence[Row], temperature: float | None = None) -> list[list[float]]:
        self._move(self.layout.device)
        try:
            return super().logprobs(rows, temperature)
        finally:
            self._move("cpu")

    def _move(self, device) -> None:
        if self._offload:
            for chunk in self.chunks:
                chunk.to(device)
