"""The weights of a converted file, value by value: each must be the fp32 twin's, rounded to the format and no more (in
4 bits, which may move it first, at most `FURTHEST` off).

Tolerances of outputs must be wide in 8 bits, so wide that a layer with swapped heads might pass; this finds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from converters.precision.blocks import FURTHEST, unpacked
from converters.precision.half import LARGEST, filled
from converters.precision.int8 import QUANTIZED, SCALE, TRANSPOSED, ZERO_POINT

if TYPE_CHECKING:
    import numpy as np

TYPICAL = 0.75  # steps that weights in 4 bits are off in root mean square; 0.30 to 0.46 were seen (single rows: 1.4)
_SLACK = 1e-3  # of a step: scales are float32 and were made in another order than they are checked in


def stored_faults(twin: Path | str, candidate: Path | str, precision: str) -> list[str]:
    """Stored float tensors of the twin that the candidate lacks or holds as something else, in words."""
    import onnx
    from onnx import numpy_helper

    wanted = {i.name: i for i in onnx.load(twin).graph.initializer if i.data_type == onnx.TensorProto.FLOAT}
    held = {i.name: i for i in onnx.load(candidate).graph.initializer}
    faults = []
    for name, tensor in wanted.items():
        want = numpy_helper.to_array(tensor)
        found = list(_steps(name, want, held, precision))
        if not found:
            faults.append(f"{name} is not in the file")
        # The file may hold it twice, for readers in fp32 and others; each must be right.
        wrong = [own for own in found if not own.steps <= own.most + _SLACK]
        if wrong:
            worst = max(wrong, key=lambda own: math.inf if math.isnan(own.steps) else own.steps)
            faults.append(
                f"{name} is off the fp32 weight by {worst.how}{worst.steps:.3g} steps of its format; rounding makes "
                f"{worst.most:.3g} at most"
            )
    return faults


class _Off(NamedTuple):
    """How far a stored tensor is off, by default at its worst value, and what rounding makes `most`, in steps."""

    steps: float
    most: float = 0.5
    how: str = ""


def held_as(name: str, precision: str) -> set[str]:
    """Names under which a file holds a tensor of its twin: as it was, rounded, turned, or in 8 bits with its scales."""
    parts = ("", QUANTIZED, SCALE, ZERO_POINT, QUANTIZED + SCALE, QUANTIZED + ZERO_POINT)
    return {key + part for key in (name, f"{name}.{precision}", name + TRANSPOSED) for part in parts}


def _steps(name: str, want: np.ndarray, held: dict[str, object], precision: str) -> Iterator[_Off]:
    """The largest distance in steps of rounding, for every way in which the file holds a tensor."""
    import numpy as np
    from onnx import numpy_helper

    def array(key: str) -> np.ndarray:
        return np.asarray(numpy_helper.to_array(held[key]))  # type: ignore[arg-type]

    for key, values in ((name, want), (f"{name}.{precision}", want), (name + TRANSPOSED, want.T)):
        if key in held and array(key).shape == values.shape:
            got = array(key)
            if got.dtype == np.float32:
                yield _Off(0.0 if np.array_equal(got, values) else np.inf)
            elif precision in LARGEST:
                yield _Off(0.0 if _rounded(got, values, precision) else np.inf)
        if key + QUANTIZED in held and array(key + QUANTIZED).ndim == values.ndim + 1:
            yield from _distances_in_blocks(key, values, array, held, fine=precision == "int8-weight-only")
        elif key + QUANTIZED in held and array(key + QUANTIZED).shape == values.shape:
            yield _Off(_quantised_distance(key, values, array, held))


def _distances_in_blocks(
    key: str, want: np.ndarray, array: Callable[[str], np.ndarray], held: dict[str, object], *, fine: bool
) -> Iterator[_Off]:
    """Largest |w - s (q - z)| / s of a weight (N, K) that is stored in blocks. `fine` ones have 8 bits; those in 4 may
    be moved before they are rounded, but few are moved far."""
    import numpy as np

    if want.ndim != 2 or key + SCALE not in held:
        yield _Off(math.inf)
        return
    zero = array(key + ZERO_POINT) if key + ZERO_POINT in held else None
    found = unpacked(array(key + QUANTIZED), array(key + SCALE), zero, want.shape[1])
    if found is None or found[0].shape != want.shape or (fine and zero is not None):
        yield _Off(math.inf)
        return
    if not (np.all(found[1] > 0) and np.isfinite(found[1]).all()):
        yield _Off(math.inf)
        return
    off = np.abs(want - found[0]) / found[1]
    yield _Off(float(np.max(off, initial=0.0)), 0.5 if zero is None else FURTHEST)
    if zero is not None:
        yield _Off(float(np.sqrt(np.mean(off * off))), TYPICAL, "in root mean square ")


def _rounded(got: np.ndarray, want: np.ndarray, precision: str) -> bool:
    """Whether stored values are exactly the wanted ones in the format, fills of masks as `half` writes them."""
    import numpy as np

    return np.array_equal(got, filled(want, LARGEST[precision]).astype(got.dtype))


def _quantised_distance(key: str, want: np.ndarray, array: object, held: dict[str, object]) -> float:
    """Largest |w - s (q - z)| / s, with the scales along the axis they fit best."""
    import numpy as np

    def load(name: str) -> np.ndarray:
        return np.asarray(array(name))  # type: ignore[operator]

    q = load(key + QUANTIZED).astype(np.float64)
    scales = next((key + s for s in (SCALE, QUANTIZED + SCALE) if key + s in held), None)
    if scales is None:
        return float("inf")
    scale = load(scales).astype(np.float64)
    zeros = next((key + z for z in (ZERO_POINT, QUANTIZED + ZERO_POINT) if key + z in held), None)
    zero = load(zeros).astype(np.float64) if zeros else np.zeros(())
    distances = []
    for axis in range(want.ndim):
        shape = [1] * want.ndim
        if scale.size not in (1, want.shape[axis]):
            continue
        shape[axis] = scale.size
        s = scale.reshape(shape if scale.size > 1 else [1] * want.ndim)
        z = zero.reshape(shape if zero.size > 1 else [1] * want.ndim)
        with np.errstate(all="ignore"):
            found = np.abs(want - s * (q - z)) / s
        distances.append(float(np.nanmax(np.where(np.isfinite(found), found, np.inf), initial=0.0)))
    return min(distances, default=float("inf"))
