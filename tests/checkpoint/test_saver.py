"""Checkpoints of a policy in training: equal at every layout, damage found, no pickle run, nothing half-written."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from remax_megatron.checkpoint.folders import (
    best_step,
    check_files,
    file_record,
    iteration_folder,
    prune,
    saved_steps,
    write_manifest,
)
from remax_megatron.checkpoint.resume import _begun_from, check_same_run
from remax_megatron.checkpoint.state import CheckpointError, RunState, read_state
from remax_megatron.config.load import load_config
from remax_megatron.errors import UserError
from remax_megatron.types import Row
from remax_megatron.weights.mapped import MappedFiles
from remax_megatron.weights.torch_dist import TorchDist
from tests.ranks import run_ranks
from tests.small_models import LAYERS, make_qwen2, make_qwen3

VOCAB = 211
PRELOAD = ("remax_megatron.policy.policy", "remax_megatron.checkpoint.saver")
LAYOUTS = {  # name -> (ranks, tp, pp, vpp, dtype, distributed optimizer)
    "dp2": (2, 1, 1, None, "float32", True),
    "tp2": (2, 2, 1, None, "float32", True),
    "pp2": (2, 1, 2, None, "float32", True),
    "dp2, plain optimizer": (2, 1, 1, None, "float32", False),
    "dp2 tp2": (4, 2, 1, None, "float32", True),
    "pp2 vpp2": (2, 1, 2, 2, "float32", True),
    "one rank": (1, 1, 1, None, "float32", True),
    "dp2, bfloat16": (2, 1, 1, None, "bfloat16", True),
    "tp2, bfloat16, plain optimizer": (2, 2, 1, None, "bfloat16", False),
    "pp2, bfloat16": (2, 1, 2, None, "bfloat16", True),
}


def rows(seed: int) -> list[Row]:
    draw = random.Random(seed)
    made = []
    for _ in range(6):
        response = [draw.randrange(2, VOCAB) for _ in range(draw.randrange(2, 20))]
        prompt = tuple(draw.randrange(2, VOCAB) for _ in range(8))
        made.append(Row(prompt, response, [draw.choice([-1.0, 1.0])] * len(response), [-5.0] * len(response)))
    return made


def state(step: int, accuracy: float | None = None) -> RunState:
    return RunState(step, step, step, {}, "digest", {}, accuracy)


def worker(payload) -> list[tuple[float, float]]:
    from remax_megatron.parallel.layout import init_distributed

    return train(payload, init_distributed("cpu", 100))


def train(payload, device, layers: str = LAYERS) -> list[tuple[float, float]]:
    """Load `start` (a model, or a checkpoint with its number of updates), update, save to `root`; losses and norms."""
    from remax_megatron.algorithm.aggregation import weigh_rows
    from remax_megatron.checkpoint.saver import Saver
    from remax_megatron.config.schema import Actor
    from remax_megatron.model_facts import ModelFacts
    from remax_megatron.parallel.layout import init_model_parallel
    from remax_megatron.policy.policy import Policy
    from remax_megatron.policy.settings import PolicySettings
    from remax_megatron.policy.training_state import TrainingState

    _, tp, pp, vpp, dtype, distributed = LAYOUTS[payload["layout"]]
    layout = init_model_parallel(device, tp=tp, pp=pp, vpp=vpp, seed=1)
    actor = Actor()
    actor.megatron.dtype, actor.megatron.sequence_parallel = dtype, tp > 1
    actor.megatron.layers = layers
    actor.megatron.virtual_pipeline_model_parallel_size = vpp
    actor.megatron.use_distributed_optimizer = distributed
    actor.ppo_max_token_len_per_gpu, actor.optim.lr = 64, 1e-3
    facts = ModelFacts.from_folder(payload["model"])
    start = payload["start"]
    policy = Policy(facts, layout, PolicySettings(actor), start)
    training_state = TrainingState(policy)
    if payload["done"]:
        training_state.load_optimizer(start, payload["done"])
    saver = Saver(payload["root"], [training_state], layout, {}, keep=9, in_background=payload["background"])
    if payload["done"]:  # what was loaded, written at once
        saver.save(state(payload["done"]), in_background=False)
    found = []
    for step in range(payload["done"] + 1, payload["until"] + 1):
        batch = rows(step)
        weigh_rows(batch, "token-mean")
        update = policy.update(batch)
        found.append((update.loss, update.grad_norm))
        saver.save(state(step))
    saver.finish()
    return found


def run(layout: str, model: str, root: Path, start: str | None = None, done: int = 0, until: int = 2, background=False):
    payload = {"layout": layout, "model": model, "start": str(start or model), "root": str(root), "done": done}
    payload |= {"until": until, "background": background}
    return run_ranks("tests.checkpoint.test_saver:worker", LAYOUTS[layout][0], payload, 120, PRELOAD)[0]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole."""
    stored, files = TorchDist(folder), MappedFiles()
    whole = {}
    for key, tensor in stored.tensors.items():
        stacked = "decoder.layers" in key
        layers = range(tensor.shape[0]) if stacked else [None]
        rows_of = tensor.shape[1] if stacked else tensor.shape[0]
        whole[key] = torch.stack([stored.read_rows(key, layer, 0, rows_of, files) for layer in layers])
    return whole


def equal(a: Path, b: Path) -> None:
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(make_qwen2(tmp_path_factory.mktemp("model") / "hf", tied=True, vocab=VOCAB, kv=2, heads=4, std=0.03))


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> dict[str, Path]:
    """Two updates at TP 2, and at DP 2 in bfloat16: the folders of their checkpoints, and what the updates gave."""
    folder = tmp_path_factory.mktemp("saved")
    return {
        "float32": (folder / "f", run("tp2", model, folder / "f")),
        "bfloat16": (folder / "b", run("dp2, bfloat16", model, folder / "b")),
    }


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ("tp2", "dp2, bfloat16")])
def test_a_checkpoint_is_loaded_and_written_again_equal_at_every_layout(layout, model, saved, tmp_path):
    dtype = LAYOUTS[layout][4]
    root, found = saved[dtype]
    again = run(layout, model, tmp_path, iteration_folder(root, 1), done=1)
    equal(iteration_folder(root, 1), iteration_folder(tmp_path, 1))
    (loss, norm), (loss_again, norm_again) = found[1], again[0]
    assert loss_again == pytest.approx(loss, abs=1e-5 if dtype == "float32" else 2e-2)
    assert norm_again == pytest.approx(norm, rel=1e-4 if dtype == "float32" else 5e-2)
    keys = TorchDist(iteration_folder(root, 1)).tensors.keys()
    assert any("fp32_param" in key for key in keys) == (dtype == "bfloat16")


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory) -> str:
    return str(make_qwen3(tmp_path_factory.mktemp("model") / "qwen3", tied=False, vocab=VOCAB, heads=4, std=0.03))


def test_a_checkpoint_of_qwen3_is_loaded_at_another_layout_and_by_megatron(qwen3, tmp_path):
    found = run("tp2", qwen3, tmp_path / "first")
    first = iteration_folder(tmp_path / "first", 1)
    again = run("pp2", qwen3, tmp_path / "again", first, done=1)
    equal(first, iteration_folder(tmp_path / "again", 1))
    assert again[0] == pytest.approx(found[1], rel=1e-4)
    assert "optimizer.state.exp_avg.decoder.layers.self_attention.q_layernorm.weight" in TorchDist(first).tensors
    payload = {"model": qwen3, "checkpoint": str(first)}
    assert run_ranks("tests.checkpoint.test_saver:megatron_worker", 2, payload, 120) == [0.0, 0.0]


def test_saving_in_the_background_writes_the_state_of_its_step(model, saved, tmp_path):
    run("tp2", model, tmp_path, background=True)
    for step in (1, 2):
        equal(iteration_folder(saved["float32"][0], step), iteration_folder(tmp_path, step))
        check_files(iteration_folder(tmp_path, step))


def megatron_worker(payload) -> float:
    """Load a checkpoint with Megatron's own `dist_checkpointing.load`; the largest difference to ours."""
    from megatron.core import dist_checkpointing

    from remax_megatron.config.schema import Actor
    from remax_megatron.model_facts import ModelFacts
    from remax_megatron.parallel.layout import init_distributed, init_model_parallel
    from remax_megatron.policy.policy import Policy
    from remax_megatron.policy.settings import PolicySettings

    device = init_distributed("cpu", 100)
    layout = init_model_parallel(device, tp=2, pp=1, vpp=None, seed=1)
    actor = Actor()
    actor.megatron.dtype, actor.megatron.layers = "float32", LAYERS
    facts = ModelFacts.from_folder(payload["model"])

    def policy(folder: str) -> Policy:
        return Policy(facts, layout, PolicySettings(actor), folder)

    ours, theirs = policy(payload["checkpoint"]), policy(payload["model"])
    chunk = theirs.bare_chunks[0]
    loaded = dist_checkpointing.load(chunk.sharded_state_dict(), payload["checkpoint"])
    chunk.load_state_dict(loaded, strict=False)
    pairs = zip(ours.bare_chunks[0].parameters(), chunk.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def test_megatron_reads_our_checkpoints(model, saved):
    payload = {"model": model, "checkpoint": str(iteration_folder(saved["float32"][0], 2))}
    assert run_ranks("tests.checkpoint.test_saver:megatron_worker", 2, payload, 120) == [0.0, 0.0]


# Damage --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(saved, tmp_path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(iteration_folder(saved["float32"][0], 2), tmp_path / "iter_0000002"))


class Payload:
    def __reduce__(self):
        return os.system, ("touch ran",)


def forge(checkpoint: Path, name: str) -> None:
    """Put a pickle that runs a command where `name` had its own, and make the manifest agree."""
    if name == ".metadata":
        (checkpoint / name).write_bytes(pickle.dumps(Payload()))
    elif name == "common.pt":
        torch.save({"a": Payload()}, checkpoint / name)
    else:
        data = bytearray((checkpoint / name).read_bytes())
        at = data.index(b"data.pkl") + len("data.pkl")
        at = data.index(b"\x80\x02", at)
        evil = pickle.dumps(Payload(), protocol=2)
        data[at : at + len(evil)] = evil
        (checkpoint / name).write_bytes(data)
    records = {path.name: file_record(path) for path in checkpoint.iterdir() if path.name != "file_manifest.json"}
    write_manifest(checkpoint, records)


@pytest.mark.parametrize("name", [".metadata", "common.pt", "__0_0.distcp", "__1_0.distcp"])
def test_a_malicious_pickle_is_named_and_not_run(checkpoint, name, monkeypatch, tmp_path):
    check_files(checkpoint)
    forge(checkpoint, name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        check_files(checkpoint)
    assert not (tmp_path / "ran").exists()


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "flipped": flip_a_bit,
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_the_file_named(checkpoint, damage):
    names = {path.name for path in checkpoint.iterdir()} - {"file_manifest.json"}
    assert {"__0_0.distcp", ".metadata", "metadata.json", "state.json"} <= names  # common.pt: up to megatron-core 0.18
    for name in sorted(names):
        content = (checkpoint / name).read_bytes()
        DAMAGES[damage](checkpoint / name)
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            check_files(checkpoint)
        (checkpoint / name).write_bytes(content)
    check_files(checkpoint)


def test_an_index_that_leads_outside_is_refused(checkpoint):
    index = (checkpoint / ".metadata").read_bytes()
    assert b"__0_0.distcp" in index
    (checkpoint / ".metadata").write_bytes(index.replace(b"__0_0.distcp", b"../_0.distcp"))
    with pytest.raises(UserError, match=r"names '\.\./_0\.distcp', which is no file beside it"):
        TorchDist(checkpoint)


def test_strangers_are_refused(checkpoint, model, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint of a run"):
        read_state(Path(model))
    (checkpoint / "extra.distcp").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"extra\.distcp is not in file_manifest"):
        check_files(checkpoint)
    (checkpoint / "extra.distcp").unlink()
    (checkpoint / "file_manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"file_manifest\.json is missing"):
        check_files(checkpoint)


def test_a_checkpoint_of_version_0_1_0_is_still_checked(checkpoint):
    (checkpoint / "file_manifest.json").rename(checkpoint / "manifest.json")
    check_files(checkpoint)
    flip_a_bit(checkpoint / "__0_0.distcp")
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is not what manifest\.json says"):
        check_files(checkpoint)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 20 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def filling_worker(payload) -> list[str]:
    """Save, fill the disk, save again: before the files are begun, and while they are written. What is said."""
    from remax_megatron.checkpoint import saver as module
    from remax_megatron.config.schema import Actor
    from remax_megatron.model_facts import ModelFacts
    from remax_megatron.parallel.layout import init_distributed, init_model_parallel
    from remax_megatron.policy.policy import Policy
    from remax_megatron.policy.settings import PolicySettings
    from remax_megatron.policy.training_state import TrainingState

    device = init_distributed("cpu", 100)
    layout = init_model_parallel(device, tp=1, pp=1, vpp=None, seed=1)
    actor, facts = Actor(), ModelFacts.from_folder(payload["model"])
    actor.megatron.dtype, actor.megatron.layers = "float32", LAYERS
    policy = Policy(facts, layout, PolicySettings(actor), payload["model"])
    module.ROOM_FOR_INDEX = 0  # a small disk and a small model
    saver = module.Saver(payload["root"], [TrainingState(policy)], layout, {}, keep=9, in_background=False)
    saver.save(state(1))
    said = []
    if layout.rank == 0:
        free = shutil.disk_usage(payload["root"]).free
        (Path(payload["root"]) / "other").write_bytes(bytes(free - 2**20))
    torch.distributed.barrier()
    for attempt in ("as it is", "as if another writer took the room in the meantime"):
        if attempt != "as it is":
            module.shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**12, 0, 10**12)
        try:
            saver.save(state(2))
        except CheckpointError as error:
            said.append(str(error))
    return said


def test_a_full_disk_is_said_and_harms_nothing(model, small_disk):
    root = small_disk / "checkpoints"
    said = run_ranks("tests.checkpoint.test_saver:filling_worker", 2, {"model": model, "root": str(root)}, 120, PRELOAD)
    assert said[0] == said[1]
    before, during = said[0]
    assert "GB free, and a checkpoint needs" in before and "trainer.max_ckpt_to_keep" in before
    assert "checkpoint of step 2 could not be written" in during and ".distcp" in during
    assert saved_steps(root) == [1] and not list(root.glob(".iter*"))
    check_files(iteration_folder(root, 1))


# What is kept, and what may be gone on with --------------------------------------------------------------------------


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step, accuracy in ((10, 0.3), (20, 0.5), (30, 0.5), (40, None), (50, 0.4), (60, None)):
        folder = iteration_folder(tmp_path, step)
        folder.mkdir()
        (folder / "state.json").write_text(state(step, accuracy).to_json())
    assert best_step(tmp_path) == 20
    assert prune(tmp_path, keep=2) == [40, 30, 10]
    assert saved_steps(tmp_path) == [60, 50, 20]
    assert not list(tmp_path.glob(".*"))


def test_a_run_begun_from_a_path_goes_on_from_its_own_checkpoints(tmp_path):
    settings = {1: {"resume_mode": "auto", "resume_from_path": None}}
    settings |= {step: {"resume_mode": "path", "resume_from_path": "elsewhere/iter_0000001"} for step in (2, 3)}
    for step, trainer in settings.items():
        folder = iteration_folder(tmp_path, step)
        folder.mkdir()
        (folder / "state.json").write_text(RunState(step, step, step, {}, "", {"trainer": trainer}).to_json())
    assert _begun_from("elsewhere/iter_0000001", tmp_path) == [3, 2]
    assert _begun_from("another", tmp_path) == []


def run_state(config) -> RunState:
    from dataclasses import asdict

    return RunState(3, 3, 3, {}, "digest", json.loads(json.dumps(asdict(config))))


def test_a_changed_meaning_is_refused_with_the_keys_named_and_a_changed_layout_is_not():
    saved = run_state(load_config("demo").config)
    free = ["actor_rollout_ref.actor.megatron.pipeline_model_parallel_size=2", "trainer.total_epochs=7"]
    free += ["actor_rollout_ref.actor.ppo_max_token_len_per_gpu=512", "trainer.logger=[]", "trainer.nnodes=3"]
    check_same_run(saved, load_config("demo", free).config, "digest")
    other = ["actor_rollout_ref.actor.optim.lr=1e-3", "trainer.seed=9", "data.train_batch_size=8"]
    with pytest.raises(CheckpointError) as refused:
        check_same_run(saved, load_config("demo", other).config, "other digest")
    for key in ("actor_rollout_ref.actor.optim.lr (was 5e-05, is 0.001)", "trainer.seed", "data.train_batch_size"):
        assert key in str(refused.value)
    assert "data.train_files" in str(refused.value) and "total_epochs" not in str(refused.value)
