"""The engine, unmodified, on vLLM's GPU worker: sync, canary, rollout, sleep, and again; and what must be caught.

The policy is the real one, in float32 on the CPU, and the weights go through its stream. Each scenario is a process of
its own (two under tensor parallelism), because the stand-in patches torch.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from unittest import mock

import pytest
import torch

from tests.small_models import make_qwen2

pytestmark = pytest.mark.timeout(900)
LENGTH = 6  # tokens of an answer


@dataclass(frozen=True)
class Scenario:
    tied: bool
    dtype: str
    vllm_tp: int = 1
    settings: dict = field(default_factory=dict)


SCENARIOS = {
    "tied, bfloat16, prompts in chunks": Scenario(
        True, "bfloat16", settings={"max_num_batched_tokens": 32, "max_num_seqs": 16}
    ),
    "untied, float32": Scenario(False, "float32"),
    "untied, float32, TP 2, prompts in chunks": Scenario(
        False, "float32", vllm_tp=2, settings={"max_num_batched_tokens": 32, "max_num_seqs": 16}
    ),
    "tied, bfloat16, TP 2": Scenario(True, "bfloat16", vllm_tp=2),
    "tied, bfloat16, second runner": Scenario(True, "bfloat16", settings={"model_runner": "v2"}),
}


class Overwriting:
    """A weight stream with one buffer, in which each tensor takes the place of the one before."""

    def __init__(self, stream):
        self.stream, self.num_bytes = stream, stream.num_bytes

    def __iter__(self):
        buffer = None
        for name, tensor in self.stream:
            if buffer is None:  # the embedding, the largest, comes first
                buffer = torch.empty(tensor.numel(), dtype=tensor.dtype)
            view = buffer[: tensor.numel()].view(tensor.shape)
            view.copy_(tensor)
            yield name, view


class Watched:
    """The stream as it is; afterwards `alive` counts the storages of which something is still held."""

    def __init__(self, stream):
        self.stream, self.num_bytes = stream, stream.num_bytes
        self.storages: list[weakref.ref] = []

    def __iter__(self):
        for name, tensor in self.stream:
            self.storages.append(weakref.ref(tensor.untyped_storage()))
            yield name, tensor

    @property
    def alive(self) -> int:
        return sum(storage() is not None for storage in self.storages)


class Lacking:
    """A stream without one tensor of a merged parameter."""

    def __init__(self, stream):
        self.stream, self.num_bytes = stream, stream.num_bytes

    def __iter__(self):
        return (item for item in self.stream if item[0] != "model.layers.1.self_attn.k_proj.bias")


def worker(payload) -> dict:
    import random

    import numpy as np

    from remax_megatron.parallel.layout import init_distributed
    from remax_megatron.rollout.bridge import Bridge, CanaryError
    from tests.rollout.test_bridge import Corrupting, build_engine, build_policy, tokens_of
    from tests.stand_ins import vllm_cuda
    from tests.stand_ins.vllm_cuda.kernels import CALLS

    folder, scenario = payload
    policy = build_policy(folder, init_distributed("cpu", 300))
    logprobs, current_device = policy.logprobs, torch.cuda.current_device  # the latter is the CPU: cpu_platform.py
    vllm_cuda.install()

    def on_cpu(rows, temperature):
        with mock.patch.object(torch.cuda, "current_device", current_device):
            return logprobs(rows, temperature=temperature)

    policy.logprobs = on_cpu
    import vllm  # noqa: F401

    vllm_cuda.connect()
    settings = {"max_num_seqs": 32, "max_num_batched_tokens": 512} | scenario.settings
    said: dict = {}
    with vllm_cuda.running():
        random.seed(5)
        draws = [(random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())]
        engine, prompts = build_engine(
            folder,
            torch.device("cuda", 0),
            vllm_tp=scenario.vllm_tp,
            dtype=scenario.dtype,
            max_response_length=LENGTH,
            enforce_eager=True,
            gpu_memory_utilization=0.3,
            **settings,
        )
        draws.append((random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()))
        said["generators are ours"] = draws[0] == draws[1]
        prompts = prompts[:2]  # Triton's interpreter takes seconds for each
        bridge = Bridge(policy, engine, prompts, dtype=scenario.dtype, bucket_bytes=2**15, threshold=None)
        model = engine._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.get_model()
        stream = bridge._stream

        def sync(through=stream) -> str:
            bridge._stream = through
            try:
                report = bridge.sync()
            except (CanaryError, RuntimeError) as error:
                return f"{type(error).__name__}: {error}"
            finally:
                bridge._stream = stream
            said.setdefault("reports", []).append(report)
            return "passed"

        addresses = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
        watched = Watched(stream)
        said["first"] = sync(watched)
        said["held after the first"] = watched.alive
        rollouts = engine.rollout(prompts, step=1)
        said["tokens"] = tokens_of([r.completions for r in rollouts])
        said["backwards"] = tokens_of([r.completions for r in engine.rollout(prompts[::-1], step=1)][::-1])
        said["mismatch"] = mismatch(policy, rollouts)
        vllm_cuda.GPU.events.clear()
        engine.sleep()
        said["asleep bytes"], said["device bytes asleep"] = engine.asleep_bytes, vllm_cuda.GPU.used_bytes
        said["thrown away"] = all(parameter.isnan().all().item() for parameter in model.parameters())
        reset, score = engine._llm.reset_prefix_cache, engine.score
        engine._llm.reset_prefix_cache = lambda: vllm_cuda.GPU.events.append("reset the prefix cache") or reset()
        engine.score = lambda canaries: vllm_cuda.GPU.events.append("score") or score(canaries)
        said["after sleep"] = sync(Reporting(stream, vllm_cuda.GPU.events))
        engine._llm.reset_prefix_cache, engine.score = reset, score
        said["events"] = [event for event in vllm_cuda.GPU.events if event != "empty_cache"]
        said["same addresses"] = addresses == {name: p.data_ptr() for name, p in model.named_parameters()}
        said["tokens after sleep"] = tokens_of([r.completions for r in engine.rollout(prompts, step=1)])
        if scenario.vllm_tp == 1:
            said["largest difference"] = largest_difference(model, policy, scenario.dtype)
        for name, faulty in (
            ("overwritten", Overwriting(stream)),
            ("one percent", Corrupting(stream, "model.layers.1.mlp.up_proj.weight")),
            ("lacking", Lacking(stream)),
        ):
            said[name] = sync(faulty)
        said["last"] = sync()
        engine.close()
    said["kernels"] = dict(CALLS)
    said["runner"] = type(
        engine._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    ).__module__
    return said


class Reporting:
    """The stream, which says in `events` when it begins and ends."""

    def __init__(self, stream, events: list[str]):
        self.stream, self.num_bytes, self.events = stream, stream.num_bytes, events

    def __iter__(self):
        self.events.append("weights begin")
        yield from self.stream
        self.events.append("weights end")


def mismatch(policy, rollouts) -> float:
    """Mean |engine - policy| over the sampled tokens, nats; the policy divides by the same temperature."""
    from remax_megatron.types import Row

    samples = [(r.prompt.token_ids, s) for r in rollouts for s in r.samples]
    rows = [Row(prompt, s.token_ids, [0.0] * len(s.token_ids), s.logprobs) for prompt, s in samples]
    ours = policy.logprobs(rows, temperature=0.8)
    pairs = [pair for mine, (_, s) in zip(ours, samples, strict=True) for pair in zip(mine, s.logprobs, strict=True)]
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


def largest_difference(model, policy, dtype: str) -> float:
    """Between the engine's parameters and the policy's weights in its dtype, part by part of merged ones."""
    parameters = dict(model.named_parameters())
    merged = {part: whole for whole, parts in model.packed_modules_mapping.items() for part in parts}
    filled: dict[str, int] = {}  # rows
    worst = 0.0
    for name, tensor in policy.weight_stream(getattr(torch, dtype), 2**20):
        part = next((part for part in merged if f".{part}." in name), None)
        target = name.replace(part, merged[part]) if part else name
        begin = filled.get(target, 0) if part else 0
        filled[target] = begin + len(tensor)
        mine = parameters[target][begin : begin + len(tensor)].cpu()
        worst = max(worst, (mine.float() - tensor.float()).abs().max().item())
    assert filled.keys() == parameters.keys()
    return worst


@pytest.fixture(scope="module")
def results(gpu_ranks, tmp_path_factory):
    """`results(name)`: what each rank of a scenario said, run once."""
    known: dict[str, list[dict]] = {}
    folders: dict[tuple[bool, str], str] = {}

    def run(name: str) -> list[dict]:
        scenario = SCENARIOS[name]
        model = scenario.tied, scenario.dtype
        if model not in folders:  # weights that the engine's dtype has exactly
            folder, dtype = tmp_path_factory.mktemp("life") / "model", getattr(torch, scenario.dtype)
            folders[model] = str(make_qwen2(folder, tied=scenario.tied, layers=2, std=0.1, dtype=dtype))
        if name not in known:
            payload = (folders[model], scenario)
            known[name] = gpu_ranks("tests.vllm_cuda.test_life_cycle:worker", scenario.vllm_tp, payload)
        return known[name]

    return run


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_life_cycle(name, results):
    scenario = SCENARIOS[name]
    limit = {"float32": 1e-5, "bfloat16": 2e-2}[scenario.dtype]
    for said in results(name):
        for sync in ("first", "after sleep", "last"):
            assert said[sync] == "passed", (sync, said[sync])
        assert all(report.canary_mean <= limit for report in said["reports"])
        assert said["mismatch"] <= limit
        assert said["generators are ours"]
        assert said["held after the first"] == 0
        assert said["thrown away"]
        assert said["same addresses"]
        assert said.get("largest difference", 0.0) == 0.0
        assert all(0 < len(answer) <= LENGTH for group in said["tokens"] for answer in group)
        assert said["tokens"] == said["backwards"] == said["tokens after sleep"] == results(name)[0]["tokens"]
        attention = "flash_attention 3" if scenario.dtype == "bfloat16" else None  # float32: Triton's kernel
        assert {kernel for kernel in said["kernels"] if "flash" in kernel and "cache" not in kernel} == (
            {attention} if attention else set()
        )
        second = scenario.settings.get("model_runner") == "v2"
        assert said["runner"] == ("vllm.v1.worker.gpu.model_runner" if second else "vllm.v1.worker.gpu_model_runner")


@pytest.mark.parametrize("name", SCENARIOS)
def test_order_of_a_cycle(name, results):
    for said in results(name):
        order = [event for event in said["events"] if event != "synchronize"]
        assert order == [
            "sleep, kept: []",  # level 2: nothing is copied to the host
            "wake ['weights']",
            "weights begin",
            "weights end",
            "wake ['kv_cache']",
            "reset the prefix cache",
            "score",
        ]
        assert said["events"][0] == "synchronize"  # before memory is unmapped
        assert said["asleep bytes"] is not None and 0 <= said["asleep bytes"] <= said["device bytes asleep"]
        assert said["reports"][0].engine_asleep_bytes is None
        assert all(report.engine_asleep_bytes is not None for report in said["reports"][1:])


@pytest.mark.parametrize("name", SCENARIOS)
def test_what_must_be_caught(name, results):
    for said in results(name):
        assert said["overwritten"].startswith("CanaryError"), said["overwritten"]
        if SCENARIOS[name].dtype == "float32":  # bfloat16 leaves room for rounding, which one percent of a tensor fits
            assert said["one percent"].startswith("CanaryError"), said["one percent"]
        assert said["lacking"] == (
            "RuntimeError: no weights were sent for 1 of the engine's parameters: "
            "['model.layers.1.self_attn.k_proj.bias']"
        )


def test_tensor_parallelism_and_chunks_change_no_token(results):
    whole, cut = results("untied, float32"), results("untied, float32, TP 2, prompts in chunks")
    assert whole[0]["tokens"] == cut[0]["tokens"]
