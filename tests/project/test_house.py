"""Rules of the house that can be counted: short functions, parameters and public names that are explained."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests import ROOT

FILES = sorted([*(ROOT / "remax_megatron").rglob("*.py"), *(ROOT / "convert").rglob("*.py")])
Function = ast.FunctionDef | ast.AsyncFunctionDef
LONGEST, LONGEST_OF_A_START = 60, 25  # lines
MANY = 5  # parameters


def functions(file: Path) -> Iterator[tuple[str, Function, str, bool]]:
    """(where, function, its docstring with that of its class for a constructor, whether it is public) of all that are
    not inside another function."""

    def walk(node: ast.AST, public: bool, around: str) -> Iterator[tuple[str, Function, str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                docstring = (ast.get_docstring(child) or "") + around * child.name.startswith("__")
                around_it = around if child.name == "forward" else ""
                where = f"{file.relative_to(ROOT)}:{child.lineno} {child.name}"
                yield where, child, docstring + around_it, public and not child.name.startswith("_")
            elif isinstance(child, ast.ClassDef):
                yield from walk(child, public and not child.name.startswith("_"), ast.get_docstring(child) or "")
            else:
                yield from walk(child, public, around)

    yield from walk(ast.parse(file.read_text()), True, "")


def parameters(function: Function) -> list[str]:
    names = [one.arg for one in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls", "ctx")]


def test_functions_are_short() -> None:
    too_long = {}
    for file in FILES:
        limit = LONGEST_OF_A_START if file.name in ("run.py", "build.py") else LONGEST
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, Function) and node.end_lineno is not None:
                lines = node.end_lineno - node.lineno + 1
                if lines > limit:
                    too_long[f"{file.relative_to(ROOT)}:{node.lineno} {node.name}"] = lines
    assert not too_long


def test_many_parameters_are_explained_each() -> None:
    """By name in the docstring, or by "arguments are those of" a function that does."""
    missing = {}
    for file in FILES:
        for where, function, docstring, _ in functions(file):
            names = parameters(function)
            unsaid = [name for name in names if name not in docstring]
            if len(names) > MANY and unsaid and "arguments are those of" not in docstring:
                missing[where] = unsaid
    assert not missing


def test_public_functions_and_classes_have_docstrings() -> None:
    silent = [where for file in FILES for where, _, docstring, public in functions(file) if public and not docstring]
    for file in FILES:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node):
                silent.append(f"{file.relative_to(ROOT)}:{node.lineno} class {node.name}")
    assert not silent
