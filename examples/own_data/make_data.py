"""Writes prompts of your own as JSON lines: 1280 subtractions to train on and 128 others to validate with.

    python examples/own_data/make_data.py --local_dir runs/own-data-files

`row` shows the schema. Parquet with the same columns is read as well; `remax_megatron.data.schema` writes it.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

NUM_TRAIN, NUM_VAL = 1280, 128
NAMES = [
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Grace",
    "Henry",
    "Ida",
    "Jonas",
    "Lena",
    "Max",
    "Nora",
    "Tom",
]


def row(name: str, first: int, second: int, index: int) -> dict[str, Any]:
    """One prompt. `prompt`, `data_source` and `reward_model.ground_truth` are required; `extra_info` is not."""
    question = f"{name} has {first} coins and loses {second}. How many coins does {name} have left?"
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
    sums = [(name, rest + second, second) for name in NAMES for rest in range(1, 11) for second in range(1, 12)]
    random.Random(0).shuffle(sums)
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in (("train", sums[:NUM_TRAIN]), ("val", sums[NUM_TRAIN : NUM_TRAIN + NUM_VAL])):
        lines = [json.dumps(row(*numbers, index)) + "\n" for index, numbers in enumerate(part)]
        (folder / f"{split}.jsonl").write_text("".join(lines))
        print(f"{folder / split}.jsonl: {len(lines)} prompts")


if __name__ == "__main__":
    main()
