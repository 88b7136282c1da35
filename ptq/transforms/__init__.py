"""Function-preserving changes of basis on weight, input and Hessian. Online order: smooth, rotate, quantize;
a learned transform takes the place of the first two."""

from ptq.transforms.hadamard import (
    BLOCK_SIZES,
    hadamard_matrix,
    rotate_hessian,
    rotate_input,
    rotate_weight,
    rotation_scales,
)
from ptq.transforms.learned import (
    decode_blocks,
    encode_blocks,
    hadamard_blocks,
    restore_weight,
    transform_hessian,
    transform_input,
    transform_weight,
)
from ptq.transforms.smoothing import smooth_hessian, smooth_input, smooth_weight

__all__ = [
    "BLOCK_SIZES",
    "decode_blocks",
    "encode_blocks",
    "hadamard_blocks",
    "hadamard_matrix",
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
