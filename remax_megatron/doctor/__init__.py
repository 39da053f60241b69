"""The look before a run: `python -m remax_megatron.doctor`; see `__main__`."""
