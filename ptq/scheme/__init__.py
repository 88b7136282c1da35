"""How a layer is quantized: number formats, changes of basis, and the scheme that names both for a layer.

Numerics, bit layout and golden vectors: docs/formats.md.
"""

from ptq.scheme.format import FORMATS, Codes, Format, FormatError, get_format, register_format
from ptq.scheme.hadamard import (
    BLOCK_SIZES,
    hadamard_matrix,
    rotate_hessian,
    rotate_input,
    rotate_weight,
    rotation_scales,
)
from ptq.scheme.hif4 import HiF4
from ptq.scheme.learned import (
    decode_blocks,
    encode_blocks,
    hadamard_blocks,
    restore_weight,
    transform_hessian,
    transform_input,
    transform_weight,
)
from ptq.scheme.mxfp4 import MXFP4
from ptq.scheme.smoothing import smooth_hessian, smooth_input, smooth_weight

register_format(MXFP4())
register_format(HiF4())

__all__ = [
    "BLOCK_SIZES",
    "FORMATS",
    "Codes",
    "Format",
    "FormatError",
    "decode_blocks",
    "encode_blocks",
    "get_format",
    "hadamard_blocks",
    "hadamard_matrix",
    "register_format",
    "restore_weight",
    "rotate_hessian",
    "rotate_input",
    "rotate_weight",
    "rotation_scales",
    "smooth_hessian",
    "smooth_input",
    "smooth_weight",
    "transform_hessian",
    "transform_input",
    "transform_weight",
]
