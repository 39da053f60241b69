"""What benchmarks/gpu.py found, against its targets, and as docs/gpu.md. Pure but for that file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common import ROOT

DOCS = ROOT / "docs/gpu.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
Details = dict[str, Any]
Cases = dict[str, dict[str, Any]]  # by name, only those that were measured


@dataclass(frozen=True)
class Target:
    """A number that is to be at least, or at most, `limit`; `find` gives it from the cases of `part`, None where they
    do not have it."""

    name: str
    part: str
    sign: str  # >= | <=
    limit: float
    meaning: str
    find: Callable[[Cases], float | None]

    def is_met(self, value: float) -> bool:
        return value >= self.limit if self.sign == ">=" else value <= self.limit


def _largest(key: str, only: str = "") -> Callable[[Cases], float | None]:
    return lambda cases: max((c[key] for name, c in cases.items() if only in name and key in c), default=None)


def _speedup(cases: Cases) -> float | None:
    """Of all shapes and recompute modes that ran with both layers, the least."""
    pairs = [(c, cases.get(name.replace("local", "transformer_engine"))) for name, c in cases.items() if "local" in name]
    return min((te["tokens_per_s"] / c["tokens_per_s"] for c, te in pairs if te), default=None)


def _mfu(cases: Cases) -> float | None:
    return max((c["mfu"] for name, c in cases.items() if name.startswith(("1.5b", "3b")) and "mfu" in c), default=None)


TARGETS: tuple = ()


def result(details):
    return {}


def target_lines(details):
    return []


def write_docs(details):
    pass
