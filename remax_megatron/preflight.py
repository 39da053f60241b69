"""What a run would read, checked without a run.

    python -m remax_megatron.preflight [--config-name NAME] [--config-dir DIR] [key=value ...]

It takes the trainer's own settings, reads the tokenizer and every row of the data, renders and counts the prompts,
looks whether each ground truth can be satisfied, and loads the user's reward in a process of its own. Nothing is
trained and no engine is started. Exit code: 0, or 2 with an `error:` line, under which up to ten rows are named.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from remax_megatron.config import cli
from remax_megatron.inputs import prepare_inputs, summary
from remax_megatron.temporary import own_temporary_folder


def main(argv: Sequence[str] | None = None) -> int:
    """Check, and print what would be used."""
    request = cli.parse(sys.argv[1:] if argv is None else argv)
    config, facts, notes = cli.load_and_validate(request, None)
    began = time.monotonic()
    with own_temporary_folder(), cli.reported_errors():
        inputs = prepare_inputs(config, facts)
    for note in (*notes, *inputs.notes):
        print("note:", note)
    for line in summary(config, inputs):
        print(line)
    print(f"the data and the reward are fine ({time.monotonic() - began:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
