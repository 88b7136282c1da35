"""Function-preserving changes of basis on weight, input and Hessian. Online order: smooth, rotate, quantize."""

from ptq.transforms.hadamard import (
    BLOCK_SIZES,
    hadamard_matrix,
    rotate_hessian,
    rotate_input,
    rotate_weight,
    rotation_scales,
)
from ptq.transforms.smoothing import smooth_hessian, smooth_input, smooth_weight

__all__ = [
    "BLOCK_SIZES",
    "hadamard_matrix",
    "rotate_hessian",
    "rotate_input",
    "rotate_weight",
    "rotation_scales",
    "smooth_hessian",
    "smooth_input",
    "smooth_weight",
]
