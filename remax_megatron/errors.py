"""The one base of errors that a user can fix: they end as a single `error:` line and exit code 2, not a traceback."""


class UserError(ValueError):
    """What is wrong, its value, the limit, and what to set instead."""
