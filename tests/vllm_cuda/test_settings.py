"""What becomes of the engine's arguments in vLLM 0.24 on an H100, field by field; and that all of them exist there.

The real configuration of real arguments: only the platform is the stand-in's. No engine is built.
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.small_models import make_qwen2

WORLD_SIZE = 8
CASES = {  # tensor_model_parallel_size, dtype, further rollout settings
    "one GPU": (1, "bfloat16", {}),
    "TP 2": (2, "bfloat16", {}),
    "TP 8, float32": (8, "float32", {}),
    "eager, second runner": (2, "bfloat16", {"enforce_eager": True, "model_runner": "v2"}),
}


class Stop(Exception):
    """Ends vLLM's start where its configuration is known."""


class Recorder:
    """Takes the place of vllm.LLM: notes what the engine passes to it and to its methods."""

    made: dict = {}

    def __init__(self, **keywords):
        Recorder.made = keywords
        self.calls: list[tuple[str, tuple, dict]] = []
        self.llm_engine = SimpleNamespace(has_unfinished_requests=lambda: False)

    def __getattr__(self, name: str):
        def call(*args, **keywords):
            self.calls.append((name, args, keywords))
            return {"reset_prefix_cache": True, "enqueue": ["0-random"]}.get(name)

        return call


def worker(folder: str) -> dict:
    parameters = {name: list(inspect.signature(getattr(torch.cuda, name)).parameters) for name in ("memory_snapshot",)}
    from tests.stand_ins import vllm_cuda

    vllm_cuda.install(memory_bytes=80 * 2**30)
    import torch.distributed as dist
    import vllm
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from vllm import envs
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    os.environ |= {"WORLD_SIZE": str(WORLD_SIZE), "LOCAL_WORLD_SIZE": str(WORLD_SIZE)}
    dist.init_process_group("fake", rank=0, world_size=WORLD_SIZE, store=FakeStore())
    from remax_megatron.config.schema import RolloutConfig
    from remax_megatron.rollout.engine import CanaryPrompt, Engine
    from tests.rollout.test_bridge import Tokenizer

    real, found = vllm.LLM, {"torch": parameters}
    for name, (tp, dtype, settings) in CASES.items():
        vllm.LLM = Recorder
        engine = Engine(
            folder,
            Tokenizer(),
            RolloutConfig(tensor_model_parallel_size=tp, **settings),
            dtype=dtype,
            max_prompt_length=128,
            max_response_length=384,
            seed=1,
            device=torch.device("cuda", 0),
            tied_embeddings=True,
            stop_token_ids=[2],
        )
        engine.reload(())
        engine.sleep()
        engine.reload(())
        assert engine._run([[1, 2]], [engine._sampled(7, 0.8)]) == []
        with pytest.raises(ValueError, match="zip"):  # no answers from a recorder
            engine.score([CanaryPrompt((1, 2), 1)])
        vllm.LLM = real
        found[name] = fields(real, LLMEngine, Recorder.made)
        plain = {key: value for key, value in Recorder.made.items() if key != "compilation_config"}
        found[name]["fused without our word"] = fields(real, LLMEngine, plain)["fuse_allreduce_rms"]
        found[name]["keywords"] = Recorder.made.keys() - {field for field in EngineArgs.__dataclass_fields__}
        found[name]["calls"] = check_calls(engine._llm.calls, real)
        found[name]["environment"] = {key: os.environ.get(key) for key in ENVIRONMENT}
    found["unknown variables"] = set(ENVIRONMENT) - set(envs.environment_variables) - {"TRITON_F32_DEFAULT"}
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as SecondRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    for runner in (GPUModelRunner, SecondRunner):
        inspect.signature(runner.reload_weights).bind(None, weights_iterator=iter(()))
        inspect.signature(runner.get_model).bind(None)
    return found


ENVIRONMENT = (
    "VLLM_ENABLE_V1_MULTIPROCESSING",
    "VLLM_NO_USAGE_STATS",
    "VLLM_LOGGING_LEVEL",
    "VLLM_USE_V2_MODEL_RUNNER",
    "TRITON_F32_DEFAULT",
)


def check_calls(calls, llm) -> set[str]:
    """The methods that were called, all with arguments that the real ones take."""
    for name, args, keywords in calls:
        inspect.signature(getattr(llm, name)).bind(None, *args, **keywords)
        if name == "collective_rpc" and isinstance(args[0], str):
            from vllm.v1.worker.gpu_worker import Worker

            inspect.signature(getattr(Worker, args[0])).bind(None, *args[1:], **keywords.get("kwargs", {}))
    return {name for name, _, _ in calls}


def fields(llm, llm_engine, keywords: dict) -> dict:
    """The configuration that vLLM makes of the keywords of `vllm.LLM`."""
    from vllm.config import set_current_vllm_config
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.executor.abstract import Executor
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

    made: dict = {}

    def from_engine_args(engine_args, usage_context=None, enable_multiprocessing=False, **others):
        made.update(arguments=engine_args)
        raise Stop

    before, llm_engine.from_engine_args = llm_engine.from_engine_args, staticmethod(from_engine_args)
    try:
        llm(**keywords)
    except Stop:
        pass
    finally:
        llm_engine.from_engine_args = before
    config = made["arguments"].create_engine_config(UsageContext.LLM_CLASS)
    with set_current_vllm_config(config):
        sampler = TopKTopPSampler(config.model_config.logprobs_mode).forward.__name__
    model, parallel, scheduler = config.model_config, config.parallel_config, config.scheduler_config
    cache, compilation = config.cache_config, config.compilation_config
    sizes = compilation.cudagraph_capture_sizes or []
    return {
        "fuse_allreduce_rms": compilation.pass_config.fuse_allreduce_rms,
        "second runner": config.use_v2_model_runner,
        "optimization": config.optimization_level.value,
        "dtype": model.dtype,
        "seed": model.seed,
        "max_model_len": model.max_model_len,
        "logprobs_mode": model.logprobs_mode,
        "sampling defaults": model.get_diff_sampling_param(),
        "sleep": model.enable_sleep_mode,
        "no tokenizer": model.skip_tokenizer_init,
        "executor": Executor.get_class(config).__name__,
        "world": (parallel.world_size, parallel.tensor_parallel_size, parallel.pipeline_parallel_size),
        "async_scheduling": scheduler.async_scheduling,
        "chunked prefill": scheduler.enable_chunked_prefill,
        "batch": (scheduler.max_num_batched_tokens, scheduler.max_num_seqs),
        "scheduler": (scheduler.policy, scheduler.get_scheduler_cls().__name__),
        "cache": (cache.block_size, cache.enable_prefix_caching, cache.cache_dtype, cache.gpu_memory_utilization),
        "load_format": config.load_config.load_format,
        "compiled": (compilation.mode.name, compilation.backend),
        "graphs": (compilation.cudagraph_mode.name, len(sizes), max(sizes, default=0)),
        "sampler": sampler,
    }


@pytest.fixture(scope="module")
def found(gpu_ranks, tmp_path_factory) -> dict:
    folder: Path = make_qwen2(tmp_path_factory.mktemp("settings") / "model", tied=True, layers=1, heads=8, kv=2)
    return gpu_ranks("tests.vllm_cuda.test_settings:worker", 1, str(folder))[0]


@pytest.mark.parametrize("name", CASES)
def test_configuration(name, found):
    tp, dtype, settings = CASES[name]
    eager, got = settings.get("enforce_eager", False), dict(found[name])
    for key in ("keywords", "calls", "environment", "fused without our word"):
        got.pop(key)
    assert got == {
        "fuse_allreduce_rms": False,
        "second runner": settings.get("model_runner") == "v2",
        "optimization": 2,
        "dtype": getattr(torch, dtype),
        "seed": 1,
        "max_model_len": 512,
        "logprobs_mode": "processed_logprobs",
        "sampling defaults": {},
        "sleep": True,
        "no tokenizer": True,
        "executor": "ExecutorWithExternalLauncher",
        "world": (tp, tp, 1),
        "async_scheduling": True,
        "chunked prefill": True,
        "batch": (8192, 256),
        "scheduler": ("fcfs", "AsyncScheduler"),
        "cache": (16, True, "auto", 0.6),
        "load_format": "dummy",
        "compiled": ("NONE", "inductor") if eager else ("VLLM_COMPILE", "inductor"),
        "graphs": ("NONE", 0, 0) if eager else ("FULL_AND_PIECEWISE", 51, 512),
        "sampler": "forward_native",
    }


def test_fusion_would_turn_itself_on(found):
    """The reason for naming it: on an H100, compiled, TP 2 turns it on; another dtype or size may not."""
    assert found["TP 2"]["fused without our word"] is True
    assert found["one GPU"]["fused without our word"] is False


@pytest.mark.parametrize("name", CASES)
def test_everything_that_is_passed_exists(name, found):
    assert found[name]["keywords"] == set()
    assert found[name]["calls"] >= {"collective_rpc", "reset_prefix_cache", "sleep", "wake_up", "enqueue"}
    _, dtype, settings = CASES[name]
    environment = found[name]["environment"]
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert environment["VLLM_NO_USAGE_STATS"] == "1"
    assert environment["VLLM_USE_V2_MODEL_RUNNER"] == str(int(settings.get("model_runner") == "v2"))
    if dtype == "float32":
        assert environment["TRITON_F32_DEFAULT"] == "ieee"


def test_variables_and_functions_exist(found):
    assert found["unknown variables"] == set()
    assert "include_traces" in found["torch"]["memory_snapshot"]
