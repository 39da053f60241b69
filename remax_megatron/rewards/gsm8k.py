r"""The strict scorer of GSM8K: verl's default rule, so that rewards compare with published runs.

The last match of `#### NUMBER` within the last 300 characters is the answer; commas are dropped; the text must equal
the ground truth. So `#### 18`, `#### 1,000` (for 1000) and `#### 18%` count, while `#### 18.`, `#### $18`, `####18`,
`#### **18**`, `\boxed{18}` and `#### 18.0` do not. It rewards the format as much as the number, on purpose.
"""

from __future__ import annotations

import re

_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")
TAIL_CHARS = 300  # the rule looks no further back: a long answer that ends properly is cheap to score


def extract_answer(solution_str: str) -> str | None:
    """The last `#### NUMBER` near the end, without "," and "$"; None where there is none."""
    matches = _ANSWER.findall(solution_str[-TAIL_CHARS:])
    return matches[-1].replace(",", "").replace("$", "") if matches else None


def strict_score(solution_str: str, ground_truth: str) -> float:
    """1.0 where the extracted answer is the ground truth, character by character; else 0.0."""
    return float(extract_answer(solution_str) == ground_truth)
