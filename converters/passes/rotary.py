"""Rotary embedding as one node: x·cos + (−x₂, x₁)·sin, x₁ and x₂ the halves of x, is ONNX Runtime's RotaryEmbedding.

The operator takes tables of cos and sin for half the dimensions, one row per position, the same for all heads. A pruned
layer may have another table for each head; then heads take the place of positions: (batch, heads, tokens, width) is
read as one head of heads · tokens positions, with a table of as many rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from converters.passes.match import Builder, constant, dims, integer, ints, made_by, replace, scalar
from converters.variants import CONTRIB

_ELEMENTWISE = ("Cos", "Sin", "Cast")


@dataclass(frozen=True)
class _Turned:
    """`x` (batch, heads, tokens, width) and its tables, (1 or batch, 1 or heads, tokens, width), halves alike."""

    x: ir.Value
    cos: ir.Value
    sin: ir.Value


class FuseRotary(ir.passes.InPlacePass):
    """Replaces rotary embedding of four-dimensional queries and keys.

    Requires shapes, and tables whose two halves are the same by how they are made. Other embeddings (interleaved
    dimensions, a part of the width only) stay.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        made: dict[tuple[ir.Value, str], ir.Value] = {}
        modified = False
        for node in list(model.graph):
            found = _turned(node) if node.op_type == "Add" and not node.domain else None
            if found is None:
                continue
            replace(node.outputs[0], _rotary(Builder(model.graph, node), found, made))
            modified = True
        if modified:
            model.graph.opset_imports[CONTRIB] = 1
        return ir.passes.PassResult(model, modified)


def _rotary(build: Builder, found: _Turned, made: dict[tuple[ir.Value, str], ir.Value]) -> ir.Value:
    """The embedding of `found.x`; tables and positions that were `made` for an earlier one are used again."""
    shape = dims(found.x) or ()
    batch, heads, _, width = shape
    rows, by_head = (dims(found.cos) or ())[0], (dims(found.cos) or ())[1] != 1
    for table in (found.cos, found.sin):
        if (table, "half") not in made:
            made[table, "half"] = _half(build, table, int(width or 0))
    x = found.x
    if by_head:
        lead = 1 if rows == batch else 0  # tokens and heads of all examples, or of each
        x = _view(build, x, [lead or 0, 1, -1, int(width or 0)], (1 if lead else batch, 1, None, width))
    shared = by_head or rows != batch
    place = "start" if shared else "positions"
    key = (found.cos, place)
    if key not in made:
        made[key] = build.integers([0], "positions.start") if shared else _positions(build, found.cos)
    (y,) = build.node(
        "RotaryEmbedding",
        [x, made[key], made[found.cos, "half"], made[found.sin, "half"]],
        domain=CONTRIB,
        like=x,
        shape=dims(x),
    )
    if not by_head:
        return y
    if rows != batch:
        return _view(build, y, [0, int(heads or 0), -1, int(width or 0)], shape)
    (target,) = build.node("Shape", [found.x])
    target.type, target.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([4])
    (back,) = build.node("Reshape", [y, target], like=y, shape=shape)
    return back


def _half(build: Builder, table: ir.Value, width: int) -> ir.Value:
    """The first half of a table's columns as rows: (positions, width / 2)."""
    ends = [build.integers([n], "rotary.edge") for n in (0, width // 2, -1)]
    shape = dims(table) or ()
    (half,) = build.node("Slice", [table, *ends], like=table, shape=(*shape[:-1], width // 2))
    return _view(build, half, [-1, width // 2], (None, width // 2))


def _positions(build: Builder, table: ir.Value) -> ir.Value:
    """Which row of a table with rows for every example and token is whose: (batch, tokens), counted through."""
    int64 = ir.TensorType(ir.DataType.INT64)
    (batch,) = build.node("Shape", [table], start=0, end=1)
    (tokens,) = build.node("Shape", [table], start=2, end=3)
    (sizes,) = build.node("Concat", [batch, tokens], axis=0)
    (count,) = build.node("ReduceProd", [sizes], keepdims=0)
    zero, one = (build.constant(np.array(n, np.int64), "rotary.count") for n in (0, 1))
    (counted,) = build.node("Range", [zero, count, one])
    (ids,) = build.node("Reshape", [counted, sizes])
    for value, shape in ((batch, [1]), (tokens, [1]), (sizes, [2]), (count, []), (counted, [None]), (ids, [None] * 2)):
        value.type, value.shape = int64, ir.Shape(shape)
    return ids


def _view(build: Builder, value: ir.Value, target: list[int], shape: tuple[int | str | None, ...]) -> ir.Value:
    (view,) = build.node("Reshape", [value, build.integers(target, "rotary.shape")], like=value, shape=shape)
    return view


def _turned(add: ir.Node) -> _Turned | None:
    """The embedding whose last node is `add`."""
    for straight, crossed in (tuple(add.inputs), tuple(add.inputs)[::-1]):
        first, second = made_by(straight, "Mul"), made_by(crossed, "Mul")
        if first is None or second is None:
            continue
        for swapped, sin in (tuple(second.inputs), tuple(second.inputs)[::-1]):
            x = _swapped(swapped)
            if x is None or sin is None:
                continue
            cos = next((b for a, b in (tuple(first.inputs), tuple(first.inputs)[::-1]) if a is x), None)
            if cos is not None and _fits(x, cos, sin) and _halves_alike(cos) and _halves_alike(sin):
                return _Turned(x, cos, sin)
    return None


def _fits(x: ir.Value, cos: ir.Value, sin: ir.Value) -> bool:
    shape, table = dims(x), dims(cos)
    if shape is None or table is None or len(shape) != 4 or len(table) != 4 or dims(sin) != table:
        return False
    if not isinstance(shape[1], int) or not isinstance(shape[3], int) or shape[3] % 2:
        return False
    return table[0] in (1, shape[0]) and table[1] in (1, shape[1]) and table[2:] == shape[2:]


def _swapped(value: ir.Value | None) -> ir.Value | None:
    """x of Concat(−x₂, x₁)."""
    joined = made_by(value, "Concat")
    if joined is None or len(joined.inputs) != 2 or integer(joined, "axis", 0) not in (-1, 3):
        return None
    minus, first = made_by(joined.inputs[0], "Neg"), joined.inputs[1]
    if minus is None:
        return None
    low, high = _part(first), _part(minus.inputs[0])
    if low is None or high is None or low[0] is not high[0]:
        return None
    width = (dims(low[0]) or (None,))[-1]
    whole = isinstance(width, int) and low[1:] == (0, width // 2) and high[1:] == (width // 2, width)
    return low[0] if whole else None


def _part(value: ir.Value | None) -> tuple[ir.Value, int, int] | None:
    """(x, start, stop) of what a Slice or an even Split takes of the last of four dimensions."""
    node = None if value is None else value.producer()
    x = node.inputs[0] if node is not None and node.inputs else None
    width = None if x is None or dims(x) is None else (dims(x) or (None,))[-1]
    if node is None or node.domain or x is None or not isinstance(width, int):
        return None
    if node.op_type == "Split" and integer(node, "axis", 0) in (-1, 3) and len(node.outputs) == 2:
        sizes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        half = width // 2 if sizes is None else int(sizes[0])
        return (x, 0, half) if value is node.outputs[0] else (x, half, width)
    if node.op_type == "Slice" and len(node.inputs) >= 4:
        values = [constant(v) for v in node.inputs[1:5]]
        if any(v is None or v.size != 1 for v in values):
            return None
        start, stop, axis, *step = (int(v.reshape(-1)[0]) for v in values if v is not None)
        if axis in (-1, 3) and step in ([], [1]):
            return x, start + width if start < 0 else min(start, width), stop + width if stop < 0 else min(stop, width)
    return None


def _halves_alike(table: ir.Value | None) -> bool:
    """Whether the last dimension of a table is made of the same numbers twice over."""
    node = None if table is None else table.producer()
    if node is None or node.domain:
        return False
    if node.op_type == "Concat":
        rank = len(dims(node.outputs[0]) or ())
        return len(node.inputs) == 2 and node.inputs[0] is node.inputs[1] and integer(node, "axis", 0) in (-1, rank - 1)
    if node.op_type == "Mul":
        return any(
            scalar(b) is not None and _halves_alike(a) for a, b in (tuple(node.inputs), tuple(node.inputs)[::-1])
        )
    if node.op_type == "Unsqueeze":
        axes, rank = constant(node.inputs[1]), len(dims(node.outputs[0]) or ())
        return axes is not None and not {-1, rank - 1} & set(axes.tolist()) and _halves_alike(node.inputs[0])
    if node.op_type in _ELEMENTWISE:
        return _halves_alike(node.inputs[0])
    return node.op_type == "Transpose" and _picked_alike(node)


def _picked_alike(last: ir.Node) -> bool:
    """The same of columns picked for every head: (…, columns) -> columns first -> (heads, picked, …) -> picked last."""
    picked = made_by(last.inputs[0], "GatherND")
    first = made_by(picked.inputs[0], "Transpose") if picked is not None else None
    if picked is None or first is None or integer(picked, "batch_dims", 0) != 0:
        return False
    index, table = constant(picked.inputs[1]), dims(first.inputs[0]) if first.inputs[0] is not None else None
    if index is None or table is None or index.ndim != 3 or index.shape[-1] != 1:
        return False
    half = index.shape[1] // 2
    return (
        ints(first, "perm")[0] == len(table) - 1
        and ints(last, "perm")[-1] == 1
        and bool((index[:, :half] == index[:, half:]).all())
    )
