"""x · 1/√(mean(x²) + ε) becomes x / √(mean(x²) + ε), the form of an RMS norm that runtimes know as one.

ONNX Runtime makes its SimplifiedLayerNormalization of nodes in that form when it loads a graph, for CPUs and GPUs; of
the other form, which torch traces, it makes nothing. RMSNormalization, which standard ONNX has from opset 23, has no
kernel for GPUs in ONNX Runtime 1.31 and falls apart there (bench/notes.md, "Export").
"""

from __future__ import annotations

import onnx_ir as ir

from converters.passes.match import Builder, constant, dims, integer, made_by, replace, scalar


class DivideByRoot(ir.passes.InPlacePass):
    """Rewrites the RMS norms over the last dimension, whose axis is -1 from then on.

    A norm whose inner values something else reads stays.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.domain or node.op_type != "Mul":
                continue
            found = _normed(node)
            if found is None:
                continue
            x, root, mean = found
            build, out = Builder(model.graph, node), node.outputs[0]
            mean.replace_input_with(1, build.integers([-1], "norm.axis"))
            (y,) = build.node("Div", [x, root], like=out, shape=dims(out) or ())
            replace(out, y)
            modified = True
        return ir.passes.PassResult(model, modified)


def _normed(times: ir.Node) -> tuple[ir.Value, ir.Value, ir.Node] | None:
    """x, √(mean(x²) + ε) and the mean's node, where `times` is x · 1/√(mean(x²) + ε)."""
    for x, factor in (tuple(times.inputs), tuple(times.inputs)[::-1]):
        inverse = made_by(factor, "Reciprocal")
        root = made_by(inverse.inputs[0], "Sqrt") if inverse is not None else None
        shifted = made_by(root.inputs[0], "Add") if root is not None else None
        if x is None or inverse is None or root is None or shifted is None:
            continue
        inner = (inverse.outputs[0], root.outputs[0], shifted.outputs[0])
        for mean, epsilon in (tuple(shifted.inputs), tuple(shifted.inputs)[::-1]):
            node = _mean_square(mean, x)
            if node is not None and scalar(epsilon) is not None and _only_here(*inner, *node.outputs, *node.inputs[:1]):
                return x, root.outputs[0], node
    return None


def _mean_square(mean: ir.Value | None, x: ir.Value) -> ir.Node | None:
    """The ReduceMean that makes `mean` of the squares of `x` over its last dimension."""
    node, shape = made_by(mean, "ReduceMean"), dims(x)
    if node is None or shape is None or integer(node, "keepdims", 1) != 1 or len(node.inputs) != 2:
        return None
    axes = constant(node.inputs[1])
    if axes is None or axes.tolist() not in ([-1], [len(shape) - 1]):
        return None
    power = made_by(node.inputs[0], "Pow")
    known = power is not None and power.inputs[0] is x and scalar(power.inputs[1]) == 2.0
    return node if known else None


def _only_here(*values: ir.Value | None) -> bool:
    return all(value is not None and len(value.uses()) == 1 for value in values)
