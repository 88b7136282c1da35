"""Running quantized layers: `QuantLinear`, its specification, and the caches and backends behind it."""

from ptq.runtime.linear import QuantLinear
from ptq.runtime.spec import QuantSpec

__all__ = ["QuantLinear", "QuantSpec"]
