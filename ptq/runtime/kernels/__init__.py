"""Triton kernels of the W4A4 runtime, one a file, each beside the torch function it must equal.

    hadamard_quantize   x -> smooth, rotate, quantize -> packed codes, FP8 or bfloat16
    expand_weight       packed weight -> FP8 or bfloat16 scratch
    gemm_fp8            FP8 x FP8, persistent, TMA descriptors
    gemm_packed         bfloat16 x packed weight, for few rows
    gemm_dot_scaled     packed x packed on Blackwell's block-scaled tensor cores
    ffn_fused           gemm_fp8 whose epilogue is GELU, smooth, rotate, quantize

Nothing is imported here: triton exists on Linux only, and `ptq.runtime.backends` imports a kernel when it runs it.
"""
