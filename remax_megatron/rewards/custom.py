"""The user's own scorer (`custom_reward_function.path`, `name`, `reward_kwargs`): an ordinary Python module.

The file is imported under its own name, with its folder first on sys.path, as if it had been run from there: modules
beside it can be imported, and what it defines can be pickled. `name` may be

    def compute_score(data_source, solution_str, ground_truth, extra_info=None): ...         verl's signature
    async def compute_score(...)                     many answers wait at once (reward.async_concurrency)
    def compute_score_batch(data_sources, solution_strs, ground_truths, extra_infos): ...     lists in, a list out
    class Judge: def __init__(self, **reward_kwargs), def __call__(self, ...), plain or async, or a method that is named
                 compute_score or compute_score_batch; one object per worker process

It is called with keyword arguments, and with those of OPTIONAL that its signature names (PLURAL for a batch). It
returns a finite number, or a dict with the number under "score"; a batch returns a list of these. Whatever it raises is
raised here with file, line and sample: an error must not turn into a reward of 0 unseen.
"""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from remax_megatron.rewards.scorer import ASYNC, BATCH, ONE, RewardError, ScoreRequest, ScoreResult, as_result

NEEDED = ("data_source", "solution_str", "ground_truth", "extra_info")
OPTIONAL = ("prompt", "token_ids", "num_tokens", "finished")
PLURAL = {
    "data_source": "data_sources",
    "solution_str": "solution_strs",
    "ground_truth": "ground_truths",
    "extra_info": "extra_infos",
    "prompt": "prompts",
    "token_ids": "token_ids",
    "num_tokens": "num_tokens",
    "finished": "finished",
}
METHODS = ("compute_score_batch", "compute_score", "__call__")
_ours: set[str] = set()  # modules that were imported here


def load_custom(path: str, name: str, kwargs: Mapping[str, Any], source: bytes | None = None) -> Custom:
    """The scorer `name` of the file `path`, given `kwargs`. RewardError when it cannot be had or called.

    `source` is what the file held when the run started; None reads it now.
    """
    file = Path(path).expanduser().absolute()
    module = _import(file, source)
    if name == "compute_score" and not hasattr(module, name) and hasattr(module, "compute_score_batch"):
        name = "compute_score_batch"
    found = getattr(module, name, None)
    if not callable(found):
        functions = [n for n, f in vars(module).items() if inspect.isfunction(f) or inspect.isclass(f)]
        raise RewardError(
            f"custom_reward_function.name={name!r} is not a function of {file}; found: {', '.join(functions) or 'none'}"
        )
    if inspect.isclass(found):
        found, name = _method_of(found, name, kwargs, file)
        kwargs = {}
    if inspect.isgeneratorfunction(found) or inspect.isasyncgenfunction(found):
        raise RewardError(f"{file}: {name} is a generator; a score has to be returned, not yielded")
    return Custom(file, name, found, kwargs)


class Custom:
    """A loaded scorer; how it takes answers follows from its signature."""

    def __init__(self, file: Path, name: str, function: Callable[..., Any], kwargs: Mapping[str, Any]):
        """`function` is `name` of `file`; `kwargs` are more arguments for it. RewardError when it takes others."""
        try:
            signature = inspect.signature(function)
        except (ValueError, TypeError) as error:
            raise RewardError(f"{file}: {name} has no signature that can be read; wrap it in a `def {name}`") from error
        takes = signature.parameters
        self._file, self._name = file, name
        self._is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004  a callable object's method
        )
        many = "solution_strs" in takes or ("solution_str" not in takes and name.endswith("_batch"))
        self.kind = BATCH if many else ASYNC if self._is_async else ONE
        called = PLURAL if many else {one: one for one in PLURAL}
        self._names = {one: called[one] for one in NEEDED}
        self._names |= {one: called[one] for one in OPTIONAL if called[one] in takes}
        self.wants = frozenset(self._names) - frozenset(NEEDED)
        if taken := sorted(kwargs.keys() & self._names.values()):
            raise RewardError(
                f"custom_reward_function.reward_kwargs has {', '.join(taken)}, which the trainer gives to {name} of "
                f"{file}; name it otherwise"
            )
        try:
            signature.bind(**dict.fromkeys(self._names.values()), **kwargs)
        except TypeError as error:
            more = "".join(f", {key}" for key in kwargs)
            raise RewardError(
                f"{file}: {name}{signature} does not fit: {error}; needed: "
                f"{name}({', '.join(self._names.values())}{more})"
            ) from error
        self._call = partial(function, **kwargs)
        self._runner = asyncio.Runner()  # of batches: one loop for all of them, which what a module keeps is bound to

    def score(self, request: ScoreRequest) -> ScoreResult:
        """Score one answer."""
        try:
            value = self._call(**self._arguments(request))
        except Exception as error:  # the user's code may raise anything; it is named and raised again, never scored
            raise self._raised(error, request) from error
        return self._checked(value, request)

    async def score_async(self, request: ScoreRequest) -> ScoreResult:
        """Score one answer; others may be scored while this one waits."""
        try:
            value = await self._call(**self._arguments(request))
        except Exception as error:
            raise self._raised(error, request) from error
        return self._checked(value, request)

    def score_batch(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """Score many answers in one call."""
        each = [self._arguments(request) for request in requests]
        try:
            values = self._call(**{name: [arguments[name] for arguments in each] for name in self._names.values()})
            values = self._runner.run(values) if self._is_async else values
        except Exception as error:
            raise self._raised(error, requests[0]) from error
        values = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != len(requests):
            count = f" of {len(values)}" if isinstance(values, Sequence) else ""
            raise RewardError(
                f"{self._file}: {self._name} returned {type(values).__name__}{count} for {len(requests)} answers; a "
                "list of as many scores is needed"
            )
        return [self._checked(value, request) for value, request in zip(values, requests, strict=True)]

    def _arguments(self, request: ScoreRequest) -> dict[str, Any]:
        """By name, and each call's own: samples of a prompt share its values, which a function may change."""
        return {mine: copy.deepcopy(getattr(request, one)) for one, mine in self._names.items()}

    def _checked(self, value: Any, request: ScoreRequest) -> ScoreResult:
        if inspect.isawaitable(value):
            close = getattr(value, "close", lambda: None)
            close()
            raise RewardError(f"{self._file}: {self._name} returned something to await; write `async def {self._name}`")
        try:
            return as_result(value)
        except ValueError as error:
            raise RewardError(f"{self._file}: {self._name} returned {error}; sample: {_sample(request)}") from error

    def _raised(self, error: Exception, request: ScoreRequest) -> RewardError:
        what = f"{self._name} raised {type(error).__name__}: {error}"
        return RewardError(f"{_place(self._file, error)}: {what}; sample: {_sample(request)}")


def _sample(request: ScoreRequest) -> str:
    return (
        f"data_source={request.data_source!r}, ground_truth={request.ground_truth!r}, "
        f"extra_info={str(request.extra_info)[:200]}, solution ends {request.solution_str[-200:]!r}"
    )


def _place(file: Path, error: BaseException) -> str:
    """FILE:LINE of the innermost line of `file` that took part in `error`."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f"{file}:{error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f"{file}:{lines[-1]}" if lines else str(file)


def _import(file: Path, source: bytes | None) -> ModuleType:
    if source is None and not file.is_file():
        raise RewardError(f"custom_reward_function.path={file} is not a file")
    source = file.read_bytes() if source is None else source
    name = file.stem
    if "." in name:
        raise RewardError(
            f"custom_reward_function.path={file}: a module's name has no dot; rename the file, for example to "
            f"{name.replace('.', '_')}.py"
        )
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise RewardError(f"custom_reward_function.path={file} is not a Python file (.py)")
    if name in sys.stdlib_module_names or (name in sys.modules and name not in _ours):
        raise RewardError(
            f"custom_reward_function.path={file}: a module named {name!r} exists already; rename the file, for example "
            f"to {name}_reward.py"
        )
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    _ours.add(name)
    try:
        exec(compile(source, str(file), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:  # the user's module may raise anything while it is imported
        del sys.modules[name]
        fix = "; put what a script does under `if __name__ == '__main__':`" if isinstance(error, SystemExit) else ""
        fix = "; write `import helper` for helper.py beside it" if "relative import" in str(error) else fix
        raise RewardError(
            f"custom_reward_function.path={_place(file, error)} does not import: {type(error).__name__}: {error}{fix}"
        ) from error
    return module


def _method_of(kind: type, name: str, kwargs: Mapping[str, Any], file: Path) -> tuple[Callable[..., Any], str]:
    """An object of the class `kind`, made with `kwargs`, as the method that scores, and its name."""
    try:
        judge = kind(**kwargs)
    except (Exception, SystemExit) as error:
        raise RewardError(
            f"{_place(file, error)}: {name}({', '.join(f'{k}={v!r}' for k, v in kwargs.items())}) raised "
            f"{type(error).__name__}: {error}; custom_reward_function.reward_kwargs are its arguments"
        ) from error
    for method in METHODS:
        if callable(getattr(judge, method, None)):
            return getattr(judge, method), f"{name}.{method}"
    raise RewardError(f"{file}: class {name} has none of the methods {', '.join(METHODS)}; one has to score")
