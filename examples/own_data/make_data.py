"""Writes prompts of your own as JSON lines: 512 subtractions to train on and 64 others to validate with.

    python examples/own_data/make_data.py --local_dir runs/own-data-files

`row` shows the schema. Parquet with the same columns is read as well; `remax_megatron.data.schema` writes it.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

NUM_TRAIN, NUM_VAL = 512, 64


def row(first: int, second: int, index: int) -> dict[str, Any]:
    """One prompt. `prompt`, `data_source` and `reward_model.ground_truth` are required; `extra_info` is not."""
    question = f"Anna has {first} coins and loses {second}. How many coins does Anna have left?"
    return {
        "data_source": "my_sums",  # your own name: such a run needs custom_reward_function.path
        "prompt": [{"role": "user", "content": f'{question} Give the final answer after "####".'}],
        "reward_model": {"style": "rule", "ground_truth": str(first - second)},
        "extra_info": {"index": index, "first": first, "second": second},  # goes to the reward function as it is
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes train.jsonl and val.jsonl.")
    parser.add_argument("--local_dir", type=Path, required=True, help="folder for the two files")
    folder = parser.parse_args().local_dir
    pairs = [(first, second) for first in range(3, 81) for second in range(1, first)]
    random.Random(0).shuffle(pairs)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", pairs[:NUM_TRAIN]), ("val", pairs[NUM_TRAIN : NUM_TRAIN + NUM_VAL])):
        lines = [json.dumps(row(*pair, index)) + "\n" for index, pair in enumerate(part)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
        print(f"{folder / name}.jsonl: {len(lines)} prompts")


if __name__ == "__main__":
    main()
