"""Query heads that share a key and value head are stacked, instead of keys and values repeated for each of them.

With k key/value heads for g · k query heads, a product (batch, g·k, L, ·) · repeat(batch, k, ·, ·) is
(batch, k, g·L, ·) · (batch, k, ·, ·): the same numbers without the copies, and k matrix products of g·L rows in
place of g · k of L rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from converters.passes.match import Builder, dims, ints, made_by, replace


@dataclass(frozen=True)
class _Repeated:
    """A product's right side: `shared` (batch, kv heads, rows, columns), `groups` times, `turned` or not after that."""

    shared: ir.Value
    groups: int
    turned: bool


class StackGroups(ir.passes.InPlacePass):
    """Rewrites every product with heads that were repeated by Unsqueeze, Expand and Reshape.

    Requires fixed head counts and widths. Afterwards no head is copied for a product; other readers keep theirs.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.domain or node.op_type != "MatMul" or node.inputs[0] is None:
                continue
            left, out = node.inputs[0], node.outputs[0]
            right = _repeated(node.inputs[1])
            shape, result = dims(left), dims(out)
            if right is None or shape is None or result is None or len(shape) != 4 or len(result) != 4:
                continue
            shared = dims(right.shared) or ()
            kv = shared[1]
            if not isinstance(kv, int) or shape[1] != kv * right.groups or result[1] != shape[1]:
                continue
            build = Builder(model.graph, node)
            (stacked,) = build.node(
                "Reshape", [left, build.integers([0, kv, -1, _size(shape[3])], "stacked.shape")], like=left
            )
            stacked.shape = ir.Shape([shape[0], kv, None, shape[3]])
            factor = right.shared
            if right.turned:
                (factor,) = build.node("Transpose", [factor], like=factor, perm=[0, 1, 3, 2])
                factor.shape = ir.Shape([shared[0], kv, shared[3], shared[2]])
            (product,) = build.node("MatMul", [stacked, factor], like=out, shape=(result[0], kv, None, result[3]))
            (apart,) = build.node(
                "Reshape",
                [product, build.integers([0, shape[1], -1, _size(result[3])], "apart.shape")],
                like=out,
                shape=result,
            )
            replace(out, apart)
            modified = True
        return ir.passes.PassResult(model, modified)


def _size(dim: int | str | None) -> int:
    """A dimension in a Reshape's target: its size, or 0 for the input's own."""
    return dim if isinstance(dim, int) else 0


def _repeated(value: ir.Value | None) -> _Repeated | None:
    turn = made_by(value, "Transpose")
    turned = turn is not None and ints(turn, "perm") == [0, 1, 3, 2]
    joined = made_by(turn.inputs[0] if turn is not None and turned else value, "Reshape")
    copied = made_by(joined.inputs[0], "Expand") if joined is not None else None
    opened = made_by(copied.inputs[0], "Unsqueeze") if copied is not None else None
    if joined is None or copied is None or opened is None or opened.inputs[0] is None:
        return None
    shared, single = dims(opened.inputs[0]), dims(opened.outputs[0])
    many, flat = dims(copied.outputs[0]), dims(joined.outputs[0])
    if shared is None or single is None or many is None or flat is None or (len(shared), len(many)) != (4, 5):
        return None
    groups = many[2]
    if not isinstance(groups, int) or not isinstance(shared[1], int):
        return None
    if single != (*shared[:2], 1, *shared[2:]) or many != (*shared[:2], groups, *shared[2:]):
        return None
    if flat != (shared[0], shared[1] * groups, *shared[2:]):
        return None
    return _Repeated(opened.inputs[0], groups, turned)
