"""A graph in fp16 or bf16: which nodes are lowered, which stay in fp32 and why, and the casts between them.

Inputs and outputs of the graph stay float32, but for those that the caller names (a decoder's caches), and so do:

* squares, their sums and roots (`SUMS`), and what is divided by such a root: the sum of the squares of 4,096 values of
  4 is 65,536, more than fp16 can say, and an epsilon of 1e-12 is zero there. LayerNormalization and RMSNormalization
  are lowered: their standard (`stash_type`) says that they compute in float32 whatever their inputs are;
* angles (`ANGLES`): above 2,048 fp16 holds no odd number, so positions would fall together;
* what feeds these alone by simple arithmetic or by moving data;
* nodes that the opset does not define for the format (bf16: Conv before opset 22); in bf16 ONNX Runtime's own
  operators, those that it has no kernel for on GPUs (`WITHOUT_BF16`), and the scale of an RMS norm, which it fuses with
  the norm to one that reads fp32 and writes bf16, and has no kernel for either;
* nodes the caller keeps, and those that read a stored value which the format cannot hold.

Softmax is lowered: runtimes subtract the largest score and add up in float32. A stored value below the format's range
is the fill of a mask, minus infinity in effect; it becomes `FILL`, to which a score can still be added.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from converters.precision.given import matching
from converters.variants import CONTRIB
from deploy_prune.errors import UnsupportedModelError

LARGEST = {"fp16": 65504.0, "bf16": float.fromhex("0x1.fep127")}
FILL = -30000.0  # exp of it is 0 in every format; half of fp16's range is left for the score added to it
SUMS = ("Pow", "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2", "Sqrt", "Reciprocal", "CumSum")
ANGLES = ("Sin", "Cos", "Range")
STEEP = ("Exp", "Log", "Softplus", "ReduceLogSumExp")
WITHOUT_BF16 = ("ReduceMax",)  # ONNX Runtime 1.31 on an H200 refuses a graph with one in bf16
REASONS = {
    **dict.fromkeys(SUMS, "squares, sums and roots"),
    **dict.fromkeys(ANGLES, "positions"),
    **dict.fromkeys(STEEP, "leaves the range for ordinary inputs"),
}
_SIMPLE = (
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Neg",
    "Transpose",
    "Concat",
    "Unsqueeze",
    "Squeeze",
    "Reshape",
    "Expand",
    "Slice",
)
_SHAPES = ("Shape", "Size")  # these read no values
_TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_TYPE_NAMES = {"fp16": "tensor(float16)", "bf16": "tensor(bfloat16)"}


@dataclass
class Lowered:
    """What was done. `kept`: node -> why it stays in fp32; `rounded`: every computed or given value that is stored in
    the format, by its name in the fp32 graph; `fills`: the stored mask fills that became `FILL`."""

    kept: dict[str, str] = field(default_factory=dict)
    rounded: set[str] = field(default_factory=set)
    fills: list[str] = field(default_factory=list)


def lower(model: ir.Model, precision: str, keep: Sequence[str] = (), narrow: Collection[str] = ()) -> Lowered:
    """Turn an fp32 graph into a half precision, in place. `keep` are names or patterns of nodes that stay in fp32,
    `narrow` names of the graph's inputs and outputs that are given in the format.

    Raises UsageError for a pattern that names no node, UnsupportedModelError for control flow.
    """
    common.ShapeInferencePass()(model)
    found = _Lowering(model, precision, keep, narrow).run()
    common.RemoveUnusedNodesPass()(model)
    return found


class _Lowering:
    """`low` maps an fp32 value to its cast to the format, `high` a value in the format to its cast to fp32."""

    def __init__(self, model: ir.Model, precision: str, keep: Sequence[str], narrow: Collection[str]) -> None:
        self.graph, self.precision, self.keep, self.narrow = model.graph, precision, keep, narrow
        self.type, self.largest = _TYPES[precision], LARGEST[precision]
        self.opset = model.opset_imports.get("", 1)
        self.found = Lowered()
        self.lowered: set[ir.Node] = set()
        self.low: dict[ir.Value, ir.Value] = {}
        self.high: dict[ir.Value, ir.Value] = {}

    def run(self) -> Lowered:
        nodes = list(self.graph)
        self.lowered = self._choose(nodes)
        for given in self.graph.inputs:
            if given.name in self.narrow:
                given.type = ir.TensorType(self.type)
        for node in nodes:
            if node in self.lowered:
                for i, value in enumerate(node.inputs):
                    if value is not None and value.dtype == ir.DataType.FLOAT:
                        node.replace_input_with(i, self._lowered(value))
                for value in node.outputs:
                    if _is_float(value, node):
                        self._lower_output(value)
            elif node.op_type not in _SHAPES:
                for i, value in enumerate(node.inputs):
                    if value is not None and value.dtype == self.type:
                        node.replace_input_with(i, self._cast(self.high, value, ir.DataType.FLOAT, "fp32"))
        for made in list(self.graph.outputs):
            if made.name in self.narrow and made.dtype == ir.DataType.FLOAT:  # of a node that stays in fp32
                self.found.rounded.add(str(made.name))
                self._give_out(made, "fp32", self.type)
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self.graph.initializers[name]
        return self.found

    def _choose(self, nodes: Sequence[ir.Node]) -> set[ir.Node]:
        """The nodes that compute in the format."""
        kept: dict[ir.Node, str] = {}
        touched: list[ir.Node] = []
        for node in nodes:
            if any(
                attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
                for attribute in node.attributes.values()
            ):
                raise UnsupportedModelError(
                    f"control flow cannot be lowered to {self.precision}", where=f"{node.name} ({node.op_type})"
                )
            if node.op_type in (*_SHAPES, "Cast", "ConstantOfShape", "Constant"):
                continue
            values = [v for v in (*node.inputs, *node.outputs) if v is not None and _is_float(v, node)]
            if values:
                touched.append(node)
                if why := self._reason(node):
                    kept[node] = why
        asked = matching(self.keep, {node.name or "" for node in nodes})
        kept |= dict.fromkeys((node for node in touched if (node.name or "") in asked), "asked for")
        for node in reversed(touched):
            readers = [reader for value in node.outputs for reader in value.consumers()]
            reasons = {kept.get(reader) for reader in readers}
            given_out = any(value.is_graph_output() for value in node.outputs)
            if node not in kept and readers and not given_out and len(reasons) == 1:
                (why,) = reasons
                if why in ("squares, sums and roots", "positions") and (
                    node.op_type in _SIMPLE or (why == "positions" and node.op_type == "MatMul")
                ):
                    kept[node] = why
        self.found.kept = {str(node.name): kept[node] for node in nodes if node in kept}
        return {node for node in touched if node not in kept}

    def _reason(self, node: ir.Node) -> str | None:
        """Why a node stays in fp32, by itself."""
        if node.domain == CONTRIB:
            return "an operator of ONNX Runtime" if self.precision == "bf16" else None
        if self.precision == "bf16" and node.op_type in WITHOUT_BF16:
            return "no kernel for GPUs"
        if self.precision == "bf16" and node.op_type == "Mul" and any(_normed(value) for value in node.inputs):
            return "the scale of a norm"
        if node.op_type in REASONS:
            return REASONS[node.op_type]
        if _divides_by_root(node):
            return REASONS["Sqrt"]  # as one norm in fp32, which runtimes fuse with the casts around it
        if not self._defined(node):
            return f"not defined for {self.precision} in opset {self.opset}"
        for value in node.inputs:
            stored = _stored(value)
            if stored is not None and value is not None and self._beyond(stored) and not self._fill(stored):
                return f"reads {value.name}, which holds {_extreme(stored):.3g}"
        return None

    def _defined(self, node: ir.Node) -> bool:
        """Whether the operator's standard admits the format for every float it reads and makes."""
        schema = onnx.defs.get_schema(node.op_type, self.opset)
        allowed = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
        for values, formal in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
            for i, value in enumerate(values):
                if value is not None and _is_float(value, node):
                    kind = formal[min(i, len(formal) - 1)].type_str
                    if _TYPE_NAMES[self.precision] not in allowed.get(kind, {kind}):
                        return False
        return True

    def _beyond(self, stored: np.ndarray) -> bool:
        finite = stored[np.isfinite(stored)]
        return bool(finite.size) and float(np.abs(finite).max()) > self.largest

    def _fill(self, stored: np.ndarray) -> bool:
        """Whether all that is out of range is below it."""
        return not (stored[np.isfinite(stored)] > self.largest).any()

    def _lowered(self, value: ir.Value) -> ir.Value:
        if value in self.low:
            return self.low[value]
        stored = _stored(value)
        if stored is None:
            self.found.rounded.add(str(value.name))
            return self._cast(self.low, value, self.type, self.precision)
        name = str(value.name)
        if self._beyond(stored):
            self.found.fills.append(name)
            stored = filled(stored, self.largest)
        if value.is_graph_output() or any(user.node not in self.lowered for user in value.uses()):
            name += f".{self.precision}"  # others go on to read it in fp32
        else:
            del self.graph.initializers[name]
            value.name = f"{name}.fp32"
        tensor = ir.tensor(stored.astype(self.type.numpy()), dtype=self.type, name=name)
        made = ir.Value(name=name, shape=value.shape, type=ir.TensorType(self.type), const_value=tensor)
        self.graph.register_initializer(made)
        self.low[value] = made
        return made

    def _cast(self, known: dict[ir.Value, ir.Value], value: ir.Value, to: ir.DataType, suffix: str) -> ir.Value:
        """The cast of a value, made once, right behind what makes the value."""
        if value not in known:
            out = ir.Value(name=f"{value.name}.{suffix}", shape=value.shape, type=ir.TensorType(to))
            node = ir.node("Cast", [value], {"to": to.value}, outputs=[out], name=f"{out.name}.cast")
            self._insert(value, node)
            known[value] = out
        return known[value]

    def _insert(self, value: ir.Value, node: ir.Node) -> None:
        producer = value.producer()
        if producer is not None:
            self.graph.insert_after(producer, node)
        else:
            self.graph.insert_before(self.graph[0], node)

    def _lower_output(self, value: ir.Value) -> None:
        """Mark a value as stored in the format; the graph still gives it out in fp32, unless that is to be narrow."""
        self.found.rounded.add(str(value.name))
        value.type = ir.TensorType(self.type)
        if value.is_graph_output() and value.name not in self.narrow:
            self.high[value] = self._give_out(value, self.precision, ir.DataType.FLOAT)

    def _give_out(self, value: ir.Value, suffix: str, to: ir.DataType) -> ir.Value:
        """Give an output of the graph out as another type, under its own name; the value itself gets a suffix."""
        name = str(value.name)
        value.name = f"{name}.{suffix}"
        out = ir.Value(name=name, shape=value.shape, type=ir.TensorType(to))
        self._insert(value, ir.node("Cast", [value], {"to": to.value}, outputs=[out], name=f"{name}.cast"))
        self.graph.outputs[self.graph.outputs.index(value)] = out
        return out


def filled(stored: np.ndarray, largest: float, fill: float = FILL) -> np.ndarray:
    """A stored tensor with `fill` for every finite value below the range of a format."""
    return np.where(np.isfinite(stored) & (stored < -largest), np.float32(fill), stored).astype(np.float32)


def _is_float(value: ir.Value, node: ir.Node) -> bool:
    """Whether a value is float32; what an operator of ONNX Runtime makes is, where nothing is said of it."""
    return value.dtype == ir.DataType.FLOAT or (
        value.dtype is None and node.domain == CONTRIB and value.producer() is node
    )


def _divides_by_root(node: ir.Node) -> bool:
    divisor = node.inputs[1].producer() if node.op_type == "Div" and node.inputs[1] is not None else None
    return divisor is not None and divisor.op_type == "Sqrt"


def _normed(value: ir.Value | None) -> bool:
    producer = None if value is None else value.producer()
    return producer is not None and _divides_by_root(producer)


def _stored(value: ir.Value | None) -> np.ndarray | None:
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    return value.const_value.numpy() if value.const_value.dtype == ir.DataType.FLOAT else None


def _extreme(stored: np.ndarray) -> float:
    finite = stored[np.isfinite(stored)]
    return float(finite[np.abs(finite).argmax()])
