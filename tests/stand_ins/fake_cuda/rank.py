"""One rank of the trainer on the fake device: the run's own parts, with an engine, rewards and weights that are stubs.

`play(job)` builds what `remax_megatron.build` builds, lets `job.act(rank)` use it, and reports what the device would
have had to do.
The weights are tensors of the right shapes; the engine agrees with everything; all replicas answer alike.
"""

from __future__ import annotations

import functools
import os
import tempfile
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import default_planner
from torch.utils._python_dispatch import _disable_current_modes

from remax_megatron import build
from remax_megatron.algorithm.aggregation import weigh_rows
from remax_megatron.checkpoint import saver
from remax_megatron.config.schema import Config, has_critic
from remax_megatron.data.dataset import PromptDataset
from remax_megatron.inputs import CriticInputs, Inputs
from remax_megatron.model import live_weights
from remax_megatron.model_facts import ModelFacts
from remax_megatron.parallel.layout import init_distributed
from remax_megatron.phases import PhaseTimer
from remax_megatron.policy import offload, training_state
from remax_megatron.policy.policy import Policy
from remax_megatron.policy.trained_model import TrainedModel
from remax_megatron.policy.training_state import TrainingState
from remax_megatron.rollout import collect
from remax_megatron.trainer import Trainer
from remax_megatron.types import Completion, Prompt, Rollout, Row
from remax_megatron.weights.hf_folder import expected_shapes
from tests.stand_ins.fake_cuda import kernels
from tests.stand_ins.fake_cuda.device import become_cuda
from tests.stand_ins.fake_cuda.processes import Job, Report
from tests.stand_ins.fake_cuda.recorder import Recorder


@dataclass
class Rank:
    """What `act` works with."""

    job: Job
    recorder: Recorder
    trainer: Trainer

    @property
    def policy(self) -> Policy:
        return self.trainer.learner.policy

    def rows(self, count: int) -> list[Row]:
        """`count` rows of the job's lengths with advantages of 1, weighed as one update."""
        rows = []
        for i in range(count):
            prompt, response = self.job.lengths[i % len(self.job.lengths)]
            ids = _tokens(prompt + response, i, self.job.facts)
            rows.append(Row(ids[:prompt], list(ids[prompt:]), [1.0] * response, [-1.0] * response))
        weigh_rows(rows, "token-mean")
        return rows

    def make_optimizer_state(self) -> None:
        """Adam's moments, which are otherwise made by the first step."""
        with self.recorder.phase("optimizer state"):
            critic = self.trainer.learner.critic
            for model in (self.policy, *([] if critic is None else [critic.critic])):
                for owned, _ in (state := TrainingState(model))._owned():
                    state._optimizer_state(owned)


def play(job: Job) -> Report:
    """Build the rank, act, report. In a process that is thrown away afterwards."""
    os.environ["TQDM_DISABLE"] = "1"
    recorder = become_cuda(job.rank, job.world_size)
    kernels.record_into(recorder)
    kernels.replace_attention()
    report = Report(job.rank, recorder.phases, recorder.collectives)
    with tempfile.TemporaryDirectory(prefix="remax-fake-cuda-") as folder:
        job.config.trainer.default_local_dir = folder
        job.config.trainer.stop_file = f"{folder}/stop"
        job.config.trainer.logger = []
        try:
            with recorder.phase("build"):
                trainer = _build(job, recorder)
            report.result = job.act(Rank(job, recorder, trainer))
        except Exception:  # noqa: BLE001  whatever it is, the parent shows it
            report.error = traceback.format_exc()
    return report


# -- building ----------------------------------------------------------------------------------------------------------


def _build(job: Job, recorder: Recorder) -> Trainer:
    config = job.config
    device = init_distributed("cuda", 600)
    dist.all_gather_object = functools.partial(_gather, dist.all_gather_object, config)
    live_weights.open_weights = lambda folder, facts: _Weights(facts)
    live_weights.open_critic = lambda folder, facts, prefix: _Weights(facts)
    _Engine.lengths = job.lengths
    build.Engine = _Engine
    build.Collector = _Collector
    build.reward_pool = lambda config, num_workers: None
    build.check_shared = lambda config: None
    build.side_files = lambda *args: {}
    build.model_folder = lambda folder: folder
    TrainedModel._step = _in_phase_of_its_own(recorder, TrainedModel._step)
    # Locked through CUDA's runtime, which knows addresses; fake memory has none.
    offload._page_locked_like = lambda tensor: torch.empty_like(tensor, device="cpu", pin_memory=True)
    # A checkpoint is written without its values, and planned as if all ranks had this one's blocks, which overlap.
    torch.save = lambda obj, file, **kwargs: file.write(b"values")
    default_planner._validate_global_plan = lambda plan, metadata: True
    saver.ThreadPoolExecutor = _InTurn
    # Row numbers are computed with, not only shaped.
    training_state.shard_runs = _without_modes(training_state.shard_runs)
    prompts = [
        Prompt(i, _tokens(job.lengths[0][0], i, job.facts), "fake", "") for i in range(config.data.train_batch_size)
    ]
    critic = CriticInputs("fake", job.facts.as_critic()) if has_critic(config) else None
    inputs = Inputs("fake", None, [], PromptDataset(prompts, len(prompts)), None, critic)
    timer = PhaseTimer(around=(recorder.phase,))
    return build.build_trainer(build.Start(config, job.facts, inputs, "", None, device, timer))


def _in_phase_of_its_own(recorder: Recorder, step: Callable) -> Callable:
    @functools.wraps(step)
    def call(*args: Any) -> Any:
        with recorder.phase(recorder.phase_name.replace("update", "optimizer")):
            return step(*args)

    return call


def _without_modes(function: Callable) -> Callable:
    def call(*args: Any) -> Any:
        with _disable_current_modes():
            return function(*args)

    return call


def _gather(real: Callable, config: Config, parts: list, mine: Any, group: Any = None) -> None:
    """All ranks send what this one sends, but lists (answers) come from the first rank of a replica only."""
    real(parts, mine, group)
    if isinstance(mine, list):
        size = config.actor_rollout_ref.rollout.tensor_model_parallel_size
        parts[:] = [part if rank % size == 0 else [] for rank, part in enumerate(parts)]


class _InTurn:
    """A thread pool that does its work at once: a fake tensor's device is not sound in a second thread."""

    def __init__(self, **kwargs: Any): ...

    def submit(self, act: Callable[[], Any]) -> Future:
        future: Future = Future()
        future.set_result(act())
        return future


class _Weights:
    """A model folder by its shapes alone."""

    def __init__(self, facts: ModelFacts):
        self._shapes = expected_shapes(facts)

    def get(self, name: str) -> torch.Tensor:
        return torch.empty(self._shapes[name], dtype=torch.bfloat16, device="cpu")


# -- the engine --------------------------------------------------------------------------------------------------------


class _Engine:
    """vLLM's place: takes every weight, answers with the job's lengths, and always agrees with the policy."""

    lengths: Sequence[tuple[int, int]] = ((16, 16),)
    leads_replica, tokenizer, asleep_bytes, pause_s = True, None, None, None

    def __init__(self, model_folder: str, tokenizer: Any, config: Any, **kwargs: Any):
        self.num_samples, self.greedy = config.n, kwargs["greedy"]
        self.replica = dist.get_rank() // config.tensor_model_parallel_size
        self.num_replicas = dist.get_world_size() // config.tensor_model_parallel_size
        self.weight_version = 0

    def reload(self, stream: Any) -> None:
        for name, tensor in stream:
            assert tensor.device.type == "cuda" and tensor.is_contiguous(), name
        self.weight_version += 1

    def score(self, canaries: Sequence[Any]) -> list:
        mine = [([1.0] * (len(c.token_ids) - 1), [5] * c.num_generated, [1.0] * c.num_generated) for c in canaries]
        replicas: list = [None] * dist.get_world_size()
        dist.all_gather_object(replicas, mine)
        return [scored for scored in replicas if scored]

    @property
    def num_answers(self) -> int:
        return self.num_samples + self.greedy

    def rollout(self, prompts: Sequence[Prompt], *, step: int, listener: Any) -> list[Rollout]:
        return [
            Rollout(
                prompt,
                [self._answer(i * self.num_samples + k) for k in range(self.num_samples)],
                self._answer(i, 0.0) if self.greedy else None,
            )
            for i, prompt in enumerate(prompts)
        ]

    def _answer(self, i: int, reward: float = 1.0) -> Completion:
        length = self.lengths[i % len(self.lengths)][1]
        return Completion([5] * length, [1.0] * length, True, self.weight_version, reward=reward)

    def unmapped_bytes(self) -> int:
        return 0

    def sleep(self) -> None: ...
    def close(self) -> None: ...


class _Collector(collect.Collector):
    """The real one, with answers that come with their rewards."""

    def _scoring(self, num_answers: int) -> None: ...


def _tokens(count: int, seed: int, facts: ModelFacts) -> tuple[int, ...]:
    return tuple((seed + i) % (facts.vocab_size - 2) + 1 for i in range(count))
