r"""The strict scorer of GSM8K: verl's default rule, so that rewards compare with published runs; a tolerant one beside.

The last match of `#### NUMBER` within the last 300 characters is the answer; commas are dropped; the text must equal
the ground truth. So `#### 18`, `#### 1,000` (for 1000) and `#### 18%` count, while `#### 18.`, `#### $18`, `####18`,
`#### **18**`, `\boxed{18}` and `#### 18.0` do not. It rewards the format as much as the number, on purpose.

The flexible rule takes the last number within the same 300 characters, whatever stands around it, as verl's `flexible`
method does, and accepts all that verl's accepts; beyond it "," is dropped, a full stop at the end is no part of the
number, and numbers are compared as numbers. So all of the above count, and `#### 18 apples in 3 boxes` does not: the
rules can differ either way, and how often they do is worth watching.
"""

from __future__ import annotations

import re
import struct
from decimal import Decimal, InvalidOperation
from typing import Any

_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")
_NUMBER = re.compile(r"\-?[0-9\.\,]+")
FLOAT32_DIGITS = 9  # a decimal fraction that went through 32 bits has more
TAIL_CHARS = 300  # the rule looks no further back: a long answer that ends properly is cheap to score


def extract_answer(solution_str: str) -> str | None:
    """The last `#### NUMBER` near the end, without "," and "$"; None where there is none."""
    matches = _ANSWER.findall(solution_str[-TAIL_CHARS:])
    return matches[-1].replace(",", "").replace("$", "") if matches else None


def ground_truth(value: Any) -> str:
    """`value` as the text that an answer can equal: a number, or text less its spaces, its commas and one "$" or "+".

    ValueError where no answer could. Example: ground_truth(18.0) == ground_truth(" $18") == "18"
    """
    text = _as_text(value).strip()
    sign, digits = ("-", text[1:]) if text.startswith("-") else ("", text.removeprefix("+"))
    plain = sign + digits.strip().removeprefix("$").strip().replace(",", "")
    if not re.fullmatch(r"-?(\d+\.?\d*|\.\d+)", plain, re.ASCII):
        raise ValueError(f"the ground truth {value!r} is no number, so that no answer '#### NUMBER' equals it")
    if isinstance(value, float) and len(plain.replace(".", "").strip("-0")) > FLOAT32_DIGITS and _is_float32(value):
        raise ValueError(f"the ground truth {value!r} was rounded to 32 bits in its file; store it as text or float64")
    return plain


def _is_float32(value: float) -> bool:
    """Whether 32 bits hold `value`, which is a fraction that they seldom hold exactly."""
    try:
        return value != int(value) and struct.unpack("f", struct.pack("f", value))[0] == value
    except OverflowError:
        return False


def _as_text(value: Any) -> str:
    """Numbers without an exponent, and without the `.0` of a whole one; text as it is."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        number = Decimal(str(value))
        if number.is_finite():
            return format(number.to_integral_value() if number == number.to_integral_value() else number, "f")
    return ""


def strict_score(solution_str: str, ground_truth: str) -> float:
    """1.0 where the extracted answer is the ground truth, character by character; else 0.0."""
    return float(bool(ground_truth) and extract_answer(solution_str) == ground_truth)


def flexible_score(solution_str: str, ground_truth: str) -> float:
    """1.0 where the last number near the end equals the ground truth as a number; else 0.0."""
    numbers = (_to_number(text) for text in reversed(_NUMBER.findall(solution_str[-TAIL_CHARS:])))
    last = next((number for number in numbers if number is not None), None)
    return float(last is not None and last == _to_number(ground_truth))


def score(solution_str: str, ground_truth: str) -> dict[str, float]:
    """The strict score (the reward), and the flexible one under its name."""
    return {
        "score": strict_score(solution_str, ground_truth),
        "flexible": flexible_score(solution_str, ground_truth),
    }


def _to_number(text: str) -> Decimal | None:
    """None for what is only signs: ".", ",", "-", "1.2.3"."""
    try:
        return Decimal(text.replace(",", "").rstrip("."))
    except InvalidOperation:
        return None
