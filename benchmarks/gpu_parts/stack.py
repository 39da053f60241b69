"""What runs here: versions, card, Transformer Engine, optimizer, attention backend."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform

import torch

from gpu_parts.part import Numbers, Part

PACKAGES = ("megatron-core", "vllm", "transformers", "triton", "flash-attn", "apex", "transformer-engine")


def run(part: Part) -> None:
    part.case("versions", _versions)
    part.case("device", lambda: _device(part))


def _versions() -> Numbers:
    found: Numbers = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _device(part: Part) -> Numbers:
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER

    from remax_megatron.model.attention import choose_backend

    device = part.layout().device
    dtype = torch.bfloat16 if part.device == "cuda" else torch.float32
    found: Numbers = {
        "transformer_engine": bool(HAVE_TE),
        "fused_adam": not USING_PYTORCH_OPTIMIZER,
        "attention_backend": choose_backend("auto", device, dtype),
    }
    if part.device == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {
            "card": card.name,
            "capability": f"{card.major}.{card.minor}",
            "memory_gib": card.total_memory / 2**30,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return found
