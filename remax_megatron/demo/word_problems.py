"""Arithmetic word problems for the demo: an offline, deterministic generator that writes GSM8K-shaped parquet files.

    python -m remax_megatron.demo.word_problems --local_dir DIR [--num_train N] [--num_test N] [--seed S]

writes `DIR/train.parquet` and `DIR/test.parquet` with the columns and types of GSM8K as trainers of this field read it:
data_source, prompt, ability, reward_model, extra_info. No question occurs twice, neither within a file nor in both. The
same arguments give the same rows on every machine: all choices come from Python's `random.Random`.

The problems are simple on purpose (one or two steps, results from 1 to 81), so that a model of a million parameters
can learn the arithmetic in a minute. They say nothing about how well anything solves GSM8K.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from remax_megatron.data.schema import make_row, write_parquet
from remax_megatron.demo.once import build_once

DATA_SOURCE = "word_problems"
NUM_TRAIN = 3840
NUM_TEST = 512
MAX_PROBLEMS = 100_000  # in both files together; the families hold several times as many different questions
INSTRUCTION = 'Give the final answer after "####".'

NAMES = "Anna Ben Clara David Emma Felix Grace Henry Ida Jonas Lena Max Nora Tom".split()  # noqa: SIM905
OBJECTS = "apples balls books cards coins cookies eggs flowers marbles pencils shells stamps".split()  # noqa: SIM905


@dataclass(frozen=True)
class Problem:
    """A question, the sentence that solves it, and the sentence of somebody who picked the wrong operation.

    `family` is one of `FAMILIES`. `result` and `wrong_result` are the numbers the two sentences arrive at; they always
    differ.
    """

    family: str
    question: str
    solution: str
    result: int
    wrong_solution: str
    wrong_result: int

    @property
    def prompt(self) -> str:
        """The user turn: the question and what form the answer must have."""
        return f"{self.question} {INSTRUCTION}"

    @property
    def answer(self) -> str:
        """The right answer as in GSM8K: the reasoning, a newline, `#### N`."""
        return f"{self.solution}\n#### {self.result}"


# ---------------------------------------------------------------------------------------------------------------------
# The families. Each takes (rng, a, b, things) and returns one problem; a and b are two different names.


def _add(x: int, y: int) -> tuple[str, int]:
    return f"{x}+{y}={x + y}", x + y


def _sub(x: int, y: int) -> tuple[str, int]:
    x, y = max(x, y), min(x, y)
    return f"{x}-{y}={x - y}", x - y


def _mul(x: int, y: int) -> tuple[str, int]:
    return f"{x}*{y}={x * y}", x * y


def _one_step(
    family: str, question: str, who: str, things: str, right: tuple[str, int], wrong: tuple[str, int]
) -> Problem:
    """Make a problem of `family` from its `question`: how many `things` `who` has, `right` and `wrong`, each as
    (how it is reckoned, number)."""
    return Problem(
        family=family,
        question=question,
        solution=f"{who} has {right[0]} {things}.",
        result=right[1],
        wrong_solution=f"{who} has {wrong[0]} {things}.",
        wrong_result=wrong[1],
    )


def _join(rng: random.Random, a: str, b: str, things: str) -> Problem:
    x, y = rng.randint(2, 12), rng.randint(2, 12)
    x += x == y  # else the wrong operation would give 0
    question = rng.choice(
        (
            f"{a} has {x} {things}. {b} gives {a} {y} more. How many {things} does {a} have now?",
            f"{a} has {x} {things} and finds {y} more. How many {things} does {a} have now?",
        )
    )
    return _one_step("join", question, a, things, _add(x, y), _sub(x, y))


def _separate(rng: random.Random, a: str, b: str, things: str) -> Problem:
    y = rng.randint(2, 10)
    x = y + rng.randint(1, 10)
    question = rng.choice(
        (
            f"{a} has {x} {things}. {a} gives {y} to {b}. How many {things} does {a} have left?",
            f"{a} has {x} {things} and loses {y}. How many {things} does {a} have left?",
        )
    )
    return _one_step("separate", question, a, things, _sub(x, y), _add(x, y))


def _compare(rng: random.Random, a: str, b: str, things: str) -> Problem:
    """The word misleads: "y more than b" is said of a, so b has fewer."""
    y = rng.randint(2, 10)
    x = y + rng.randint(1, 10)
    question = rng.choice(
        (
            f"{a} has {x} {things}, {y} more than {b}. How many {things} does {b} have?",
            f"{a} has {x} {things}. This is {y} more than {b} has. How many {things} does {b} have?",
        )
    )
    return _one_step("compare", question, b, things, _sub(x, y), _add(x, y))


def _groups(rng: random.Random, a: str, b: str, things: str) -> Problem:
    x, y = rng.randint(2, 9), rng.randint(3, 9)
    question = rng.choice(
        (
            f"{a} has {x} boxes with {y} {things} in each. How many {things} does {a} have?",
            f"{b} gives {a} {x} bags of {y} {things} each. How many {things} does {a} have?",
        )
    )
    return _one_step("groups", question, a, things, _mul(x, y), _add(x, y))


def _two_steps(rng: random.Random, a: str, b: str, things: str) -> Problem:
    x, y = rng.randint(2, 12), rng.randint(2, 12)
    z = rng.randint(2, min(10, x + y - 1))
    question = f"{a} has {x} {things}, finds {y} more and gives {z} to {b}. How many {things} does {a} have now?"
    first, total = _add(x, y)
    (right, result), (wrong, wrong_result) = _sub(total, z), _add(total, z)
    return Problem(
        family="two_steps",
        question=question,
        solution=f"{a} has {first}, then {right} {things}.",
        result=result,
        wrong_solution=f"{a} has {first}, then {wrong} {things}.",
        wrong_result=wrong_result,
    )


FAMILIES: dict[str, Callable[[random.Random, str, str, str], Problem]] = {
    "join": _join,
    "separate": _separate,
    "compare": _compare,
    "groups": _groups,
    "two_steps": _two_steps,
}


def problems(rng: random.Random, exclude: Container[str] = ()) -> Iterator[Problem]:
    """Yields different problems without end, the families in turn by chance; never a question in `exclude`."""
    seen: set[str] = set()
    families = tuple(FAMILIES.values())
    while True:
        a, b = rng.sample(NAMES, 2)
        problem = rng.choice(families)(rng, a, b, rng.choice(OBJECTS))
        if problem.question not in seen and problem.question not in exclude:
            seen.add(problem.question)
            yield problem


def splits(num_train: int = NUM_TRAIN, num_test: int = NUM_TEST, seed: int = 0) -> tuple[list[Problem], list[Problem]]:
    """The problems of the train and the test file, disjoint by question. The test problems do not depend on num_train.

    Raises ValueError when a number is below 1 or both together exceed `MAX_PROBLEMS`.
    """
    for name, value in (("num_train", num_train), ("num_test", num_test)):
        if value < 1:
            raise ValueError(f"{name}={value}: at least 1 problem is needed; set {name}=1 or more")
    if num_train + num_test > MAX_PROBLEMS:
        raise ValueError(
            f"num_train={num_train} and num_test={num_test}: together they may be at most {MAX_PROBLEMS}, because no "
            f"question may occur twice; set num_train={max(1, MAX_PROBLEMS - num_test)} or less"
        )
    test = list(islice(problems(random.Random(f"test-{seed}")), num_test))
    train = islice(problems(random.Random(f"train-{seed}"), {problem.question for problem in test}), num_train)
    return list(train), test


def rows(split: str, split_problems: list[Problem]) -> list[dict[str, Any]]:
    """The parquet rows of one split, in order."""
    return [
        make_row(
            data_source=DATA_SOURCE,
            prompt=problem.prompt,
            ground_truth=str(problem.result),
            extra_info={"split": split, "index": i, "answer": problem.answer, "question": problem.question},
        )
        for i, problem in enumerate(split_problems)
    ]


def write_files(
    local_dir: str | Path, num_train: int = NUM_TRAIN, num_test: int = NUM_TEST, seed: int = 0
) -> tuple[Path, Path]:
    """Writes both files into `local_dir`, each whole or not at all; returns (train path, test path)."""
    paths = []
    for split, split_problems in zip(("train", "test"), splits(num_train, num_test, seed), strict=True):
        paths.append(Path(local_dir) / f"{split}.parquet")
        write_parquet(rows(split, split_problems), paths[-1])
    return paths[0], paths[1]


def ensure_data(folder: Path) -> tuple[Path, Path]:
    """Write the default problems into `folder` unless they are there; returns (train path, test path).

    A changed generator writes them anew. Safe when several processes call at once. UserError when `folder` was not made
    here.
    """
    train, test = splits()
    build_once(folder, [rows("train", train), rows("test", test)], write_files)
    return folder / "train.parquet", folder / "test.parquet"


def main() -> None:
    """Write the word problems, as the command line says."""
    parser = argparse.ArgumentParser(description="Write train.parquet and test.parquet of arithmetic word problems.")
    parser.add_argument("--local_dir", required=True, type=Path)
    parser.add_argument("--num_train", type=int, default=NUM_TRAIN)
    parser.add_argument("--num_test", type=int, default=NUM_TEST)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        paths = write_files(args.local_dir, args.num_train, args.num_test, args.seed)
    except ValueError as error:
        parser.error(str(error))
    print(f"{paths[0]}: {args.num_train} problems\n{paths[1]}: {args.num_test} problems")


if __name__ == "__main__":
    main()
