"""Reduction of gradients and gathering of weights that overlap with the passes: the same bits as without.

The weights are read between updates in every way there is: as the stream for the engine, by a forward pass, as a
checkpoint. The model is cut into many buckets; Megatron's default would make one of it.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from tests.checkpoint.test_saver import PRELOAD, state, tensors
from tests.model.test_parity import take_update
from tests.policy.test_exactness import recorded_rows
from tests.ranks import run_ranks
from tests.small_models import LAYERS, make_qwen2

OVERLAPS = {"none": (False, False), "reduce": (True, False), "reduce and gather": (True, True)}
LAYOUTS = {2: 1, 4: 2}  # ranks -> pipeline stages; DP 2
BUCKET = 20_000  # weights


def build(folder: str, device, pp: int, overlap: str):
    from remax_megatron.config.schema import Actor
    from remax_megatron.model_facts import ModelFacts
    from remax_megatron.parallel.layout import init_model_parallel
    from remax_megatron.policy import policy, trained_model
    from remax_megatron.policy.settings import PolicySettings

    actor = Actor()
    actor.megatron.dtype, actor.megatron.layers = "float32", LAYERS
    actor.megatron.overlap_grad_reduce, actor.megatron.overlap_param_gather = OVERLAPS[overlap]
    actor.ppo_max_token_len_per_gpu, actor.optim.lr = 70, 1e-3
    layout = init_model_parallel(device, tp=1, pp=pp, vpp=None, seed=1)
    facts = ModelFacts.from_folder(folder)
    with pytest.MonkeyPatch.context() as patch:
        small = functools.partial(trained_model.DistributedDataParallelConfig, bucket_size=BUCKET)
        patch.setattr(trained_model, "DistributedDataParallelConfig", small)
        return policy.Policy(facts, layout, PolicySettings(actor), folder)


def train_and_read(policy, root: Path) -> list:
    """Three updates; after each the weights are read in another way first, then streamed."""
    from remax_megatron.checkpoint.saver import Saver
    from remax_megatron.policy.training_state import TrainingState

    rows = recorded_rows()
    saver = Saver(root, [TrainingState(policy)], policy.layout, {}, keep=9, in_background=False)
    found: list = []
    for step, first in enumerate(("the stream", "a forward pass", "a checkpoint"), start=1):
        update = take_update(policy, rows)
        found += [update.loss, pytest.approx(update.grad_norm, rel=1e-6)]  # a sum over shards that are cut elsewhere
        if first == "a forward pass":
            found.append(policy.logprobs(rows))
        if first == "a checkpoint":
            saver.save(state(step))
        found.append({name: tensor.clone() for name, tensor in policy.weight_stream(torch.float32, 10_000)})
    return found


def worker(payload):
    from megatron.core import parallel_state as mpu

    from remax_megatron.parallel.layout import init_distributed

    device = init_distributed("cpu", 120)
    found = {}
    for model, folder in payload["models"].items():
        for overlap in OVERLAPS:
            policy = build(folder, device, payload["pp"], overlap)
            buckets = [len(chunk.bucket_groups) for chunk in policy.chunks]
            found[model, overlap] = buckets, train_and_read(policy, payload["root"] / model / overlap)
            mpu.destroy_model_parallel()
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("overlap")
    return {name: str(make_qwen2(folder / name, tied=name == "tied", std=0.03)) for name in ("tied", "untied")}


def equal(one, other) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    return one == other


@pytest.mark.parametrize("world", LAYOUTS)
def test_overlaps_change_no_bit(world, models, tmp_path):
    payload = {"models": models, "pp": LAYOUTS[world], "root": tmp_path}
    ranks = run_ranks("tests.te.test_overlap:worker", world, payload, preload=PRELOAD)
    for model in models:
        saved = tensors(tmp_path / model / "none" / "iter_0000003")
        for overlap in OVERLAPS:
            assert equal(saved, tensors(tmp_path / model / overlap / "iter_0000003")), (model, overlap)
            for rank in ranks:
                buckets, found = rank[model, overlap]
                assert overlap == "none" or max(buckets) > 1 or LAYOUTS[world] > 1  # Megatron cuts the first stage only
                same = [equal(*pair) for pair in zip(found, rank[model, "none"][1], strict=True)]
                assert all(same), (model, overlap, same)
