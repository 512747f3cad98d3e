"""The largest magnitude of every value of a graph on calibration data: what must fit into a narrower format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from deploy_prune.errors import ArtifactError, UnsupportedModelError

if TYPE_CHECKING:
    import numpy as np
    import onnx

SUFFIX = "/largest"


def magnitudes(
    model: onnx.ModelProto, path: Path, values: Iterable[str], batches: Iterable[Mapping[str, np.ndarray]]
) -> dict[str, float]:
    """max|x| of each of the `values`, over all `batches`, as the fp32 graph computes them. `path` names it in errors.

    Raises ArtifactError for a value that is NaN or infinite in fp32 already; the minus infinity of a mask is meant.
    """
    import numpy as np
    import onnx
    from onnx import helper

    from converters.onnx_session import OnnxSession

    measured = onnx.ModelProto()
    measured.CopyFrom(model)
    graph = measured.graph
    names = sorted(values)
    for name in names:
        finite = f"{name}/finite"
        graph.node.append(helper.make_node("Abs", [name], [f"{name}/abs"], name=f"{name}/abs"))
        graph.node.append(
            helper.make_node("IsInf", [name], [f"{name}/infinite"], name=f"{name}/inf", detect_positive=0)
        )
        graph.node.append(
            helper.make_node("Where", [f"{name}/infinite", "/nought", f"{name}/abs"], [finite], name=finite)
        )
        graph.node.append(helper.make_node("ReduceMax", [finite], [name + SUFFIX], name=name + SUFFIX, keepdims=0))
    graph.initializer.append(helper.make_tensor("/nought", onnx.TensorProto.FLOAT, [], [0.0]))
    del graph.output[:]
    for name in names:
        graph.output.append(helper.make_tensor_value_info(name + SUFFIX, onnx.TensorProto.FLOAT, []))
    session = OnnxSession(path, content=measured.SerializeToString())
    largest = dict.fromkeys(names, 0.0)
    for batch in batches:
        for name, found in zip(names, session.run_all(batch), strict=True):
            if not np.isfinite(found):
                raise ArtifactError("the fp32 graph computes NaN or infinity", where=str(path), got=f"value {name}")
            largest[name] = max(largest[name], float(found))
    return largest


def overflowing(largest: Mapping[str, float], limit: float) -> dict[str, float]:
    """The values beyond `limit`, with their magnitudes."""
    return {name: value for name, value in largest.items() if value > limit}


def around(model: onnx.ModelProto, values: Iterable[str]) -> dict[str, list[str]]:
    """Value -> the nodes that make and read it: all must stay in fp32 for it never to be rounded."""
    wanted = {name: list[str]() for name in values}
    for node in model.graph.node:
        for name in {*node.input, *node.output} & wanted.keys():
            wanted[name].append(node.name)
    return wanted


def refuse_overflow(
    model: onnx.ModelProto, path: Path, beyond: Mapping[str, float], precision: str, limit: float
) -> None:
    """Raise UnsupportedModelError that names every node which makes a value too large for the format."""
    makers = {output: node for node in model.graph.node for output in node.output}
    problems = []
    for name, value in beyond.items():
        node = makers.get(name)
        said = f"node {node.name} ({node.op_type})" if node is not None else f"input {name}"
        problems.append(f"{said} makes values up to {value:.4g}")
    if problems:
        raise UnsupportedModelError(
            f"values overflow in {precision}",
            where=str(path),
            expected=f"at most {limit:.6g} on the calibration data",
            problems=problems[:20],
            remedy="Keep what makes and reads them in fp32 (precision.overflow=keep, or precision.keep=[NODE, ...], "
            "of a decoder with a cache precision.keep_decoder), or take bf16, which has fp32's range.",
        )


def refuse_caches(beyond: Mapping[str, float], path: Path, precision: str) -> None:
    """Raise UnsupportedModelError for caches of a decoder that are too large for the format they are given in."""
    if beyond:
        raise UnsupportedModelError(
            f"caches overflow in {precision}",
            where=str(path),
            problems=[f"{name} reaches {value:.4g}" for name, value in beyond.items()][:20],
            remedy="Take bf16, which has fp32's range, or leave this model in fp32.",
        )
