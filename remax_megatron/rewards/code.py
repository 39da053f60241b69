r"""The scorer of programs: runs the answer's last ```python block (or the whole text) in the sandbox (sandbox/).

The ground truth is JSON, of one of two forms:

    {"inputs": ["1 2\n", ...], "outputs": ["3\n", ...]}   one run per pair: stdin, and what stdout must be
    {"tests": "assert add(1, 2) == 3"}                    code that runs after the program, in the same interpreter

1.0 where all pairs fit (exit code 0; spaces at the end of lines and empty lines at the end do not count) or the tests
end without an exception; else 0.0. Runs stop at the first failure. `passed` is the share of pairs that fitted before
it, `overrun` is 1.0 where a time or output limit was hit. All runs of one answer share TOTAL_S seconds, so that a
reward.timeout_s above it never ends one.

With `inputs`, judging happens outside the sandbox. With `tests` it happens inside: a program cannot end them early by
exiting, but one that studies its interpreter's frames could forge their end. Prefer `inputs` where there is a choice.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from dataclasses import replace
from typing import Any

from remax_megatron.rewards.sandbox.api import run_python
from remax_megatron.rewards.sandbox.limits import Limits
from remax_megatron.rewards.scorer import RewardError

LIMITS = Limits()
TOTAL_S = 8.0  # of one answer, over all its runs
_BLOCK = re.compile(r"```[ \t]*(?:python3?|py)[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
# The program is no "__main__", so that its own command line does not wait for input. The mark says that all tests ran.
_HARNESS = """\
import json, sys
program, tests, mark = json.load(sys.stdin)
names = {"__name__": "solution"}
exec(compile(program, "solution.py", "exec"), names)
exec(compile(tests, "tests.py", "exec"), names)
sys.stdout.write(mark)
sys.stdout.flush()
"""


def extract_program(solution_str: str) -> str:
    """The last fenced Python block (one that a length limit cut counts), or the whole text where there is none."""
    blocks = _BLOCK.findall(solution_str)
    return blocks[-1] if blocks else solution_str


def ground_truth(value: Any) -> str:
    """`value` as JSON text of one of the two forms; ValueError for another one."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    try:
        _cases(text)
    except RewardError as error:
        raise ValueError(str(error)) from error
    return text


def score(solution_str: str, ground_truth: str) -> dict[str, float]:
    """{"score", "passed", "overrun"} of one answer; RewardError for a ground truth of another form."""
    program = extract_program(solution_str)
    cases = _cases(ground_truth)
    deadline = time.monotonic() + TOTAL_S
    passed, overrun = 0, False
    for stdin, expected in cases:
        mark = ""
        text = program
        if expected is None:
            mark = f"\n{secrets.token_hex(16)}"
            stdin, text = json.dumps([program, stdin, mark]), _HARNESS
        left = deadline - time.monotonic()
        if overrun := left <= 0:
            break
        run = run_python(text, stdin=stdin, limits=replace(LIMITS, wall_s=min(LIMITS.wall_s, left)))
        overrun = run.outcome != "exit"
        stdout = run.stdout.decode(errors="replace")
        right = stdout.endswith(mark) if expected is None else _lines(stdout) == _lines(expected)
        if overrun or run.code != 0 or not right:
            break
        passed += 1
    return {"score": float(passed == len(cases)), "passed": passed / len(cases), "overrun": float(overrun)}


def _cases(ground_truth: str) -> list[tuple[str, str | None]]:
    """(stdin, expected stdout) of each pair, or (tests, None)."""
    match _parsed(ground_truth):
        case {"tests": str() as tests}:
            return [(tests, None)]
        case {"inputs": [_, *_] as inputs, "outputs": list() as outputs} if len(inputs) == len(outputs) and all(
            isinstance(text, str) for text in (*inputs, *outputs)
        ):
            return list(zip(inputs, outputs, strict=True))
    raise RewardError(
        "the ground truth of a 'code' sample must be JSON, "
        '{"inputs": [text, ...], "outputs": [text, ...]} with as many of both and at least one, '
        f'or {{"tests": text}}; found {ground_truth[:100]!r}'
    )


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
