"""Linear layers, norms and activations work on rows of tokens: (batch, tokens, width) becomes (rows, width) once.

On two dimensions a linear layer with its bias is one Gemm, and the activation after it one node: ONNX Runtime's kernel
for a bias fused into the activation (BiasGelu) takes twice as long as Gelu alone, and the one it fuses a residual and
a norm into (SkipLayerNormalization) six times as long as Add and LayerNormalization (bench/notes.md, "Export").
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from converters.passes.linear import Linear, linear_at
from converters.passes.match import Builder, constant, dims, integer, made_by, replace

UNARY = {"Gelu", "Erf", "Relu", "Sigmoid", "Tanh", "Sqrt", "Reciprocal", "Neg", "Exp", "HardSwish", "Elu", "Softplus"}
BINARY = {"Add", "Sub", "Mul", "Div", "Pow"}
NORMS = {"LayerNormalization"}


class FlatTokens(ir.passes.InPlacePass):
    """Moves everything that treats tokens alike to two dimensions; shapes of other nodes' inputs are restored.

    Requires shapes on values; what has none stays. A linear layer starts it, so models without one are not touched.
    """

    def __init__(self, weights: Collection[str]) -> None:
        super().__init__()
        self.weights = weights

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return ir.passes.PassResult(model, _Flattening(model.graph, self.weights).run())


class _Flattening:
    """`flat` maps a value of three or more dimensions to its rows, (product of the leading ones, last)."""

    def __init__(self, graph: ir.Graph, weights: Collection[str]) -> None:
        self.graph, self.weights = graph, weights
        self.flat: dict[ir.Value, ir.Value] = {}
        self.lead: dict[ir.Value, ir.Value] = {}  # rows -> the value that still has the leading dimensions

    def run(self) -> bool:
        for node in list(self.graph):
            if node.graph is not self.graph:  # went with another
                continue
            linear = linear_at(node, self.weights)
            if linear is not None and self._deep(linear.x):
                self._linear(linear)
            elif node.op_type == "Reshape" and node.inputs[0] in self.flat and self._absolute(node):
                node.replace_input_with(0, self.flat[node.inputs[0]])  # type: ignore[index]
            elif not node.domain:
                self._by_row(node)
        return bool(self.flat)

    def _deep(self, value: ir.Value) -> bool:
        shape = dims(value)
        return shape is not None and len(shape) > 2 and isinstance(shape[-1], int)

    def _absolute(self, node: ir.Node) -> bool:
        """Whether a Reshape's target speaks of no dimension of its input (no 0 that copies one)."""
        shape = constant(node.inputs[1])
        return integer(node, "allowzero", 0) == 1 or (shape is not None and 0 not in shape)

    def _rows(self, value: ir.Value, before: ir.Node) -> ir.Value:
        """`value` as rows; a Reshape is made for a value that has none yet."""
        if value not in self.flat:
            build = Builder(self.graph, before)
            view = made_by(value, "Reshape")
            source = view.inputs[0] if view is not None else value
            last = (dims(value) or ())[-1]
            (rows,) = build.node(
                "Reshape", [source, build.integers([-1, int(last or 0)], "rows.shape")], like=value, shape=(None, last)
            )
            self.flat[value], self.lead[rows] = rows, value
        return self.flat[value]

    def _linear(self, linear: Linear) -> None:
        build = Builder(self.graph, linear.nodes[-1])
        rows = self._rows(linear.x, linear.nodes[0])
        if linear.bias is None:
            (y,) = build.node("MatMul", [rows, linear.weight], like=linear.y, shape=(None, linear.outputs))
        else:
            (y,) = build.node("Gemm", [rows, linear.weight, linear.bias], like=linear.y, shape=(None, linear.outputs))
        self._put(build, linear.y, y, self.lead[rows])
        for node in reversed(linear.nodes):
            self.graph.remove(node, safe=True)

    def _by_row(self, node: ir.Node) -> None:
        """A node that treats every token alike, one of whose inputs is already rows."""
        x = node.inputs[0] if node.inputs else None
        if node.op_type in UNARY:
            inputs = [self._known(x)]
        elif node.op_type in NORMS and x is not None:
            shape = dims(x) or ()
            whole = integer(node, "axis", -1) in (-1, len(shape) - 1) and len(node.outputs) == 1
            inputs = [self._known(x) if whole else None, *node.inputs[1:]]
        elif node.op_type == "ReduceMean":
            inputs = [self._known(x) if _over_last(node) else None, *node.inputs[1:]]
        elif node.op_type in BINARY:
            inputs = self._pair(node)
        else:
            return
        if not inputs or inputs[0] is None or (node.op_type in BINARY and inputs[1] is None):
            return
        build = Builder(self.graph, node)
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        if node.op_type in NORMS:
            attributes["axis"] = -1
        out = node.outputs[0]
        (y,) = build.node(node.op_type, inputs, like=out, shape=(None, (dims(out) or (None,))[-1]), **attributes)
        lead = next(self.lead[value] for value in inputs if value in self.lead)
        self._put(build, out, y, lead)
        self.graph.remove(node, safe=True)

    def _known(self, value: ir.Value | None) -> ir.Value | None:
        return None if value is None else self.flat.get(value)

    def _pair(self, node: ir.Node) -> list[ir.Value | None]:
        """Both inputs as rows: two of the same shape, one of them already rows, or rows and a row or a number."""
        a, b = node.inputs
        if a is None or b is None or not (a in self.flat or b in self.flat):
            return []
        shape, other = dims(a), dims(b)
        if shape is None or other is None:
            return []
        if shape == other and None not in shape:
            return [self._rows(a, node), self._rows(b, node)]
        if a in self.flat and b in self.flat and _by_token(shape, other):
            return [self.flat[a], self.flat[b]]
        rows: list[ir.Value | None] = []
        for value, its in ((a, shape), (b, other)):
            if value in self.flat:
                rows.append(self.flat[value])
            else:
                rows.append(value if len(its) <= 1 else None)
        return rows if None not in rows else []

    def _put(self, build: Builder, old: ir.Value, rows: ir.Value, lead: ir.Value) -> None:
        """Let `rows` stand for `old`; readers that need its dimensions get them back by a Reshape."""
        (restored,) = build.node("Reshape", [rows, self._target(build, lead, dims(old) or ())], like=old)
        restored.shape = old.shape
        replace(old, restored)
        self.flat[restored], self.lead[rows] = rows, lead

    def _target(self, build: Builder, lead: ir.Value, shape: tuple[int | str | None, ...]) -> ir.Value:
        if sum(not isinstance(d, int) for d in shape) <= 1:
            return build.integers([d if isinstance(d, int) else -1 for d in shape], "restored.shape")
        (front,) = build.node("Shape", [lead], start=0, end=len(shape) - 1)
        last = build.integers([int(shape[-1] or 0)], "restored.width")
        (target,) = build.node("Concat", [front, last], axis=0)
        for value, size in ((front, len(shape) - 1), (target, len(shape))):
            value.type, value.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([size])
        return target


def _over_last(node: ir.Node) -> bool:
    """Whether a reduction gives one number per token."""
    axes = constant(node.inputs[1]) if len(node.inputs) == 2 else None
    return axes is not None and axes.tolist() == [-1] and integer(node, "keepdims", 1) == 1


def _by_token(shape: tuple[int | str | None, ...], other: tuple[int | str | None, ...]) -> bool:
    """Whether one of two values has one number for each token of the other."""
    return shape[:-1] == other[:-1] and None not in shape[:-1] and 1 in (shape[-1], other[-1])
