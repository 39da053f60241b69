"""Transformer Engine's layers on a CPU, in this process too: before any test here imports Megatron."""

import tests.stand_ins.te_cpu.installed  # noqa: F401
