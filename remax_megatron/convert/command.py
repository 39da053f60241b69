"""What the converters' commands share: options, one `error:` line, and the exit codes.

0: done; 1: what was compared differs; 2: it cannot be done; 130: stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Callable

from remax_megatron.errors import UserError

EXIT_DIFFERENT, EXIT_CANNOT, EXIT_INTERRUPTED = 1, 2, 130


class Command(argparse.ArgumentParser):
    """An argument parser whose help is a module's docstring."""

    def __init__(self, prog: str, doc: str | None):
        super().__init__(
            prog=sys.argv[0] if sys.argv[0].startswith("remax-convert ") else f"python {prog}",
            description=textwrap.dedent(doc or ""),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add = self.add_argument

    def add_workers(self) -> None:
        """Add --workers."""
        self.add("--workers", type=_positive, metavar="N", help="threads (default: one per processor, at most 8)")

    def add_writing_options(self) -> None:
        """Add the options of all commands that write a folder."""
        self.add_workers()
        self.add("--resume", action="store_true", help="go on with a conversion that was interrupted")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number of at least 1")
    return int(text)


def run_command(command: Command, argv: list[str] | None, body: Callable[[argparse.Namespace], int]) -> int:
    """Parse, run, and turn a UserError into one line on standard error; returns the exit code."""
    options = command.parse_args(argv)
    for name, value in vars(options).items():  # a shell leaves the ~ of --hf=~/model to us
        if isinstance(value, str) and value.startswith("~"):
            setattr(options, name, os.path.expanduser(value))
    try:
        return body(options)
    except UserError as error:
        print(error.lines(), file=sys.stderr)
        return EXIT_CANNOT
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
