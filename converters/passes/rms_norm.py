"""x / √(mean(x²) + ε) · w as one node: RMSNormalization, which standard ONNX has from opset 23.

ONNX Runtime 1.32 on a CPU takes half the time of the six nodes for it, and less for it and the residual's Add than for
its SkipSimplifiedLayerNormalization of the two (bench/notes.md, "Export").
"""

from __future__ import annotations

import onnx_ir as ir

from converters.passes.match import Builder, constant, dims, integer, made_by, replace, scalar, width

OPSET = 23
# Operators that mean something else, or are written otherwise, before opset 21: a graph with one is not raised.
REWORDED = {"DFT", "GridSample", "GroupNormalization"}


class FuseRmsNorm(ir.passes.InPlacePass):
    """Replaces the nodes of an RMS norm over the last dimension.

    Requires opset 23, to which the graph is raised where `may_raise`; below it stays as it is. A norm whose inner
    values something else reads, or whose weight is not one row, stays.
    """

    def __init__(self, *, may_raise: bool) -> None:
        super().__init__()
        self.may_raise = may_raise

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        if (model.opset_imports.get("") or 0) < OPSET and not (self.may_raise and _raisable(model)):
            return ir.passes.PassResult(model, False)
        modified = False
        for node in list(model.graph):
            if node.domain or node.op_type != "Mul":
                continue
            for scaled, weight in (tuple(node.inputs), tuple(node.inputs)[::-1]):
                found = _normed(scaled)
                if found is None or weight is None or dims(weight) != (width(found[0]),):
                    continue
                x, epsilon = found
                build, out = Builder(model.graph, node), node.outputs[0]
                (y,) = build.node(
                    "RMSNormalization", [x, weight], like=out, shape=dims(out) or (), axis=-1, epsilon=epsilon
                )
                replace(out, y)
                modified = True
                break
        if modified:
            model.graph.opset_imports[""] = max(model.opset_imports.get("") or 0, OPSET)
        return ir.passes.PassResult(model, modified)


def _raisable(model: ir.Model) -> bool:
    return not any(not node.domain and node.op_type in REWORDED for node in model.graph)


def _normed(value: ir.Value | None) -> tuple[ir.Value, float] | None:
    """(x, ε) of x · 1/√(mean(x²) + ε), the mean over the last dimension."""
    times = made_by(value, "Mul")
    if times is None or value is None or len(value.uses()) != 1:
        return None
    for x, factor in (tuple(times.inputs), tuple(times.inputs)[::-1]):
        inverse = made_by(factor, "Reciprocal")
        root = made_by(inverse.inputs[0], "Sqrt") if inverse is not None else None
        shifted = made_by(root.inputs[0], "Add") if root is not None else None
        if x is None or shifted is None:
            continue
        for mean, constant_ in (tuple(shifted.inputs), tuple(shifted.inputs)[::-1]):
            epsilon = scalar(constant_)
            if epsilon is not None and _is_mean_square(mean, x):
                return x, epsilon
    return None


def _is_mean_square(mean: ir.Value | None, x: ir.Value) -> bool:
    node, shape = made_by(mean, "ReduceMean"), dims(x)
    if node is None or shape is None or integer(node, "keepdims", 1) != 1 or len(node.inputs) != 2:
        return False
    axes = constant(node.inputs[1])
    if axes is None or axes.tolist() not in ([-1], [len(shape) - 1]):
        return False
    power = made_by(node.inputs[0], "Pow")
    return power is not None and power.inputs[0] is x and scalar(power.inputs[1]) == 2.0
