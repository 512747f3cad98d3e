"""Proved fp32 graphs in fp16, bf16 and int8, each proved against its fp32 twin."""

from converters.precision.convert import PrecisionReport, convert_precision
from converters.precision.formats import HALF, LIMITS, PRECISIONS, Limit, Precision

__all__ = ["HALF", "LIMITS", "PRECISIONS", "Limit", "Precision", "PrecisionReport", "convert_precision"]
