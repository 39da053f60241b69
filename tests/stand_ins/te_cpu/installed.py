"""Transformer Engine on a CPU, in place once this is imported; see `tests.stand_ins.te_cpu.load.install`."""

from tests.stand_ins.te_cpu.load import install

install()
