"""What `make demo` trains on, made on the spot and offline: word problems, a tokenizer, a small warm-started policy."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """Where the embedded policy and data are kept between runs: REMAX_CACHE, else the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "remax-megatron"
    return Path(os.environ.get("REMAX_CACHE", default))
