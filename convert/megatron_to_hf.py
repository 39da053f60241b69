"""Megatron checkpoint -> Hugging Face folder; see --help and remax_megatron.convert.megatron_to_hf."""

import sys

from remax_megatron.convert.megatron_to_hf import main

if __name__ == "__main__":
    sys.exit(main())
