"""A graph in another precision to be timed and thrown away: written as it ships, proved equal to nothing."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from converters.cache import is_cache
from converters.precision.blocks import BLOCK
from converters.precision.formats import HALF, Precision, check_precision_name
from converters.precision.given import fp32_graph, matched, node_names
from converters.precision.int8 import Calibrate, NoLayerError
from converters.precision.integers import to_integers

if TYPE_CHECKING:
    import numpy as np


def write_timed(
    source: Path,
    target: Path,
    precision: Precision,
    batches: Sequence[Mapping[str, np.ndarray]] = (),
    *,
    keep: Sequence[str] = (),
    calibrate: Calibrate = "minmax",
    percentile: float = 99.999,
    reduce_range: bool = False,
    block: int = BLOCK,
) -> None:
    """Write the fp32 file `source` in `precision` to `target`: the nodes of `convert_precision`, whose options these
    are, without its proof (and without the nodes that a half precision keeps in fp32 for values that overflow).
    `batches` are for int8-static. Patterns of `keep` that name no node of this graph are passed over, and a graph
    without a linear layer stays in fp32 where a format is of linear layers alone.

    Raises UsageError for no precision, and what the conversion raises for a graph that it cannot be done to.
    """
    check_precision_name(precision)
    fp32_graph(source)  # refuses weights beside the file, before a table is measured
    names = node_names(source)
    keep = [pattern for pattern in keep if matched(pattern, names)]
    try:
        if precision in HALF:
            _lower(source, target, precision, keep)
        else:
            to_integers(
                source,
                target,
                precision,
                batches,
                keep=keep,
                calibrate=calibrate,
                percentile=percentile,
                reduce_range=reduce_range,
                rounding="nearest",  # which takes as long to run
                block=block,
            )
    except NoLayerError:
        shutil.copyfile(source, target)


def _lower(source: Path, target: Path, precision: str, keep: Sequence[str]) -> None:
    import onnx_ir as ir

    from converters.precision.half import lower

    model = ir.load(source)
    caches = [value.name for value in (*model.graph.inputs, *model.graph.outputs) if is_cache(value.name or "")]
    lower(model, precision, keep, [name for name in caches if name])
    target.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
