"""Rules about the device, its memory, the loggers that are installed, and what the run reads and writes."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping

from remax_megatron.config.rules.registry import Setup, rule
from remax_megatron.config.schema import LOGGERS, MEGATRON, RECOMPUTE_MODULES, ConfigError, as_list, recompute_of

RECOMPUTE_NEEDS = {"recompute_method": "full", "recompute_num_layers": "full", "recompute_modules": "selective"}


@rule
def loggers_are_known(setup: Setup) -> None:
    """Loggers have known names, and their packages are installed."""
    for name in as_list(setup.config.trainer.logger):
        if name not in LOGGERS:
            raise ConfigError(f"trainer.logger names {name!r}; set it to a list of {', '.join(LOGGERS)}")
        if name != "console" and importlib.util.find_spec(name) is None:
            raise ConfigError(f"trainer.logger names {name!r}, which is not installed: pip install {name}")


@rule
def backend_exists_on_device(setup: Setup) -> None:
    """An attention backend that needs a GPU is refused on a CPU."""
    backend = setup.megatron.attention_backend
    if setup.config.trainer.device == "cpu" and backend in ("transformer_engine", "varlen"):
        raise ConfigError(
            f"{MEGATRON}.attention_backend={backend} needs a GPU, but trainer.device=cpu;"
            f" set {MEGATRON}.attention_backend=auto"
        )


@rule
def recompute_settings_go_together(setup: Setup) -> None:
    """Settings of one granularity of recompute are refused with another one."""
    chosen, key = setup.megatron.override_transformer_config, f"{MEGATRON}.override_transformer_config"
    granularity = recompute_of(setup.config).granularity
    for name, needed in RECOMPUTE_NEEDS.items():
        value = getattr(chosen, name)
        if value is not None and granularity != needed:
            raise ConfigError(
                f"{key}.{name}={value} goes with recompute_granularity={needed}, which is {granularity} here; set"
                f" {key}.recompute_granularity={needed}, or {name}=null"
            )
    modules = chosen.recompute_modules
    known = isinstance(modules, list) and modules and set(modules) <= set(RECOMPUTE_MODULES)
    if modules is not None and not known:
        raise ConfigError(
            f"{key}.recompute_modules={modules} is not a list of {', '.join(RECOMPUTE_MODULES)}; set"
            f" {key}.recompute_modules=[mlp]"
        )


@rule
def overlaps_have_their_parts(setup: Setup) -> None:
    """The overlapped gather needs the distributed optimizer and the overlapped reduce."""
    megatron = setup.megatron
    if not megatron.overlap_param_gather:
        return
    for name in ("use_distributed_optimizer", "overlap_grad_reduce"):
        if getattr(megatron, name) is False:
            raise ConfigError(
                f"{MEGATRON}.overlap_param_gather=True needs {MEGATRON}.{name}=True; set it so, or"
                f" overlap_param_gather=null"
            )


@rule
def profiled_steps_are_counted_from_one(setup: Setup) -> None:
    """Steps to be profiled are whole numbers from 1 on."""
    steps = as_list(setup.config.trainer.profile_steps)
    if not all(isinstance(step, int) and not isinstance(step, bool) and step >= 1 for step in steps):
        raise ConfigError(
            f"trainer.profile_steps={setup.config.trainer.profile_steps} must name steps, which are counted from 1; set"
            " it to a list such as [3,4], or null for none"
        )


@rule
def segments_can_sleep(setup: Setup) -> None:
    """On a GPU the environment must not ask for expandable segments."""
    if not setup.on_cpu:
        refuse_expandable_segments(os.environ)


def refuse_expandable_segments(environment: Mapping[str, str]) -> None:
    """ConfigError when torch is told to use expandable segments on a GPU.

    vLLM's sleeping engine keeps its memory in a pool that cannot have them (pytorch issue 147851). vLLM 0.24 switches
    them off around that pool, but reads one of torch's two variables only.
    """
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        value = environment.get(name, "")
        if "expandable_segments:true" in value.lower().replace(" ", ""):
            raise ConfigError(
                f"{name}={value}: expandable segments do not go with an engine that sleeps while the policy trains;"
                f" take expandable_segments out of {name}"
            )


@rule
def output_folder_is_named(setup: Setup) -> None:
    """A run needs a folder to write to."""
    if not setup.config.trainer.default_local_dir:
        raise ConfigError(
            "trainer.default_local_dir is empty; set it to the folder for metrics, settings and the model"
        )


@rule
def validation_has_data(setup: Setup) -> None:
    """Validation at intervals, and validation alone, need validation data."""
    config = setup.config
    if as_list(config.data.val_files):
        return
    if config.trainer.val_only:
        raise ConfigError(
            "trainer.val_only=True asks for validation, but data.val_files is not set; set data.val_files"
        )
    if config.trainer.test_freq > 0:
        raise ConfigError(
            f"trainer.test_freq={config.trainer.test_freq} asks for validation, but data.val_files is not set;"
            " set data.val_files, or trainer.test_freq=-1"
        )
