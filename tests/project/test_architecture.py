"""Which room may import which. Read from the source by `ast`: nothing is imported, so nothing heavy is needed.

A room is a folder of the package, or a group of the modules that lie beside the folders. The tables below are the plan
of the house: a new import that they do not allow fails here, and whoever wants it extends the table, or moves the code.
Imports inside functions count; those under TYPE_CHECKING, which never run, do not.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import ROOT

PACKAGE = "remax_megatron"

# Modules beside the folders, by their room. What is not named here is in the shell, which may import every room.
MODULES = {
    "": "ground",  # the package itself: its version
    "atomic": "ground",
    "data_files": "ground",
    "downloads": "ground",
    "errors": "ground",
    "flops": "ground",
    "model_facts": "ground",
    "model_family": "ground",
    "model_keys": "ground",
    "types": "ground",
    "console": "instruments",
    "gauges": "instruments",
    "guards": "instruments",
    "memory_probe": "instruments",
    "metrics": "instruments",
    "phases": "instruments",
    "plots": "instruments",
    "profiling": "instruments",
    "stalls": "instruments",
    "environment": "start",
    "run_folder": "start",
    "inputs": "start",
    "temporary": "start",
}

# Room -> the rooms that it may import, the lowest first. A room names only rooms above its own line, so there is no
# circle and no import upward.
ALLOWED: dict[str, set[str]] = {
    "ground": set(),
    "algorithm": {"ground"},
    "batching": {"ground"},
    "weights": {"ground"},
    "rewards": {"ground"},
    "data": {"ground", "rewards"},
    "demo": {"ground", "data"},
    "convert": {"ground", "weights"},
    "config": {"ground", "algorithm"},
    "parallel": {"ground"},
    "instruments": {"ground", "config"},
    "model": {"ground", "weights", "parallel"},
    "policy": {"ground", "algorithm", "batching", "weights", "config", "parallel", "instruments", "model"},
    "rollout": {"ground", "algorithm", "rewards", "data", "config", "parallel", "instruments", "policy"},
    "checkpoint": {"ground", "weights", "config", "parallel", "policy", "rollout"},
    "start": {"ground", "weights", "rewards", "data", "config", "parallel", "instruments", "checkpoint"},
    "plan": {"ground", "algorithm", "batching", "weights", "config", "rollout"},
    "doctor": {"ground", "weights", "config", "parallel", "rollout", "start", "plan"},
}

# Library -> the rooms (or single modules) that may import it.
LIBRARIES = {
    "megatron": {"parallel", "model", "policy", "checkpoint"},
    "transformer_engine": {"model"},
    "vllm": {"parallel", "rollout"},
    "torch.distributed": {
        "algorithm.logprob",  # sums over tensor-parallel ranks, whose group is an argument
        "weights.torch_dist_writer",  # the classes that Megatron unpickles from .metadata
        *("parallel", "instruments", "model", "policy", "rollout", "checkpoint", "start", "doctor", "shell"),
    },
    "torch": {
        *(
            "algorithm",
            "batching",
            "weights",
            "convert",
            "demo",
            "parallel",
            "instruments",
            "model",
            "policy",
            "rollout",
        ),
        *("checkpoint", "doctor", "shell"),
    },
}

# (Room, room below it) -> what of the lower one the upper one may import, where that is not all of it.
PARTS = {
    # The planner answers without torch: of what lies below it takes what is pure.
    ("plan", "algorithm"): {"algorithm.estimators"},
    ("plan", "batching"): {"batching.schedule"},
    ("plan", "weights"): {"weights.buckets", "weights.weight_table"},
    ("plan", "rollout"): {"rollout.memory"},
    # The policy computes log-probabilities and gradients. What a loss, a clip, a KL or a weight is, algorithm/ says.
    ("policy", "algorithm"): {
        "algorithm.logprob",
        "algorithm.objective",
        "algorithm.value_objective",
        "algorithm.losses.Clip",
    },
}


class Import(NamedTuple):
    """`module` imports `name`, both dotted."""

    module: str
    name: str
    line: int


def module_name(file: Path) -> str:
    """Dotted, without the package: "policy.policy", "policy" for its __init__, "" for the package itself."""
    parts = file.relative_to(ROOT / PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(file): file for file in sorted((ROOT / PACKAGE).rglob("*.py"))}


def imports_of(module: str, source: str) -> Iterator[Import]:
    tree = ast.parse(source)
    guarded = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: imports are written in full, not relative"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield Import(module, name, node.lineno)


IMPORTS = [found for module, file in SOURCES.items() for found in imports_of(module, file.read_text(encoding="utf-8"))]


def target(name: str) -> str | None:
    """The module of this package that the dotted `name` (a module, or something in one) lies in; None: another's."""
    package, _, rest = name.partition(".")
    if package != PACKAGE:
        return None
    while rest and rest not in SOURCES:
        rest = rest.rpartition(".")[0]
    return rest


def room(module: str) -> str:
    first = module.partition(".")[0]
    return first if first in ALLOWED and first not in MODULES else MODULES.get(first, "shell")


def test_the_table_goes_down_only():
    rooms = list(ALLOWED)
    for number, (name, allowed) in enumerate(ALLOWED.items()):
        assert allowed <= set(rooms[:number]), (
            f"{name} may import {allowed - set(rooms[:number])}, which is not below it"
        )
    folders = {file.parent.name for file in (ROOT / PACKAGE).glob("*/__init__.py")}
    assert folders <= ALLOWED.keys(), f"rooms that the table does not know: {folders - ALLOWED.keys()}"
    assert MODULES.keys() <= SOURCES.keys(), f"modules that are gone: {MODULES.keys() - SOURCES.keys()}"


@pytest.mark.parametrize("name", ALLOWED)
def test_a_room_imports_what_lies_below_it(name):
    wrong = [
        f"{found.module}:{found.line} imports {found.name} of {room(into)}"
        for found in IMPORTS
        if room(found.module) == name
        and (into := target(found.name)) is not None
        and room(into) not in ALLOWED[name] | {name}
    ]
    assert not wrong, "\n".join(wrong)


def test_modules_make_no_circle():
    edges: dict[str, set[str]] = {module: set() for module in SOURCES}
    for found in IMPORTS:
        into = target(found.name)
        if into is not None and into != found.module:
            edges[found.module].add(into)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, "a circle: " + " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for into in sorted(edges[module]):
                visit(into, (*path, module))
            done.add(module)

    for module in SOURCES:
        visit(module, ())


def library_of(name: str) -> str | None:
    """Which of the libraries of the table the dotted `name` lies in: the longest that fits."""
    return max((one for one in LIBRARIES if f"{name}.".startswith(f"{one}.")), key=len, default=None)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_is_imported_where_it_belongs(library):
    """Pure rooms import neither torch.distributed, Megatron nor vLLM; the ground floor and the settings no torch."""
    wrong = [
        f"{found.module}:{found.line} imports {found.name}"
        for found in IMPORTS
        if library_of(found.name) == library and not {room(found.module), found.module} & LIBRARIES[library]
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("rooms", PARTS, ids=" -> ".join)
def test_a_room_imports_only_these_parts_of_another(rooms):
    upper, lower = rooms
    wrong = [
        f"{found.module}:{found.line} imports {found.name}"
        for found in IMPORTS
        if room(found.module) == upper
        and (into := target(found.name)) is not None
        and room(into) == lower
        and not f"{found.name}.".startswith(tuple(f"{PACKAGE}.{part}." for part in PARTS[rooms]))
    ]
    assert not wrong, "\n".join(wrong)


def test_what_an_import_is():
    source = (
        "import torch.nn\nif TYPE_CHECKING:\n    from remax_megatron.run import run\ndef f():\n    from a import b\n"
    )
    assert list(imports_of("x", source)) == [("x", "torch.nn", 1), ("x", "a.b", 5)]
    assert target("remax_megatron.policy.policy.Policy") == "policy.policy" and target("torch.nn") is None
    assert room("policy.policy") == room("policy") == "policy"
    assert room("types") == "ground" and room("trainer") == "shell"
    assert library_of("torch.distributed.checkpoint") == "torch.distributed" and library_of("torchvision") is None
