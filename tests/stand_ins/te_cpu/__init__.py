"""Transformer Engine's own Python layers on a CPU, with real numbers; only its compiled half is replaced.

    compiled.py   stands for `transformer_engine_torch`: what a dense model in float32 or bfloat16 calls of it
    cuda.py       what Transformer Engine's modules see of CUDA: one H100 whose memory is the CPU's
    load.py       `install()`: puts both in place; needs the pure wheel in the folder .te (`make test-te` brings it)
    installed.py  importing it calls `install()`: for the `preload` of `tests.ranks.run_ranks`

It says nothing about kernels: no speed, no memory, no rounding but "float32 inside, one rounding of the result", no
limits of cuDNN on shapes, no streams, no NCCL. FP8, mixtures of experts, context parallelism, LayerNorm, GELU, dropout
and overlapped GEMMs are not there; calling them raises NotImplementedError with the name.
Written for transformer-engine 2.19 with megatron-core 0.16.1 and 0.19.2. The package itself never imports it.
"""
