"""Transformer Engine's layers on a CPU, in this process and in all ranks of the tests that run beside those here."""

import os

os.environ["REMAX_TEST_LAYERS"] = "transformer_engine"

import tests.stand_ins.te_cpu.installed  # noqa: E402, F401  before anything imports Megatron
