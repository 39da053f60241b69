"""Environment variables that libraries read when they are imported or when CUDA starts. Imports no torch.

The entry calls `set_up` with the checked settings, before torch is imported. Nothing here has to be set by the user,
and a user's own value stays, except where it contradicts the settings.

How Transformer Engine attends is not set here. Megatron sets NVTE_FLASH_ATTN, NVTE_FUSED_ATTN and NVTE_UNFUSED_ATTN
when it builds a model, from the attention backend in its own config, and asserts that no other value stands there
(megatron-core 0.16.1 and 0.19.2, `LanguageModule._set_attention_backend`). For Transformer Engine's attention they come
to `FUSED`: where its kernel cannot serve it raises, and does not fall back to the slow path in silence. For all others
they come to `ANY`, because no attention of Transformer Engine is called then.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from remax_megatron.config.schema import Config, ConfigError, expects_cpu

QUIET = {
    "VLLM_LOGGING_LEVEL": "ERROR",  # what libraries say at every start about parts that this stack leaves out
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",  # else a thread reports each engine to vLLM's makers
}
ATTENTION = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
FUSED, ANY = dict(zip(ATTENTION, "010", strict=True)), dict(zip(ATTENTION, "111", strict=True))
BACKEND = "actor_rollout_ref.actor.megatron.attention_backend"


def set_up(config: Config) -> None:
    """Set what is not set yet. ConfigError as `check_attention`."""
    check_attention(config)
    for name, value in (QUIET | for_cuda(config) | for_caches()).items():
        os.environ.setdefault(name, value)


def for_caches() -> dict[str, str]:
    """Where libraries may keep what they would put into the home directory, when that cannot be written."""
    if os.access(Path("~").expanduser(), os.W_OK):
        return {}
    folder = Path(tempfile.gettempdir()) / f"remax-caches-{os.getuid()}"
    names = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TRITON_HOME")
    return {name: str(folder / name.lower()) for name in names}


def for_cuda(config: Config) -> dict[str, str]:
    """What CUDA has to find when it starts.

    With tensor parallelism Megatron overlaps a layer's communication with its kernels by the order in which they are
    launched, and one hardware queue keeps that order (megatron-core 0.19.2, tensor_parallel/layers.py). From Blackwell
    on it does not matter.
    """
    tensor_parallel = config.actor_rollout_ref.actor.megatron.tensor_model_parallel_size > 1
    return {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if tensor_parallel and not expects_cpu(config) else {}


def check_attention(config: Config) -> None:
    """ConfigError for a variable of ATTENTION whose value no attention that the settings allow goes with."""
    megatron = config.actor_rollout_ref.actor.megatron
    fused = megatron.attention_backend in ("auto", "transformer_engine") and megatron.dtype == "bfloat16"
    allowed = [FUSED] if fused and not expects_cpu(config) else []
    allowed += [ANY] if megatron.attention_backend != "transformer_engine" or not allowed else []
    given = {name: os.environ[name] for name in ATTENTION if name in os.environ}
    if not any(given.items() <= values.items() for values in allowed):
        found = ", ".join(f"{name}={value}" for name, value in given.items())
        wanted = " or ".join(", ".join(f"{name}={value}" for name, value in values.items()) for values in allowed)
        raise ConfigError(
            f"the environment has {found}, and {BACKEND}={megatron.attention_backend} needs {wanted}; unset them: "
            f"they follow from {BACKEND}"
        )
