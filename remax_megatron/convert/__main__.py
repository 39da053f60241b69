"""The converters as one command, `remax-convert` once the package is installed.

    python -m remax_megatron.convert hf-to-megatron --hf DIR --output DIR          from Hugging Face to Megatron
    python -m remax_megatron.convert megatron-to-hf --megatron DIR --output DIR    and back
    python -m remax_megatron.convert verify DIR_A [DIR_B]                          two folders, or one and its digests
    python -m remax_megatron.convert roundtrip DIR                                 there, back, compared, removed

`remax-convert NAME --help` prints the options of one of them. Exit codes are those of command.py.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = ("hf-to-megatron", "megatron-to-hf", "verify", "roundtrip")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the converter that the first argument names, with the other arguments; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="remax-convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=COMMANDS)
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = parser.parse_args(arguments[:1]).command
    sys.argv[0] = f"remax-convert {name}"  # what the usage line of the converter shows
    return importlib.import_module(f"remax_megatron.convert.{name.replace('-', '_')}").main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
