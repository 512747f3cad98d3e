"""Reading a graph backwards: what made a value, whether anyone else reads it, and what a constant says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir

if TYPE_CHECKING:
    import numpy as np

STANDARD = ""


def made_by(value: ir.Value | None, op: str, domain: str = STANDARD) -> ir.Node | None:
    """The node that makes `value` when it is an `op`."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != op or (node.domain if node.domain != "ai.onnx" else "") != domain:
        return None
    return node


def only_read_by(value: ir.Value, node: ir.Node) -> bool:
    """Whether `node` alone reads `value`, once, and the graph does not give it out."""
    return len(value.uses()) == 1 and value.consumers() == (node,) and not value.is_graph_output()


def reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads `value`; None when several do, or the graph gives it out."""
    return value.consumers()[0] if len(value.uses()) == 1 and not value.is_graph_output() else None


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The values of an initialiser or of a Constant node's tensor; None for what is computed."""
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """The one number of a constant of one element."""
    values = constant(value)
    return None if values is None or values.size != 1 else float(values.reshape(-1)[0])


def ints(node: ir.Node, name: str) -> list[int]:
    """An integer-list attribute, empty when absent."""
    return list(node.attributes[name].as_ints()) if name in node.attributes else []


def integer(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def dims(value: ir.Value) -> tuple[int | str | None, ...] | None:
    """The shape: an integer for a fixed dimension, its name for a dynamic one, None for an unknown one."""
    if value.shape is None:
        return None
    return tuple(d if isinstance(d, int) else d.value for d in value.shape)


def width(value: ir.Value) -> int | None:
    """The last dimension when it is fixed."""
    shape = dims(value)
    return shape[-1] if shape and isinstance(shape[-1], int) else None


class Builder:
    """Makes nodes and constants for one graph; nodes come in front of the node `before`."""

    def __init__(self, graph: ir.Graph, before: ir.Node) -> None:
        self.graph, self.before = graph, before

    def node(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        *,
        domain: str = STANDARD,
        outputs: int = 1,
        like: ir.Value | None = None,
        shape: Iterable[int | str | None] | None = None,
        **attributes: int | float | str | Sequence[int],
    ) -> list[ir.Value]:
        """The outputs of a new node; `like` gives the first one's type, `shape` its shape."""
        made = ir.node(op, inputs, attributes, domain=domain, num_outputs=outputs)
        self.graph.insert_before(self.before, made)
        first = made.outputs[0]
        if like is not None:
            first.type = like.type
        if shape is not None:
            first.shape = ir.Shape(tuple(shape))
        return list(made.outputs)

    def constant(self, values: np.ndarray, hint: str) -> ir.Value:
        """A new initialiser; equal ones are merged later."""
        name, count = hint, 0
        while name in self.graph.initializers:
            count += 1
            name = f"{hint}.{count}"
        tensor = ir.tensor(values, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(values.shape), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def integers(self, values: Sequence[int], hint: str) -> ir.Value:
        import numpy as np

        return self.constant(np.array(values, np.int64), hint)


def replace(old: ir.Value, new: ir.Value) -> None:
    """Let every reader of `old`, and the graph's outputs, have `new` under the old name where it is given out."""
    if old.is_graph_output():
        new.name, old.name = old.name, None
    if new.shape is None:
        new.shape = old.shape
    if new.type is None:
        new.type = old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)
