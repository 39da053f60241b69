"""Megatron checkpoints of models made of Transformer Engine's layers, to and from Hugging Face: not a bit is lost."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from remax_megatron.convert.hf_to_megatron import ITERATION_FOLDER
from remax_megatron.convert.hf_to_megatron import convert as hf_to_megatron
from remax_megatron.convert.megatron_to_hf import convert as megatron_to_hf
from remax_megatron.weights.megatron_folder import TRACKER
from remax_megatron.weights.torch_dist import TorchDist
from tests.convert.test_layouts import PRELOAD, bits, build, worlds
from tests.ranks import run_ranks
from tests.small_models import YARN, make_qwen2, make_qwen3

MODELS = {
    "tied": (make_qwen2, dict(tied=True, vocab=1100, kv=2)),
    "untied": (make_qwen2, dict(tied=False, vocab=12 * 128, kv=4)),
    "qwen3": (make_qwen3, dict(tied=False, vocab=1100, kv=2, rope=YARN)),
}
WAVES = [  # of (tp, pp, dp, models in the order of loading), 8 ranks each
    [(4, 2, 1, ("tied", "untied", "qwen3"))],
    [(4, 1, 1, ("untied", "tied")), (2, 2, 1, ("tied", "qwen3", "untied"))],
    [(2, 1, 1, ("tied", "untied")), (1, 2, 1, ("untied", "tied")), (1, 1, 1, ("tied", "untied"))] + [(1, 1, 3, ())],
]
CASES = [(tp, pp, name) for wave in WAVES for tp, pp, _, names in wave for name in names]


def worker(folder: Path) -> list[str]:
    """Load the Hugging Face folder and the checkpoint converted from it, the latter with Megatron's own loader; save
    the model with Megatron's own writer. Returns the parameters that differ between the two."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    from remax_megatron.model.live_weights import load_weights
    from remax_megatron.model_facts import ModelFacts

    different = []
    for names, layout in worlds(WAVES):
        for name in names:
            hf, converted = folder / name / "hf", folder / name / "megatron"
            chunk, other = (build(hf, layout, torch.float32) for _ in range(2))
            fused = [key for key, _ in chunk.named_parameters() if key.endswith("layer_norm_weight")]
            assert len(fused) == 2 * len(chunk.decoder.layers), "these are not Transformer Engine's layers"
            load_weights([chunk], str(hf), ModelFacts.from_folder(hf), layout)
            state = {"model": other.sharded_state_dict()}
            other.load_state_dict(dist_checkpointing.load(state, str(converted / ITERATION_FOLDER))["model"])
            pairs = zip(chunk.named_parameters(), other.parameters(), strict=True)
            different += [f"{name} {layout.tp}x{layout.pp}: {key}" for (key, a), b in pairs if not torch.equal(a, b)]
            checkpoint = folder / f"{name}-{layout.tp}-{layout.pp}" / "iter_0000003"
            if layout.rank == 0:
                checkpoint.mkdir(parents=True)
            dist.barrier()
            dist_checkpointing.save({"model": chunk.sharded_state_dict(), "iteration": 3}, str(checkpoint))
    return different


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, list[list[str]]]:
    """The folder with both models in both formats and, as MODEL-TP-PP, what Megatron saved; what the ranks returned."""
    folder = tmp_path_factory.mktemp("convert")
    for seed, (name, (make, settings)) in enumerate(MODELS.items()):
        hf = make(folder / name / "hf", heads=8, seed=seed, **settings)
        hf_to_megatron(hf, folder / name / "megatron")
    different = run_ranks("tests.te.test_convert:worker", 8, folder, preload=PRELOAD)
    for tp, pp, name in CASES:
        root = folder / f"{name}-{tp}-{pp}"
        (root / TRACKER).write_text("3")
        shutil.copy(folder / name / "hf" / "config.json", root)
    return folder, different


def test_transformer_engines_layers_load_what_was_converted(saved):
    assert saved[1] == [[]] * 8


@pytest.mark.parametrize(("tp", "pp", "name"), CASES)
def test_what_they_save_becomes_the_original_bytes(saved, tp, pp, name, tmp_path):
    root = saved[0] / f"{name}-{tp}-{pp}"
    assert "decoder.layers.mlp.linear_fc1.layer_norm_weight" in TorchDist(root / "iter_0000003").tensors
    megatron_to_hf(root, tmp_path / "hf")
    assert bits(tmp_path / "hf") == bits(saved[0] / name / "hf")
