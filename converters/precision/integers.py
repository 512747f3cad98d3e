"""The format of 8 or 4 bits that a precision names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from converters.precision.formats import WEIGHT_ONLY, Precision
from converters.precision.int8 import Calibrate, Quantized, quantize
from converters.precision.weight_only import Rounding, quantize_weights

if TYPE_CHECKING:
    import numpy as np


def to_integers(
    source: Path,
    target: Path,
    precision: Precision,
    batches: Sequence[Mapping[str, np.ndarray]],
    *,
    keep: Sequence[str],
    calibrate: Calibrate,
    percentile: float,
    reduce_range: bool,
    rounding: Rounding,
    block: int,
) -> Quantized:
    """Write the fp32 file `source` in one of the integer precisions to `target`; `batches` are for int8-static and for
    int4-weight-only with compensated rounding. Raises NoLayerError for a graph without a linear layer."""
    if precision in WEIGHT_ONLY:
        return quantize_weights(source, target, precision, keep, batches if rounding == "compensated" else (), block)
    return quantize(
        source,
        target,
        batches=batches if precision == "int8-static" else None,
        calibrate=calibrate,
        percentile=percentile,
        keep=keep,
        reduce_range=reduce_range,
    )
