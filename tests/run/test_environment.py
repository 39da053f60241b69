"""Environment variables that the entry sets from the settings, and values of a user that it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from remax_megatron import environment
from remax_megatron.config.load import load_config
from remax_megatron.config.schema import Config, ConfigError
from tests import ROOT

MEGATRON = "actor_rollout_ref.actor.megatron"
CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"


def settings(*overrides: str, device: str = "cuda", tp: int = 2) -> Config:
    tensor_parallel = f"{MEGATRON}.tensor_model_parallel_size={tp}"
    bfloat16 = f"{MEGATRON}.dtype=bfloat16"
    return load_config("demo", [f"trainer.device={device}", tensor_parallel, bfloat16, *overrides]).config


@pytest.fixture(autouse=True)
def clean(monkeypatch) -> None:
    """None of the variables is set, and after the test all are as before."""
    for name in (*environment.QUIET, *environment.ATTENTION, CONNECTIONS):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores what the code under test sets
        monkeypatch.delenv(name)


def test_one_hardware_queue_with_tensor_parallelism_on_a_gpu_and_nothing_else_of_cuda():
    environment.set_up(settings())
    assert os.environ[CONNECTIONS] == "1" and os.environ["VLLM_NO_USAGE_STATS"] == "1"
    assert not os.environ.keys() & set(environment.ATTENTION)  # Megatron's to set


@pytest.mark.parametrize("case", [{"tp": 1}, {"device": "cpu"}])
def test_no_hardware_queue_is_asked_for_where_none_is_needed(case):
    environment.set_up(settings(**case))
    assert CONNECTIONS not in os.environ and os.environ["VLLM_LOGGING_LEVEL"] == "ERROR"


def test_caches_go_elsewhere_when_the_home_directory_cannot_be_written(monkeypatch, tmp_path):
    names = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TRITON_HOME")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    environment.set_up(settings())
    assert not os.environ.keys() & set(names)
    monkeypatch.setenv("HOME", "/proc/nowhere")
    monkeypatch.setenv("XDG_CACHE_HOME", "/mine")
    environment.set_up(settings())
    assert os.environ["XDG_CACHE_HOME"] == "/mine" and "remax-caches-" in os.environ["XDG_CONFIG_HOME"]


def test_a_users_own_value_stays(monkeypatch):
    monkeypatch.setenv(CONNECTIONS, "8")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    environment.set_up(settings())
    assert (os.environ[CONNECTIONS], os.environ["VLLM_LOGGING_LEVEL"]) == ("8", "DEBUG")


FUSED = [f"{MEGATRON}.attention_backend=transformer_engine"]
CASES = [  # settings, NVTE_FLASH_ATTN, NVTE_FUSED_ATTN, NVTE_UNFUSED_ATTN, whether they go together
    ([], None, None, None, True),
    ([], "0", "1", "0", True),  # auto may become Transformer Engine's attention, or not
    ([], "1", "1", "1", True),
    ([], None, "0", None, False),
    ([], "0", None, "1", False),
    (FUSED, "0", None, "0", True),
    (FUSED, "1", None, None, False),
    (FUSED, None, None, "1", False),
    ([f"{MEGATRON}.attention_backend=varlen"], None, None, "0", False),
    ([f"{MEGATRON}.dtype=float32"], "0", "1", "0", False),
]


@pytest.mark.parametrize(("overrides", "flash", "fused", "unfused", "fits"), CASES)
def test_values_that_contradict_the_attention_backend_are_refused(overrides, flash, fused, unfused, fits, monkeypatch):
    for name, value in zip(environment.ATTENTION, (flash, fused, unfused), strict=True):
        if value is not None:
            monkeypatch.setenv(name, value)
    if fits:
        environment.set_up(settings(*overrides))
        return
    with pytest.raises(ConfigError, match=r"NVTE_\w+=\d.* needs NVTE_FLASH_ATTN=\d.*; unset them"):
        environment.set_up(settings(*overrides))


@pytest.mark.parametrize(("backend", "expected"), [("fused", environment.FUSED), ("auto", environment.ANY)])
def test_megatron_sets_what_we_say_and_takes_nothing_else(backend, expected, monkeypatch):
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.transformer.enums import AttnBackend

    config = SimpleNamespace(attention_backend=AttnBackend[backend], flash_attention_version=None)
    LanguageModule._set_attention_backend(SimpleNamespace(config=config))
    assert {name: os.environ[name] for name in environment.ATTENTION} == expected
    monkeypatch.setenv("NVTE_UNFUSED_ATTN", "1" if backend == "fused" else "0")
    with pytest.raises(AssertionError, match="NVTE_UNFUSED_ATTN"):
        LanguageModule._set_attention_backend(SimpleNamespace(config=config))


@pytest.mark.e2e
@pytest.mark.parametrize("module", ["remax_megatron", "remax_megatron.doctor"])
def test_the_entry_and_the_doctor_end_with_2(module, demo_inputs):
    one_rank = ["trainer.n_gpus_per_node=1", f"{MEGATRON}.tensor_model_parallel_size=1"]
    command = [sys.executable, "-m", module, *one_rank, *demo_inputs]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "WORLD_SIZE"} | {"NVTE_FUSED_ATTN": "0"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "NVTE_FUSED_ATTN=0" in done.stdout + done.stderr and "unset them" in done.stdout + done.stderr
