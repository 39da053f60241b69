"""What benchmarks/gpu.py found: against its targets, and as tables of docs/gpu.md. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import ROOT

DOCS = ROOT / "docs/gpu.md"
Details = dict[str, Any]
Cases = dict[str, dict[str, Any]]  # by name, those that were measured


@dataclass(frozen=True)
class Target:
    """A number that is to be at least (>=), at most (<=) or below (<) `limit`; `find` has it from the cases of `part`,
    None where they were not measured."""

    name: str
    part: str
    sign: str
    limit: float
    meaning: str
    find: Callable[[Cases], float | None]

    def is_met(self, value: float) -> bool:
        return {">=": value >= self.limit, "<=": value <= self.limit, "<": value < self.limit}[self.sign]


def _largest(values: Iterator[float]) -> float | None:
    return max(values, default=None)


def _of(cases: Cases, name: str, key: str) -> float | None:
    return cases.get(name, {}).get(key)


def _float32_error(cases: Cases) -> float | None:
    return _largest(case["gradient"] for name, case in cases.items() if " float32 " in name)


def _bfloat16_error(cases: Cases) -> float | None:
    """Of the worst policy, over that of rounding alone."""
    rounding = _of(cases, "transformers bfloat16", "gradient")
    errors = (case["gradient"] for name, case in cases.items() if " bfloat16 " in name)
    worst = _largest(errors)
    return worst / rounding if worst is not None and rounding else None


def _speedup(cases: Cases) -> float | None:
    """The least of all shapes and recompute modes that ran with both kinds of layers."""
    pairs = ((case, cases.get(name.replace(" local ", " transformer_engine "))) for name, case in cases.items())
    return min((te["tokens_per_s"] / case["tokens_per_s"] for case, te in pairs if te and te is not case), default=None)


def _mfu(cases: Cases) -> float | None:
    return _largest(case["mfu"] for name, case in cases.items() if name[:3] in ("1.5", "3b ") and "mfu" in case)


def _ledger(cases: Cases) -> float | None:
    """How far the ledger is from the allocator's peak, at worst, as a share of the peak."""
    return _largest(abs(case["ledger_gib"] / case["peak_gib"] - 1) for case in cases.values() if "peak_gib" in case)


def _head(key: str) -> Callable[[Cases], float | None]:
    """Ours over Megatron's, of the worst size."""

    def find(cases: Cases) -> float | None:
        pairs = (
            (case, cases.get(name.replace(" ours", " megatron"))) for name, case in cases.items() if "ours" in name
        )
        return _largest(case[key] / peer[key] for case, peer in pairs if peer)

    return find


def _canary(cases: Cases) -> float | None:
    return _largest(case["canary_mean"] for name, case in cases.items() if name.startswith("round"))


def _loss(cases: Cases) -> float | None:
    return _largest(case["loss_difference"] for case in cases.values())


TARGETS = (
    Target("gradient_float32", "parity", "<=", 1e-4, "gradient of a float32 policy, relative error", _float32_error),
    Target("gradient_bfloat16", "parity", "<=", 1.5, "the same in bfloat16 / that of rounding alone", _bfloat16_error),
    Target("head_memory", "head", "<=", 0.15, "our head's memory / Megatron-Core's", _head("peak_gib")),
    Target("head_time", "head", "<=", 1.0, "our head's time / Megatron-Core's", _head("seconds")),
    Target("resume_loss", "resume", "<=", 1e-6, "losses after a resume, largest difference", _loss),
    Target("te_speedup", "update", ">=", 1.2, "Transformer Engine's layers / local ones, tokens/s", _speedup),
    Target("mfu", "update", ">=", 0.45, "best MFU at 1.5B or 3B", _mfu),
    Target("ledger_error", "update", "<=", 0.15, "doctor's ledger against the allocator's peak", _ledger),
    Target("canary_mean", "cycle", "<=", 0.02, "worst canary of the rounds, nats", _canary),
    Target(
        "growth_gib",
        "cycle",
        "<",
        0.3,
        "memory that rounds leave behind, GiB",
        lambda c: _of(c, "bandwidth", "growth_gib"),
    ),
    Target(
        "sync_bandwidth",
        "cycle",
        ">=",
        0.5,
        "reload of the weights / copy of as many bytes",
        lambda c: _of(c, "bandwidth", "reload_over_copy"),
    ),
    Target(
        "demo_accuracy", "demo", ">=", 0.9, "the demo's accuracy at the end", lambda c: _of(c, "demo", "accuracy_after")
    ),
)


def measured(details: Details, part: str) -> Cases:
    """The cases of `part` that ran to their end."""
    cases = details["parts"].get(part, {"cases": []})["cases"]
    return {case["case"]: case for case in cases if not {"failed", "not_available"} & case.keys()}


def _found(details: Details) -> list[tuple[Target, float | None]]:
    return [(target, target.find(measured(details, target.part))) for target in TARGETS]


def result(details: Details) -> dict[str, float]:
    """The RESULT line: each number that has a target and was measured; how many targets were met, missed and not
    measured; how many parts did not end by themselves, and cases failed."""
    values = {target.name: value for target, value in _found(details) if value is not None}
    verdicts = [target.is_met(values[target.name]) for target in TARGETS if target.name in values]
    parts = details["parts"].values()
    return values | {
        "targets_met": sum(verdicts),
        "targets_missed": len(verdicts) - sum(verdicts),
        "targets_not_measured": len(TARGETS) - len(verdicts),
        "parts_failed": sum(part["outcome"] != "done" for part in parts),
        "cases_failed": sum("failed" in case for part in parts for case in part["cases"]),
    }


def target_rows(details: Details) -> list[tuple[str, str, str, str]]:
    """(name and meaning, target, found, verdict) of every target."""
    rows = []
    for target, value in _found(details):
        verdict = "not measured" if value is None else "met" if target.is_met(value) else "missed"
        number = "" if value is None else f"{value:.3g}"
        rows.append((f"{target.name}: {target.meaning}", f"{target.sign} {target.limit:g}", number, verdict))
    return rows


def target_lines(details: Details) -> list[str]:
    """The table of targets, for people."""
    return [f"{name:75}{limit:>9}{value:>11}  {verdict}" for name, limit, value, verdict in target_rows(details)]


# -- docs/gpu.md -----------------------------------------------------------------------------------------------------


def write_docs(details: Details, docs: Path = DOCS) -> None:
    """Put what was measured between its marks in `docs`."""
    _write_between("measured", _measured_section(details), docs)


def write_counts(files: Sequence[Path], docs: Path = DOCS) -> None:
    """Put the RESULT lines of benchmarks/gpu_counts.py between their marks in `docs`. Each file is its output for one
    case, and named after it; all have the same numbers."""
    lines = [next(x for x in reversed(file.read_text().splitlines()) if x.startswith("RESULT ")) for file in files]
    results = [dict(pair.split("=", 1) for pair in line.split()[1:]) for line in lines]
    rows = [(file.stem, *found.values()) for file, found in zip(files, results, strict=True)]
    _write_between("counted", "\n".join(_table(("case", *results[0]), rows)) + "\n", docs)


def _write_between(name: str, text: str, docs: Path) -> None:
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = docs.read_text().partition(begin)
    _, mark, after = rest.partition(end)
    assert mark, f"{docs} has no {begin} and {end}"
    docs.write_text(f"{before}{begin}\n{text}{end}{after}")


def _measured_section(details: Details) -> str:
    machine, device = details["machine"], measured(details, "stack").get("device", {})
    versions = {k: v for k, v in measured(details, "stack").get("versions", {}).items() if v and k not in _NOT_SHOWN}
    seconds = sum(part["seconds"] for part in details["parts"].values())
    card = f"{device['card']}, {device['memory_gib']:.0f} GiB" if "card" in device else "no GPU: on the CPU, tiny sizes"
    lines = [
        f"Measured on: {card}; commit {machine['commit']}; {seconds:.0f} s for all parts.",
        f"Stack: {', '.join(f'{name} {version}' for name, version in versions.items())}.",
        "",
        *_table(("what", "target", "found", ""), target_rows(details)),
    ]
    for name, part in details["parts"].items():
        lines += ["", f"### {name}", "", f"{part['outcome']}, {part['seconds']:.0f} s", ""]
        lines += _case_tables(part["cases"])
    return "\n".join(lines) + "\n"


_NOT_SHOWN = ("case", "case_s")


def _case_tables(cases: list[dict[str, Any]]) -> Iterator[str]:
    """One table for cases with the same numbers, one after the other; what was not measured as a list."""
    tables: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for case in cases:
        if not {"failed", "not_available"} & case.keys():
            tables.setdefault(tuple(key for key in case if key not in _NOT_SHOWN), []).append(case)
    for keys, rows in tables.items():
        yield from _table(("case", *keys), [[row["case"], *(_short(row[key]) for key in keys)] for row in rows])
        yield ""
    for case in cases:
        for word, text in (("failed", "failed"), ("not_available", "not available")):
            if word in case:
                yield f"- {case['case']}: {text}: {case[word]}"


def _table(head: tuple[str, ...], rows: list) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _short(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
