"""What a check saw, and how it is shown: the findings of all ranks become one screen and one exit code."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from remax_megatron.config.cli import EXIT_BAD_SETTINGS

LEVELS = OK, WARNING, PROBLEM = "ok", "warning", "PROBLEM"
SETTINGS, VERSIONS = "settings", "versions"  # checks whose findings are treated apart
WIDTH, INDENT = 100, 23  # columns
SHOWN = 3  # findings of one check and level, ranks of one finding


@dataclass(frozen=True)
class Finding:
    """`level` is one of LEVELS; `fix` is printed below the fact unless all is well."""

    check: str
    level: str
    fact: str
    fix: str = ""


def merge(reports: Mapping[str, Sequence[Finding]]) -> list[Finding]:
    """One list from those of the ranks ("rank 4 on node2" -> its findings).

    Of a check's ok findings the first is shown, except that versions that differ are a warning. Any other finding
    stands once, with who made it unless all did; at most SHOWN of one check and level.
    """
    who: dict[Finding, list[str]] = {}
    for rank, findings in reports.items():
        for finding in findings:
            who.setdefault(finding, []).append(rank)
    merged = []
    for check, level in dict.fromkeys((finding.check, finding.level) for finding in who):
        group = [finding for finding in who if (finding.check, finding.level) == (check, level)]
        if level == OK and (check != VERSIONS or len(group) == 1):
            merged.append(group[0])
            continue
        for finding in group[:SHOWN]:
            if len(who[finding]) < len(reports):
                finding = replace(finding, fact=f"[{some(who[finding])}] {finding.fact}")
            if level == OK:
                finding = replace(finding, level=WARNING, fix="install the same versions on all nodes")
            merged.append(finding)
        if len(group) > SHOWN:
            merged.append(Finding(check, WARNING if level == OK else level, f"and {len(group) - SHOWN} more like this"))
    return merged


def show(reports: Mapping[str, Sequence[Finding]], headline: str) -> int:
    """Print what `merge` makes of `reports`, problems last with their fixes, and a line that counts.

    Returns the exit code: 2 for settings that the trainer refuses, else 1 for a problem, else 0.
    """
    findings, lines = merge(reports), [headline]
    for finding in sorted(findings, key=lambda finding: LEVELS.index(finding.level)):
        lines.append(f"{finding.level:8}{finding.check:15}{_block(finding.fact)}")
        if finding.fix and finding.level != OK:
            lines.append(" " * INDENT + _block(f"-> {finding.fix}"))
    problems = [finding.check for finding in findings if finding.level == PROBLEM]
    warnings = sum(finding.level == WARNING for finding in findings)
    verdict = "the run would fail: fix the problems first" if problems else "ready to start"
    print("\n".join([*lines, f"problems: {len(problems)}, warnings: {warnings}; {verdict}"]), flush=True)
    return EXIT_BAD_SETTINGS if SETTINGS in problems else int(bool(problems))


def _block(text: str) -> str:
    """`text` as a column that begins at INDENT, its own lines kept; what is pasted from it, such as paths and options,
    stays whole."""
    wrapped = (
        textwrap.wrap(line, WIDTH - INDENT, break_long_words=False, break_on_hyphens=False)
        for line in text.splitlines()
    )
    lines = [line for part in wrapped for line in part]
    return f"\n{' ' * INDENT}".join(lines)


def grade(need: float, limit: float, wished: float) -> str:
    """PROBLEM where `need` is above `limit`, warning where it is above `wished`."""
    return PROBLEM if need > limit else WARNING if need > wished else OK


def said(error: BaseException) -> str:
    """An error in a few words."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return getattr(error, "strerror", None) or (lines[0][:200].rstrip(".") if lines else type(error).__name__)


def some(names: Sequence[str]) -> str:
    """The first names, and how many more."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
