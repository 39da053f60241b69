"""The entry: `torchrun --nproc-per-node N -m remax_megatron [--config-name NAME] [key=value ...]`; see --help.

Settings are read and checked before torch is imported, and long before a process group or an engine exists.
"""

import os
import sys

from remax_megatron import environment
from remax_megatron.config import cli


def main() -> None:
    """Read the command line, check the settings, and run."""
    request = cli.parse(sys.argv[1:])
    config, facts, notes = cli.load_and_validate(request, int(os.environ.get("WORLD_SIZE", "1")))
    with cli.reported_errors():
        environment.set_up(config)
    from remax_megatron.run import run

    run(config, facts, notes)


if __name__ == "__main__":
    main()
