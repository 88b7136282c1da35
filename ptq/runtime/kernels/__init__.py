"""Triton kernels of the W4A4 runtime, one a file, each beside the torch function it must equal.

    quantize            x -> change of basis, round -> packed codes, FP8 or bfloat16
    expand_weight       packed weight -> FP8 or bfloat16 scratch
    gemm_fp8            FP8 x FP8, persistent, TMA descriptors
    gemm_packed         bfloat16 x packed weight, for few rows
    gemm_dot_scaled     packed x packed on Blackwell's block-scaled tensor cores

Device functions stand in blocks (for every format), mxfp4 and hif4 (of one), and formats (the switch between those).

Nothing is imported here: triton exists on Linux only, and `ptq.runtime.backends` imports a kernel when it runs it.
"""
