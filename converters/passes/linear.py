"""A linear layer as the exporter writes it: MatMul with a stored weight, and the Add of its bias."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import onnx_ir as ir

from converters.passes.match import made_by, reader, width
from converters.passes.stored import holds


@dataclass(frozen=True)
class Linear:
    """y = x W + b; `nodes` are its MatMul and, with a bias, its Add. `weight` is stored (in, out)."""

    x: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    y: ir.Value
    nodes: tuple[ir.Node, ...]

    @property
    def outputs(self) -> int:
        outputs = width(self.weight)
        assert outputs is not None
        return outputs


def stored_alone(linear: Linear) -> bool:
    """Whether weight and bias serve this layer only, so that they may be cut up or joined (blocks may share them)."""
    return all(len(value.uses()) == 1 for value in (linear.weight, linear.bias) if value is not None)


def linear_at(node: ir.Node, weights: Collection[str]) -> Linear | None:
    """The linear layer whose MatMul is `node`; an Add of a bias belongs to it when nothing else reads the product."""
    if node.op_type != "MatMul" or node.domain:
        return None
    x, weight = node.inputs
    if x is None or weight is None or not _stored(weight, weights, rank=2) or x.is_initializer():
        return None
    y = node.outputs[0]
    after = reader(y)
    if after is not None and after.op_type == "Add" and not after.domain:
        bias = after.inputs[1] if after.inputs[0] is y else after.inputs[0]
        if bias is not None and _stored(bias, weights, rank=1) and bias.shape == ir.Shape([weight.shape[1]]):  # type: ignore[index]
            return Linear(x, weight, bias, after.outputs[0], (node, after))
    return Linear(x, weight, None, y, (node,))


def linear_that_made(value: ir.Value | None, weights: Collection[str]) -> Linear | None:
    """The linear layer whose output is `value`."""
    add = made_by(value, "Add")
    for source in add.inputs if add is not None else [value]:
        product = made_by(source, "MatMul")
        found = None if product is None else linear_at(product, weights)
        if found is not None and found.y is value:
            return found
    return None


def _stored(value: ir.Value, weights: Collection[str], rank: int) -> bool:
    return (
        value.is_initializer() and holds(value.name, weights) and value.shape is not None and len(value.shape) == rank
    )
