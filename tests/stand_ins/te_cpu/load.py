"""`install()`: Transformer Engine's Python files from the folder .te, its compiled half from `compiled`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
import warnings
from pathlib import Path
from unittest import mock

WHEEL = Path(__file__).resolve().parents[3] / ".te"
WRITTEN_FOR = "2.19."
# Imported by parts of Transformer Engine that a dense model does not use, and missing from the CPU lock.
_UNUSED = ("triton", "triton.language", "triton.language.core", "triton.language.standard", "onnx", "onnxscript")


def install() -> None:
    """Make `transformer_engine.pytorch` importable and usable without CUDA. Idempotent.

    Call it in every process before Megatron is imported, which looks for Transformer Engine once. The wheel stays out
    of site-packages, because found there without this call it is a RuntimeError for whoever imports Megatron.
    """
    import torch
    import torch._dynamo  # looks for onnx itself: before that is replaced
    from torch.utils._triton import has_triton_package

    from tests.stand_ins.te_cpu import compiled, cuda

    if sys.modules.get("transformer_engine_torch") is compiled:
        return
    assert not torch.cuda.is_available(), "there is CUDA here: use Transformer Engine itself"
    assert "megatron.core" not in sys.modules, "Megatron was imported before: it has missed Transformer Engine"
    assert WHEEL.is_dir(), f"{WHEEL} is missing: `make test-te` puts Transformer Engine's Python files there"
    sys.path.append(str(WHEEL))
    found = importlib.metadata.version("transformer-engine")
    assert found.startswith(WRITTEN_FOR), f"the stand-in was written for {WRITTEN_FOR}x; {WHEEL} holds {found}"

    # As in a build of Transformer Engine itself: its libraries (cuDNN, NVRTC, its own) are not loaded.
    with warnings.catch_warnings(), mock.patch.dict(os.environ, {"NVTE_PROJECT_BUILDING": "1"}):
        warnings.simplefilter("ignore")
        import transformer_engine.common
    transformer_engine.common.load_framework_extension = lambda framework: None
    sys.modules["transformer_engine_torch"] = compiled
    has_triton_package()  # torch keeps this answer; asked below it would find the replacement
    missing = [name for name in _UNUSED if importlib.util.find_spec(name.partition(".")[0]) is None]
    sys.modules.update({name: mock.MagicMock(__version__="0") for name in missing})
    import transformer_engine.pytorch.fp8  # noqa: F401  Megatron asks for it
    from transformer_engine.pytorch.attention import DotProductAttention
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    for name in missing:
        del sys.modules[name]
    for name, module in list(sys.modules.items()):
        if name.startswith("transformer_engine.pytorch") and vars(module).get("torch") is torch:
            module.torch = cuda.TorchOnCpu("torch")
    for door, name in ((TransformerEngineBaseModule, "prepare_forward"), (DotProductAttention, "forward")):
        setattr(door, name, cuda.claiming_cuda(getattr(door, name)))
