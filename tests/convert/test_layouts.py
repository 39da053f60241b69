"""Converted checkpoints in real Megatron: loaded at every TP x PP x DP, and what Megatron itself saved, back again.

All layouts share one start of 32 ranks: in each wave the ranks split into worlds of their own, one for every layout.
"""

from __future__ import annotations

import datetime
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from remax_megatron.convert.hf_to_megatron import ITERATION_FOLDER
from remax_megatron.convert.hf_to_megatron import convert as hf_to_megatron
from remax_megatron.convert.megatron_to_hf import convert as megatron_to_hf
from remax_megatron.weights.hf_folder import INDEX, HfWeights
from remax_megatron.weights.megatron_folder import TRACKER
from tests.ranks import run_ranks
from tests.small_models import LAYERS, YARN, make_qwen2, make_qwen3

TOKENS = [5, 91, 3, 210, 17, 1023, 44, 2, 680, 1, 999, 31]
PRELOAD = ("remax_megatron.model.dense", "remax_megatron.model.live_weights", "megatron.core.dist_checkpointing")

# Rows of padding at TP 1, 2, 4, 8 (to a multiple of 128 x TP), and the shape each vocabulary stands for:
#   1100      52, 180, 436, 948     some everywhere, a different number each time
#   12 x 128   0,   0,   0, 512     152064 = 1188 x 128, and 1188 is 4 modulo 8, as 12 is
#   11 x 128   0, 128, 128, 640     151936 = 1187 x 128, and 1187 is 3 modulo 8, as 11 is
MODELS: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "tied": (make_qwen2, dict(tied=True, vocab=1100, kv=2)),
    "untied": (make_qwen2, dict(tied=False, vocab=12 * 128, kv=4, dtype=torch.bfloat16)),
    "many files": (make_qwen2, dict(tied=False, vocab=11 * 128, kv=8, max_shard_size="1MB")),
    # heads x head_dim is twice the hidden size, as in Qwen3-0.6B, and 8/5 of it, as in 4B and 32B
    "qwen3 tied": (make_qwen3, dict(tied=True, vocab=1100, kv=2)),
    "qwen3 untied": (make_qwen3, dict(tied=False, vocab=11 * 128, kv=4, hidden=160, rope=YARN)),
    "yarn": (make_qwen2, dict(tied=False, vocab=1100, kv=2, rope=YARN)),
}


@dataclass(frozen=True)
class Model:
    """A Hugging Face folder, the checkpoint converted from it, and the logits [T, V] of transformers in float32."""

    hf: Path
    megatron: Path
    logits: torch.Tensor


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Model]:
    """By name; all converted in this process, tied before untied."""
    from transformers import AutoModelForCausalLM

    made = {}
    for seed, (name, (make, settings)) in enumerate(MODELS.items()):
        folder = tmp_path_factory.mktemp("layouts")
        hf = make(folder / "hf", heads=8, layers=4, seed=seed, **settings)
        hf_to_megatron(hf, folder / "megatron")
        reference = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
        with torch.no_grad():
            made[name] = Model(hf, folder / "megatron", reference(torch.tensor([TOKENS])).logits[0])
    assert (made["many files"].hf / INDEX).exists()
    return made


# -- worlds of ranks ---------------------------------------------------------------------------------------------------


def worlds(waves: Sequence[Sequence[tuple[int, int, int, Any]]]) -> Iterator[tuple[Any, Any]]:
    """(case, layout) of this rank's world in each wave. A wave lists (tp, pp, dp, case); a world is as many ranks.

    Groups are taken down after each wave: hundreds of gloo groups would slow each other down.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state as mpu

    from remax_megatron.parallel import cpu_platform
    from remax_megatron.parallel.layout import init_model_parallel

    cpu_platform.prepare()
    rank, count, timeout = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), datetime.timedelta(seconds=120)
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=rank == 0)
    for i, wave in enumerate(waves):
        first = 0
        for tp, pp, dp, case in wave:
            size = tp * pp * dp
            if first <= rank < first + size:
                own = dist.PrefixStore(f"{i}-{first}", store)  # keys of an earlier world must not be found again
                dist.init_process_group("gloo", store=own, rank=rank - first, world_size=size, timeout=timeout)
                yield case, init_model_parallel(torch.device("cpu"), tp=tp, pp=pp, vpp=None, seed=1)
                dist.barrier()
                mpu.destroy_model_parallel()
                dist.destroy_process_group()
            first += size
        assert first == count, f"wave {i} has {first} ranks of {count}"
    store.set(f"done-{rank}", "")
    if rank == 0:  # the store lives in this process
        store.wait([f"done-{other}" for other in range(count)])


# -- Megatron loads what we wrote --------------------------------------------------------------------------------------


def build(hf: Path, layout, dtype: torch.dtype) -> torch.nn.Module:
    """This rank's part of the model, every parameter not a number until it is loaded."""
    from remax_megatron.model.dense import build_chunks, transformer_config
    from remax_megatron.model.layers import choose_layers
    from remax_megatron.model_facts import ModelFacts
    from remax_megatron.types import Recompute

    facts, layers = ModelFacts.from_folder(hf), choose_layers(LAYERS, layout.device, dtype)
    config = transformer_config(
        facts,
        layout,
        dtype=dtype,
        sequence_parallel=False,
        layers=layers,
        attention_backend="sdpa",
        recompute=Recompute(),
    )
    (chunk,) = build_chunks(facts, config, layout, layers, "sdpa")
    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.fill_(float("nan"))
    return chunk


@torch.no_grad()
def logits_of(chunk: torch.nn.Module, layout, vocab: int) -> torch.Tensor | None:
    """Logits [T, V] of TOKENS, through all stages of this replica; None before the last stage."""
    import torch.distributed as dist

    from remax_megatron.model.attention import packed_rows

    count = len(TOKENS)
    ends = torch.tensor([0, count], dtype=torch.int32)
    packed = packed_rows(
        [(count, [])], ends, count, shares_prompts=False, fused_rotation=chunk.config.apply_rope_fusion
    )
    stages = dist.get_process_group_ranks(layout.pp_group)
    if layout.pp_rank > 0:
        received = torch.empty(count, 1, chunk.config.hidden_size)
        dist.recv(received, stages[layout.pp_rank - 1])
        chunk.set_input_tensor(received)
    positions = torch.arange(count).unsqueeze(0)
    hidden_T1H = chunk(torch.tensor([TOKENS]), positions, attention_mask=None, packed_seq_params=packed)
    if not layout.is_last_stage:
        dist.send(hidden_T1H.contiguous(), stages[layout.pp_rank + 1])
        return None
    shard_TV = hidden_T1H.squeeze(1) @ chunk.head_weight().T
    parts = [torch.empty_like(shard_TV) for _ in range(layout.tp)]
    dist.all_gather(parts, shard_TV.contiguous(), group=layout.tp_group)
    return torch.cat(parts, dim=-1)[:, :vocab]


BOTH = ("tied", "untied", "qwen3 tied", "yarn", "qwen3 untied")
BACK = BOTH[::-1]  # the other order in the same process
ALL = (*BOTH, "many files")
LOADS = [  # waves of (tp, pp, dp, models in the order of loading), 32 ranks each
    [(8, 4, 1, BOTH)],
    [(8, 2, 1, BACK), (4, 4, 1, BOTH)],
    [(8, 1, 1, ALL), (4, 2, 1, BACK), (2, 4, 1, BOTH), (4, 1, 1, BACK), (2, 2, 1, ALL)],
    [(1, 4, 2, BACK), (1, 2, 4, BOTH), (2, 1, 4, BACK), (1, 1, 8, ALL)],
    [(1, 1, 32, ("tied",))],
]


def loading_worker(models: dict[str, Model]) -> list[tuple]:
    """(tp, pp, dp, data-parallel rank, model, largest logit difference) of what this rank speaks for."""
    from megatron.core import dist_checkpointing

    results = []
    for names, layout in worlds(LOADS):
        for name in names:
            model = models[name]
            chunk = build(model.hf, layout, torch.float32)
            state = {"model": chunk.sharded_state_dict()}
            loaded = dist_checkpointing.load(state, str(model.megatron / ITERATION_FOLDER))
            chunk.load_state_dict(loaded["model"], strict=True)
            logits = logits_of(chunk, layout, model.logits.shape[1])
            if layout.reports_for_replica:
                difference = (logits - model.logits).abs().max().item()
                results.append((layout.tp, layout.pp, layout.dp, layout.dp_rank, name, difference))
    return results


def test_megatron_loads_it_at_every_layout_and_computes_the_same_logits(models):
    every_world = [world for wave in LOADS for world in wave]
    assert {(tp, pp) for tp, pp, *_ in every_world} == {(tp, pp) for tp in (1, 2, 4, 8) for pp in (1, 2, 4)}
    ranks = run_ranks("tests.convert.test_layouts:loading_worker", 32, models, preload=PRELOAD)
    found = [result for results in ranks for result in results]
    assert sorted(case for *case, _ in found) == sorted(
        [tp, pp, dp, rank, name] for tp, pp, dp, names in every_world for rank in range(dp) for name in names
    )
    assert [result for result in found if not result[-1] <= 1e-4] == []


# -- we take what Megatron saved ---------------------------------------------------------------------------------------

HOMOGENEOUS, BY_LAYER = None, {"non_homogeneous_layers": True}  # metadata of sharded_state_dict
SAVES = [  # waves of (tp, pp, dp, (model, dtype, metadata)), 8 ranks each
    [(2, 2, 1, ("tied", torch.float32, HOMOGENEOUS)), (4, 1, 1, ("tied", torch.float32, HOMOGENEOUS))],
    [(8, 1, 1, ("tied", torch.float32, HOMOGENEOUS))],  # more ranks than KV heads, and 948 rows of padding
    [(2, 2, 1, ("untied", torch.bfloat16, BY_LAYER)), (4, 1, 1, ("many files", torch.float32, BY_LAYER))],
    [(2, 2, 2, ("untied", torch.bfloat16, HOMOGENEOUS))],
    [(2, 2, 1, ("qwen3 untied", torch.float32, HOMOGENEOUS)), (4, 1, 1, ("qwen3 tied", torch.float32, BY_LAYER))],
]


def case_name(model: str, tp: int, pp: int, metadata: dict | None) -> str:
    return f"{model}-tp{tp}-pp{pp}{'-by-layer' if metadata else ''}"


CASES = {case_name(name, tp, pp, more): name for wave in SAVES for tp, pp, _, (name, _, more) in wave}


def saving_worker(payload: tuple[dict[str, Model], Path]) -> list[str]:
    """Megatron saves the models of SAVES; returns the parameters in which our two ways to load them differ."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    from remax_megatron.model.live_weights import load_weights
    from remax_megatron.model_facts import ModelFacts

    models, folder = payload
    different = []
    for (name, dtype, metadata), layout in worlds(SAVES):
        model = models[name]
        facts = ModelFacts.from_folder(model.hf)
        chunk, other = build(model.hf, layout, dtype), build(model.hf, layout, dtype)
        load_weights([chunk], str(model.hf), facts, layout)
        load_weights([other], str(model.megatron), facts, layout)
        pairs = zip(chunk.named_parameters(), other.parameters(), strict=True)
        different += [f"{name} {layout.tp}x{layout.pp}: {key}" for (key, a), b in pairs if not torch.equal(a, b)]
        checkpoint = folder / case_name(name, layout.tp, layout.pp, metadata) / "iter_0000003"
        if layout.rank == 0:
            checkpoint.mkdir(parents=True)
        dist.barrier()
        state = {"model": chunk.sharded_state_dict(metadata=metadata), "iteration": 3}
        dist_checkpointing.save(state, str(checkpoint))
    return different


@pytest.fixture(scope="module")
def saved(models, tmp_path_factory) -> tuple[Path, list[list[str]]]:
    """The folder with what Megatron saved for each of CASES, and what the ranks returned."""
    folder = tmp_path_factory.mktemp("saved")
    different = run_ranks("tests.convert.test_layouts:saving_worker", 8, (models, folder), preload=PRELOAD)
    for case, name in CASES.items():
        (folder / case / TRACKER).write_text("3")
        shutil.copy(models[name].hf / "config.json", folder / case)
    return folder, different


def bits(folder: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    weights = HfWeights(folder)
    tensors = {name: weights.get(name) for name in weights.names}
    return {
        name: (tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes())
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("case", CASES)
def test_what_megatron_saved_becomes_the_original_bytes(saved, models, case, tmp_path):
    megatron_to_hf(saved[0] / case, tmp_path / "hf")
    assert bits(tmp_path / "hf") == bits(models[CASES[case]].hf)


def test_the_trainer_loads_the_same_parameters_from_either_folder(saved):
    assert saved[1] == [[]] * 8


# -- one process, both orders ------------------------------------------------------------------------------------------


def test_tied_and_untied_do_not_disturb_each_other(models, tmp_path):
    def contents(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    for name in ("untied", "tied", "untied"):
        out = tmp_path / "out"
        hf_to_megatron(models[name].hf, out / "megatron")
        assert contents(out / "megatron") == contents(models[name].megatron)
        megatron_to_hf(out / "megatron", out / "hf")
        assert bits(out / "hf") == bits(models[name].hf)
        shutil.rmtree(out)
