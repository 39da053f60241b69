"""Compare two checkpoints of either kind; see --help and remax_megatron.convert.verify."""

import sys

from remax_megatron.convert.verify import main

if __name__ == "__main__":
    sys.exit(main())
