"""What the package logs, as a list of lines."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def logged_lines() -> Iterator[list[str]]:
    """The lines, from information on, that are logged while the block runs."""
    package, handler = logging.getLogger("remax_megatron"), _Lines()
    level = package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield handler.lines
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
