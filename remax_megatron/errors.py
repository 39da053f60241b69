"""The one base of errors that a user can fix: they end as an `error:` line and exit code 2, not a traceback."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(ValueError):
    """What is wrong, its value, the limit, and what to set instead; `details` are lines of their own below it."""

    def __init__(self, message: str = "", details: Sequence[str] = ()):
        super().__init__(message)
        self.details = tuple(details)

    def __str__(self) -> str:
        return "\n  ".join([str(self.args[0]), *self.details])

    def lines(self) -> str:
        """Return what to print: each part on one line."""
        return "\n  ".join(" ".join(part.split()) for part in ("error: " + str(self.args[0]), *self.details))
