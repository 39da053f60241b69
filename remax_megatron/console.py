"""Lines for people: what the package logs, on rank 0, above the progress bar where there is one to see.

Modules log with `logging.getLogger(__name__)`: info for what a user follows, warning for what he may have to change.
"""

from __future__ import annotations

import logging
import sys
import warnings

from tqdm import tqdm


class ConsoleHandler(logging.Handler):
    """Writes information to standard output and the rest to standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record as a line."""
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        if sys.stderr.isatty():
            tqdm.write(self.format(record), file=stream)
        else:
            print(self.format(record), file=stream, flush=True)


def set_up_logging(*, is_first: bool, with_information: bool) -> None:
    """Let rank 0 write the package's warnings, and its information where the user wants it; other ranks errors alone.

    What libraries say at every start about optional packages that this stack leaves out on purpose is silenced.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    package = logging.getLogger("remax_megatron")
    package.handlers, package.propagate = [ConsoleHandler()], False
    package.setLevel((logging.INFO if with_information else logging.WARNING) if is_first else logging.ERROR)
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # absent on the CPU stack on purpose
    for module in ("megatron", "torch", "transformers", "vllm"):
        warnings.filterwarnings("ignore", module=module)
