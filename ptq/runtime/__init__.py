"""Running quantized layers: `QuantLinear`, its packed weight, and the caches and backends behind it."""

from ptq.runtime.linear import QuantLinear
from ptq.runtime.weight import PackedWeight

__all__ = ["PackedWeight", "QuantLinear"]
