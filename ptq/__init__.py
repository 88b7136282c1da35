"""W4A4 post-training quantization (HiF4, MXFP4) for Wan 2.2, Wan 2.1 and other diffusion transformers.

Importing this package registers its checkpoints with diffusers: `WanPipeline.from_pretrained("out/")` then loads them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ptq.checkpoint.register import register_with_diffusers
from ptq.version import __version__

if TYPE_CHECKING:
    from ptq import formats
    from ptq.quantization.module import quantize_module
    from ptq.wan.loading import load_pipeline

__all__ = ["__version__", "formats", "load_pipeline", "quantize_module"]

register_with_diffusers()


def __getattr__(name: str) -> Any:
    # Heavy parts load on first use: `ptq --help` must not import torch.
    if name == "formats":
        import importlib

        return importlib.import_module("ptq.formats")
    if name == "load_pipeline":
        from ptq.wan.loading import load_pipeline

        return load_pipeline
    if name == "quantize_module":
        from ptq.quantization.module import quantize_module

        return quantize_module
    raise AttributeError(f"module 'ptq' has no attribute {name!r}")
