"""Second moments Σ x xᵀ of the inputs of a graph's layers on calibration data, computed where the data runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from deploy_prune.errors import ArtifactError

if TYPE_CHECKING:
    import numpy as np
    import onnx

SUFFIX = "/second_moments"
ENOUGH = 16  # vectors for each of a value's dimensions, after which no more data is read
_AT_ONCE = 2**30  # bytes of matrices that one pass over the data makes


class Moments(NamedTuple):
    """Σ x xᵀ (width, width), float32, over so many `vectors` x."""

    matrix: np.ndarray
    vectors: int


def second_moments(
    model: onnx.ModelProto, path: Path, widths: Mapping[str, int], batches: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, Moments]:
    """Value -> the moments of the vectors on its last axis, of as many of the `batches` as are `ENOUGH`. `path` names
    the graph in errors. Padding counts like text. Raises ArtifactError for values that are not finite."""
    found: dict[str, Moments] = {}
    for part in _parts(widths):
        found |= _summed(model, path, part, batches)
    return found


def _parts(widths: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """The values by groups whose matrices fit together."""
    part: dict[str, int] = {}
    for name, width in widths.items():
        if part and 4 * (sum(w * w for w in part.values()) + width * width) > _AT_ONCE:
            yield part
            part = {}
        part[name] = width
    if part:
        yield part


def _summed(
    model: onnx.ModelProto, path: Path, widths: Mapping[str, int], batches: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, Moments]:
    import numpy as np
    import onnx
    from onnx import helper

    from converters.onnx_session import OnnxSession

    measured = onnx.ModelProto()
    measured.CopyFrom(model)
    graph = measured.graph
    del graph.output[:]
    for name, width in widths.items():
        shape, flat, turned, size, out = (
            f"{name}{part}" for part in ("/flat_shape", "/flat", "/turned", "/size", SUFFIX)
        )
        graph.initializer.append(helper.make_tensor(shape, onnx.TensorProto.INT64, [2], [-1, width]))
        graph.node.append(helper.make_node("Reshape", [name, shape], [flat], name=flat))
        graph.node.append(helper.make_node("Transpose", [flat], [turned], name=turned, perm=[1, 0]))
        graph.node.append(helper.make_node("MatMul", [turned, flat], [out], name=out))
        graph.node.append(helper.make_node("Shape", [flat], [size], name=size))
        graph.output.append(helper.make_tensor_value_info(out, onnx.TensorProto.FLOAT, [width, width]))
        graph.output.append(helper.make_tensor_value_info(size, onnx.TensorProto.INT64, [2]))
    session = OnnxSession(path, content=measured.SerializeToString())
    total = {name: np.zeros((width, width), np.float32) for name, width in widths.items()}
    seen = dict.fromkeys(widths, 0)
    for batch in batches:
        if all(seen[name] >= ENOUGH * width for name, width in widths.items()):
            break
        found = session.run_all(batch)
        for name, matrix, vectors in zip(total, found[::2], found[1::2], strict=True):
            total[name] += matrix
            seen[name] += int(vectors[0])
    if bad := [name for name, matrix in total.items() if not np.isfinite(matrix).all()]:
        raise ArtifactError("the fp32 graph computes NaN or infinity", where=str(path), got=f"value {bad[0]}")
    return {name: Moments(matrix, seen[name]) for name, matrix in total.items()}
