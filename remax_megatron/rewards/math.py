r"""The scorer of MATH: the content of the answer's last \boxed{...}, compared with the ground truth by math-verify.

An answer without a closed box scores 0; `boxed` in the result says which answers had one. Equal texts are equal;
otherwise both sides are parsed as LaTeX and compared by sympy, so `\frac12`, `\dfrac{1}{2}` and `0.5` agree.

It has no deadline of its own: math-verify's time-outs, which rest on SIGALRM and do not interrupt a computation within
one big integer (Math-Verify issue #65), are off. It must run where it can be killed: in the pool (pool.py).
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from remax_megatron.rewards.boxed import last_boxed
from remax_megatron.rewards.scorer import RewardError


def ground_truth(value: Any) -> str:
    """`value` as the text in a box: a number, or text. ValueError where no box could hold it."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"the ground truth {value!r} is no text: it must be the content of a \\boxed{{...}}")
    text = str(value).strip()
    if not text or last_boxed(f"\\boxed{{{text}}}") != text:
        raise ValueError(
            f"the ground truth {value!r} fits into no \\boxed{{...}}: it is empty, or its braces are not paired"
        )
    return text


def score(solution_str: str, ground_truth: str) -> dict[str, float]:
    """1.0 where the boxed answer equals `ground_truth` (the content of a box), else 0.0; `boxed`: 1.0 if it had one."""
    answer = last_boxed(solution_str)
    if answer is None:
        return {"score": 0.0, "boxed": 0.0}
    return {"score": float(_equal(answer, ground_truth)), "boxed": 1.0}


def _equal(answer: str, truth: str) -> bool:
    if "".join(answer.split()) == "".join(truth.split()):
        return True
    _check_math_verify()
    return _verified(answer, truth)


def _verified(answer: str, truth: str) -> bool:
    from math_verify import LatexExtractionConfig, parse, verify  # it brings sympy, which takes a second

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time-outs are off
    config = [LatexExtractionConfig(boxed_match_priority=0)]
    gold, target = (parse(f"\\boxed{{{text}}}", config, parsing_timeout=None) for text in (truth, answer))
    return verify(gold, target, timeout_seconds=None)


@functools.cache
def _check_math_verify() -> None:
    """math-verify turns every error into "not equal", a broken installation (antlr4) too: it is tried once."""
    if not _verified("0.5", "\\frac{1}{2}") or _verified("3", "2"):
        raise RewardError(
            "math-verify does not find 0.5 equal to \\frac{1}{2}: its installation is broken; "
            "reinstall it with `pip install 'math-verify[antlr4_9_3]'`"
        )
