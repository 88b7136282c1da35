"""How a layer is quantized: number formats, changes of basis, and the scheme that names both for a layer.

Numerics, bit layout and golden vectors: docs/formats.md. To add a format or a transform: docs/extending.md.
"""

from ptq.errors import FormatError
from ptq.scheme.format import FORMATS, Codes, Format, get_format, register_format
from ptq.scheme.hadamard import Hadamard
from ptq.scheme.hif4 import HiF4
from ptq.scheme.learned import Learned
from ptq.scheme.mxfp4 import MXFP4
from ptq.scheme.placement import Placement
from ptq.scheme.scheme import Scheme
from ptq.scheme.smoothing import Smoothed
from ptq.scheme.transform import TRANSFORMS, Transform, get_transform, register_transform

register_format(MXFP4())
register_format(HiF4())

__all__ = [
    "FORMATS",
    "MXFP4",
    "TRANSFORMS",
    "Codes",
    "Format",
    "FormatError",
    "Hadamard",
    "HiF4",
    "Learned",
    "Placement",
    "Scheme",
    "Smoothed",
    "Transform",
    "get_format",
    "get_transform",
    "register_format",
    "register_transform",
]
