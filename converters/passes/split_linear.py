"""One linear layer whose output is cut up along its width becomes several, each with its rows of the weight.

timm computes query, key and value by one layer and takes them apart by a five-dimensional transposition and slices,
which a runtime executes as copies. Slices of a stored weight cost nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from converters.passes.linear import Linear, linear_at, stored_alone
from converters.passes.match import Builder, constant, dims, integer, ints, reader, replace
from converters.passes.stored import Part, parts_of


@dataclass(frozen=True)
class _Piece:
    """Columns `start` to `stop` of a layer's output, read as `value`: rows of tokens, or (heads, d) behind a view."""

    start: int
    stop: int
    value: ir.Value
    heads: int | None = None


class SplitLinear(ir.passes.InPlacePass):
    """Rewrites `Split(linear(x))`, `Slice(linear(x))` and timm's packed view to separate layers.

    Requires weights stored under the names of `passes.stored`. Afterwards no column is computed twice: a layer is left
    alone unless its pieces cover its output exactly once.
    """

    def __init__(self, weights: Collection[str]) -> None:
        super().__init__()
        self.weights = weights

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            linear = linear_at(node, self.weights) if node.graph is model.graph else None
            if linear is None or not stored_alone(linear):
                continue
            pieces = _pieces(linear)
            if pieces is None or not _tile(pieces, linear.outputs) or len(parts_of(str(linear.weight.name))) != 1:
                continue
            _rewrite(model.graph, linear, pieces)
            modified = True
        return ir.passes.PassResult(model, modified)


def _tile(pieces: list[_Piece], width: int) -> bool:
    edges = sorted((piece.start, piece.stop) for piece in pieces)
    return edges[0][0] == 0 and edges[-1][1] == width and all(a[1] == b[0] for a, b in itertools.pairwise(edges))


def _pieces(linear: Linear) -> list[_Piece] | None:
    """How the output is cut up, or None when something reads it otherwise."""
    only = reader(linear.y)
    if only is not None and only.op_type == "Reshape":
        return _packed_view(linear, only)
    pieces: list[_Piece] = []
    shape = dims(linear.y)
    if shape is None:
        return None
    for node in linear.y.consumers():
        found = list(_flat(node, len(shape) - 1, linear.outputs))
        if not found:
            return None
        pieces += found
    return pieces if len(pieces) > 1 else None


def _flat(node: ir.Node, last: int, width: int) -> Iterator[_Piece]:
    """Pieces that a Split or a Slice along the last axis takes."""
    if node.op_type == "Split" and integer(node, "axis", 0) in (-1, last) and len(node.inputs) > 1:
        sizes = constant(node.inputs[1])
        if sizes is not None:
            edges = [0, *np.cumsum(sizes).tolist()]
            for output, start, stop in zip(node.outputs, edges[:-1], edges[1:], strict=True):
                yield _Piece(start, stop, output)
    elif node.op_type == "Slice" and (span := _span(node, (-1, last), width)) is not None:
        yield _Piece(*span, node.outputs[0])


def _span(node: ir.Node, axes: tuple[int, ...], length: int) -> tuple[int, int] | None:
    """(start, stop) of a Slice along one of `axes` alone, in steps of one."""
    values = [constant(value) for value in node.inputs[1:5]]
    if any(v is None or v.size != 1 for v in values) or len(values) < 3:
        return None
    start, stop, axis, *step = (int(v.reshape(-1)[0]) for v in values if v is not None)
    if axis not in axes or (step and step[0] != 1):
        return None
    start, stop = (edge + length if edge < 0 else min(edge, length) for edge in (start, stop))
    return (start, stop) if start < stop else None


def _packed_view(linear: Linear, view: ir.Node) -> list[_Piece] | None:
    """timm's view: (..., 3, heads, d) -> transposed to (3, batch, heads, tokens, d) -> one index each."""
    shape, turn = dims(view.outputs[0]), reader(view.outputs[0])
    if shape is None or len(shape) != 5 or turn is None or turn.op_type != "Transpose":
        return None
    count, heads, size = shape[2:]
    if ints(turn, "perm") != [2, 0, 3, 1, 4] or not all(isinstance(n, int) for n in (count, heads, size)):
        return None
    assert isinstance(count, int) and isinstance(heads, int) and isinstance(size, int)
    if count * heads * size != linear.outputs:
        return None
    pieces, each = [], heads * size
    for cut in turn.outputs[0].consumers():
        span = _span(cut, (0, -5), count) if cut.op_type == "Slice" else None
        squeeze = reader(cut.outputs[0]) if span is not None else None
        if span is None or span[1] - span[0] != 1 or squeeze is None or squeeze.op_type != "Squeeze":
            return None
        pieces.append(_Piece(span[0] * each, span[1] * each, squeeze.outputs[0], heads))
    return pieces or None


def _rewrite(graph: ir.Graph, linear: Linear, pieces: list[_Piece]) -> None:
    build = Builder(graph, linear.nodes[-1])
    lead = (dims(linear.y) or ())[:-1]
    for piece in sorted(pieces, key=lambda piece: piece.start):
        size = piece.stop - piece.start
        weight = _rows(build, linear.weight, piece)
        (y,) = build.node("MatMul", [linear.x, weight], like=linear.y, shape=(*lead, size))
        if linear.bias is not None:
            (y,) = build.node("Add", [y, _rows(build, linear.bias, piece)], like=linear.y, shape=(*lead, size))
        if piece.heads is not None:
            y = _by_head(build, y, lead, piece.heads, size // piece.heads)
        replace(piece.value, y)
    del graph.initializers[str(linear.weight.name)]
    if linear.bias is not None:
        del graph.initializers[str(linear.bias.name)]


def _by_head(build: Builder, y: ir.Value, lead: tuple[int | str | None, ...], heads: int, size: int) -> ir.Value:
    """(batch, tokens, heads · d) -> (batch, heads, tokens, d)."""
    batch, tokens = lead
    target = [-1, tokens if isinstance(tokens, int) else 0, heads, size]
    (y,) = build.node("Reshape", [y, build.integers(target, "heads.shape")], like=y, shape=(batch, tokens, heads, size))
    (y,) = build.node("Transpose", [y], like=y, shape=(batch, heads, tokens, size), perm=[0, 2, 1, 3])
    return y


def _rows(build: Builder, stored: ir.Value, piece: _Piece) -> ir.Value:
    """The initialiser with a piece's columns of a weight stored (in, out), or entries of a bias."""
    (part,) = parts_of(str(stored.name))
    first = part.start or 0
    values = constant(stored)
    assert values is not None
    name = Part(part.parameter, first + piece.start, first + piece.stop, part.transposed).name
    return build.constant(np.ascontiguousarray(values[..., piece.start : piece.stop]), name)
