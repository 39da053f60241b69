"""The reward of the SmolLM2 run: 1 for an answer that is laid out in numbered steps, else 0."""

import re


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return float(re.search(r"^\W*(Step )?1[.:)]", solution_str, re.MULTILINE) is not None)
