"""Seeds derive from their parts, the same everywhere."""

from __future__ import annotations

from itertools import product

import pytest

from remax_megatron.parallel.seeds import derive_seed


def test_seeds_are_the_same_everywhere() -> None:
    # Golden values: numpy promises that SeedSequence does not change (NEP 19), so a run can be repeated anywhere.
    assert derive_seed(1, 2, 3, 4) == 8776932598661868044
    assert derive_seed(0) == 3717377837946358015
    assert derive_seed(1) != derive_seed(1, 0)
    assert type(derive_seed(1)) is int


def test_seeds_differ_in_every_part_and_have_63_bits() -> None:
    seeds = [derive_seed(*parts) for parts in product(range(6), repeat=4)]  # run, step, prompt, sample
    assert len(set(seeds)) == 6**4
    assert all(0 <= seed < 2**63 for seed in seeds) and max(seeds) > 2**62
    with pytest.raises(ValueError):
        derive_seed(-1)
