"""How vLLM is asked to sample: training from the whole distribution, validation as `val_kwargs` says."""

from __future__ import annotations

import pytest

from remax_megatron.config.schema import RolloutConfig, ValKwargs
from remax_megatron.rollout.engine import Engine
from remax_megatron.types import Completion, Prompt

PROMPTS = [Prompt(index, [5, 6], "", "", {}) for index in range(2)]


@pytest.fixture
def asked(monkeypatch):
    """Returns what `work` asks of vLLM, one SamplingParams per answer, with `val_kwargs` for validation."""

    def ask(val_kwargs: ValKwargs, work) -> list:
        requested = []

        def generate(requests, parameters, listener):
            requested.extend(parameters)
            return [Completion([1], [0.0], True, 0, "") for _ in requests]

        engine = object.__new__(Engine)  # all but the engine in it
        engine.config, engine.seed, engine.max_response_length = RolloutConfig(n=2, val_kwargs=val_kwargs), 3, 8
        engine._stop, engine._with_greedy, engine._generate = [1], True, generate
        engine._reset_prefix_cache = lambda: None
        work(engine)
        return requested

    return ask


def settings_of(parameters) -> tuple[float, float, int]:
    return parameters.temperature, parameters.top_p, parameters.top_k


def test_top_p_and_top_k_of_validation_reach_vllm_and_not_the_rollouts(asked):
    val = ValKwargs(n=2, do_sample=True, temperature=0.6, top_p=0.7, top_k=20)
    validation = asked(val, lambda engine: engine.validation(PROMPTS))
    assert [settings_of(parameters) for parameters in validation] == [(0.6, 0.7, 20)] * 4
    rollouts = asked(val, lambda engine: engine.rollout(PROMPTS, step=1))
    greedy, *samples = rollouts[:3]
    assert greedy.temperature == 0.0 and {settings_of(parameters)[:2] for parameters in samples} == {(1.0, 1.0)}
    assert {parameters.top_k for parameters in rollouts} <= {-1, 0}  # no limit


@pytest.mark.parametrize("top_k", [-1, 0])
def test_no_limits_by_default(asked, top_k):
    validation = asked(ValKwargs(do_sample=True, top_k=top_k), lambda engine: engine.validation(PROMPTS))
    assert {parameters.top_p for parameters in validation} == {1.0}
    assert {parameters.top_k for parameters in validation} <= {-1, 0}


def test_greedy_validation_has_no_limits(asked):
    (first, _) = asked(ValKwargs(top_p=0.5, top_k=3), lambda engine: engine.validation(PROMPTS))
    assert settings_of(first)[:2] == (0.0, 1.0)
