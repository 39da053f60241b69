r"""Finds the answer in a \boxed{...}: for scoring (math.py) and for making ground truths (data/math.py)."""

from __future__ import annotations

import re

_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # a backslash takes the next character with it
_BOX = "\\boxed{"


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} or \fbox{...}, or of `\boxed 5` (up to a "$" or the end of the line, as some
    solutions of MATH have it). None where there is none or where it does not close."""
    text = text.replace("\\fbox{", _BOX).replace("\\boxed {", _BOX)
    start = text.rfind("\\boxed")
    if start == -1:
        return None
    if not text.startswith(_BOX, start):
        rest = text[start + len("\\boxed") :]
        return rest.split("$")[0].split("\n")[0].strip() or None if rest.startswith(" ") else None
    depth, begin = 1, start + len(_BOX)
    for token in _BRACE.finditer(text, begin):
        depth += {"{": 1, "}": -1}.get(token.group(), 0)
        if depth == 0:
            return text[begin : token.start()].strip()
    return None
