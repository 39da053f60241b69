"""The entry: `torchrun --nproc-per-node N -m remax_megatron [--config-name NAME] [key=value ...]`; see --help.

Settings are read and checked before torch is imported, and long before a process group or an engine exists.
"""

import os
import sys

from remax_megatron.config import cli

# What libraries say at every start about parts that this stack leaves out on purpose; a user's own value wins.
QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "TORCH_CPP_LOG_LEVEL": "ERROR", "TOKENIZERS_PARALLELISM": "false"}


def main() -> None:
    request = cli.parse(sys.argv[1:])
    config, facts, notes = cli.load_and_validate(request, int(os.environ.get("WORLD_SIZE", "1")))
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    from remax_megatron.run import run

    run(config, facts, notes)


if __name__ == "__main__":
    main()
