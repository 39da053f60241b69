"""Hugging Face folder -> Megatron checkpoint; see --help and remax_megatron.convert.hf_to_megatron."""

import sys

from remax_megatron.convert.hf_to_megatron import main

if __name__ == "__main__":
    sys.exit(main())
