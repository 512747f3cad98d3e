"""What a half-precision file computes, on a CPU that has no kernels for it: every value it stores is rounded.

ONNX Runtime on the CPU runs an fp16 file in fp32 and drops the casts in between, so that nothing is rounded and nothing
overflows; bf16 it does not run at all. Here the file is turned into an fp32 graph in which each value of the format is
cast to it and back. Sums inside an operator are made in float32, as tensor cores make them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from converters.variants import CONTRIB
from deploy_prune.errors import ArtifactError

if TYPE_CHECKING:
    import numpy as np
    import onnx

    from converters.onnx_session import OnnxSession

_HALF = (10, 16)  # TensorProto.FLOAT16, BFLOAT16
_FLOAT = 1


class Emulated:
    """A half-precision file, asked like an OnnxSession; made when first asked."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @cached_property
    def session(self) -> OnnxSession:
        """It takes and gives float32 alone. Raises ArtifactError when the file cannot be computed."""
        import onnx

        from converters.onnx_session import OnnxSession

        content = emulated(onnx.load(self.path)).SerializeToString()
        return OnnxSession(self.path, content=content)

    def run(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """The first output. Raises ArtifactError when the file cannot be computed."""
        return self.session.run(inputs)


def emulated(model: onnx.ModelProto) -> onnx.ModelProto:
    """An fp32 graph that computes what a half-precision one does; the argument is used up. Inputs of the format are
    given as float32, of values that it holds.

    Raises ArtifactError for a value whose type is not known, which could otherwise go unrounded.
    """
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.shape_inference.infer_shapes(model)
    graph = model.graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    types |= {i.name: i.data_type for i in graph.initializer}
    for stored in graph.initializer:
        if stored.data_type in _HALF:
            values = numpy_helper.to_array(stored).astype("float32")
            stored.CopyFrom(numpy_helper.from_array(values, stored.name))
    nodes = []
    for node in graph.node:
        rounding = []
        for i, name in enumerate(node.output):
            kind = types.get(name)
            if kind is None and name and (not node.domain or node.domain == CONTRIB):
                raise ArtifactError("the type of a value is not known", where=f"{node.name} ({node.op_type})", got=name)
            if kind in _HALF:
                node.output[i] = f"{name}/exact"
                rounding += [
                    helper.make_node("Cast", [f"{name}/exact"], [f"{name}/rounded"], to=kind, name=f"{name}/round"),
                    helper.make_node("Cast", [f"{name}/rounded"], [name], to=_FLOAT, name=f"{name}/widen"),
                ]
        if node.op_type == "Cast" and rounding:
            to = next(a for a in node.attribute if a.name == "to")
            to.i = _FLOAT
        nodes += [node, *rounding]
    for given in (*graph.input, *graph.output):
        if given.type.tensor_type.elem_type in _HALF:
            given.type.tensor_type.elem_type = _FLOAT
    kept = [v for v in graph.value_info if types[v.name] not in _HALF]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.value_info.extend(kept)
    return model
