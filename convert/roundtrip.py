"""There and back, and compare; see --help and remax_megatron.convert.roundtrip."""

import sys

from remax_megatron.convert.roundtrip import main

if __name__ == "__main__":
    sys.exit(main())
