"""Make what the demo trains on: a warm-started policy and two files of word problems. Offline; what is there is kept.

    python -m remax_megatron.demo.prepare [--folder DIR] [--num_steps N] [--family qwen2|qwen3]

writes DIR/policy (a Hugging Face folder; DIR/policy_qwen3 of the other family) and DIR/data/{train,test}.parquet, each
folder whole or not at all. The presets `demo` and `demo_qwen3` read them from the default DIR. It takes one to two
minutes on two cores; when both are there, a second or two.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

FOLDER = Path("runs/demo/inputs")  # that of conf/demo.yaml

# Two threads, whatever a launcher or make has set for the ranks: their number is part of the recipe, because the policy
# is the same to the bit only for the same number. And passive waiting: spinning threads are 5 to 20 times slower beside
# any other busy process. OpenMP reads both when torch is loaded.
THREADS = {"OMP_NUM_THREADS": str(min(2, os.cpu_count() or 1)), "OMP_WAIT_POLICY": "PASSIVE"}


def main(argv: list[str] | None = None) -> int:
    """Prepare the folder of the command line; returns the exit code."""
    assert "torch" not in sys.modules, "the number of threads is set before torch is loaded"
    os.environ |= THREADS
    from remax_megatron.demo.model_config import MODEL_CONFIGS
    from remax_megatron.demo.warm_start import NUM_STEPS, ensure_policy
    from remax_megatron.demo.word_problems import ensure_data
    from remax_megatron.errors import UserError

    parser = argparse.ArgumentParser("python -m remax_megatron.demo.prepare", description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, metavar="DIR", help=f"where to write ({FOLDER})")
    parser.add_argument("--num_steps", type=int, default=NUM_STEPS, metavar="N", help="of the warm start")
    parser.add_argument("--family", choices=MODEL_CONFIGS, default="qwen2", help="of the model (qwen2)")
    options = parser.parse_args(argv)
    try:
        name = "policy" if options.family == "qwen2" else f"policy_{options.family}"
        policy = ensure_policy(options.folder / name, num_steps=options.num_steps, family=options.family)
        data = ensure_data(options.folder / "data")  # last: where the data is, the policy is too
    except (OSError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"the demo's policy: {policy}\nthe demo's data: {', '.join(map(str, data))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
