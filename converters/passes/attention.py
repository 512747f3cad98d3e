"""softmax(s·Q Kᵀ + M) V as one of ONNX Runtime's own operators instead of ten standard ones.

`Attention` takes the tokens and the weights of query, key and value side by side, and needs no transposition at all;
`MultiHeadAttention` takes the three projections. Both allow values of another width than queries and keys, which a
pruned layer has, and a scale that is not 1/√d, which it keeps from before the cut.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from converters.passes.linear import Linear, linear_that_made, stored_alone
from converters.passes.match import Builder, constant, dims, ints, made_by, reader, replace, scalar, width
from converters.passes.stored import parts_of, side_by_side
from converters.variants import CONTRIB


@dataclass(frozen=True)
class Attended:
    """One attention: `query`, `key`, `value` (batch, tokens, heads · width), `out` the same, from head-wise nodes."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    heads: int
    scale: float
    mask: ir.Value | None
    out: ir.Value


class FuseAttention(ir.passes.InPlacePass):
    """Replaces head-wise attention by com.microsoft's Attention, or MultiHeadAttention where that cannot be.

    Requires projections apart (`SplitLinear`). Attention whose queries or keys are changed by head between projection
    and product (rotary embedding, norms) and grouped heads stay as they are.
    """

    def __init__(self, weights: Collection[str]) -> None:
        super().__init__()
        self.weights = weights

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            found = attention_at(node) if node.op_type == "Softmax" and not node.domain else None
            if found is None:
                continue
            last = found.out.producer()
            assert last is not None
            build = Builder(model.graph, last)
            packed = self._packed(build, found)
            replace(found.out, packed if packed is not None else _three(build, found))
            modified = True
        if modified:
            model.graph.opset_imports[CONTRIB] = 1
        return ir.passes.PassResult(model, modified)

    def _packed(self, build: Builder, found: Attended) -> ir.Value | None:
        """Attention over one packed weight, where the three are plain layers of the same tokens."""
        made = [linear_that_made(value, self.weights) for value in (found.query, found.key, found.value)]
        layers = [layer for layer in made if layer is not None]
        if len(layers) < 3 or any(layer.x is not layers[0].x or layer.bias is None for layer in layers):
            return None
        if not all(stored_alone(layer) for layer in layers):
            return None
        if len(dims(layers[0].x) or ()) != 3 or any(reader(layer.y) is None for layer in layers):
            return None
        weight, bias = self._beside(build, layers, "weight"), self._beside(build, layers, "bias")
        (out,) = build.node(
            "Attention",
            [layers[0].x, weight, bias] + ([None, None, found.mask] if found.mask else []),
            domain=CONTRIB,
            like=found.out,
            shape=dims(found.out),
            num_heads=found.heads,
            scale=found.scale,
            qkv_hidden_sizes=[layer.outputs for layer in layers],
        )
        return out

    def _beside(self, build: Builder, layers: list[Linear], which: str) -> ir.Value:
        stored = [layer.weight if which == "weight" else layer.bias for layer in layers]
        parts = [part for value in stored if value is not None for part in parts_of(str(value.name))]
        rows = {p.parameter: 0 for p in parts}
        for value in stored:
            assert value is not None
            for part in parts_of(str(value.name)):
                rows[part.parameter] = max(rows[part.parameter], part.stop or width(value) or 0)
        values = [constant(value) for value in stored]
        name = side_by_side(parts, lambda parameter: rows[parameter])
        for value in stored:
            assert value is not None
            del build.graph.initializers[str(value.name)]
        return build.constant(np.concatenate([v for v in values if v is not None], axis=-1), name)


def _three(build: Builder, found: Attended) -> ir.Value:
    inputs: list[ir.Value | None] = [found.query, found.key, found.value]
    if found.mask is not None:
        inputs += [None, None, found.mask]
    (out,) = build.node(
        "MultiHeadAttention",
        inputs,
        domain=CONTRIB,
        like=found.out,
        shape=dims(found.out),
        num_heads=found.heads,
        scale=found.scale,
    )
    return out


def attention_at(softmax: ir.Node) -> Attended | None:
    """The attention around a Softmax over the last axis, when its heads are views of projections."""
    scores, shape = softmax.inputs[0], dims(softmax.outputs[0])
    if scores is None or shape is None or len(shape) != 4 or not isinstance(shape[1], int):
        return None
    mask = None
    if (add := made_by(scores, "Add")) is not None:
        scores, mask = add.inputs
        if made_by(scores, "MatMul") is None and made_by(scores, "Mul") is None:
            scores, mask = mask, scores
        if mask is None or not _is_mask(mask, shape[1]):
            return None
    scale = 1.0
    scores, scale = _unscaled(scores, scale)
    product = made_by(scores, "MatMul")
    if product is None:
        return None
    query, scale = _unscaled(product.inputs[0], scale)
    key, scale = _unscaled(product.inputs[1], scale)
    weighted = reader(softmax.outputs[0])
    if weighted is None or weighted.op_type != "MatMul" or weighted.inputs[0] is not softmax.outputs[0]:
        return None
    turned = reader(weighted.outputs[0])
    view = reader(turned.outputs[0]) if turned is not None and turned.op_type == "Transpose" else None
    if turned is None or view is None or view.op_type != "Reshape" or ints(turned, "perm") != [0, 2, 1, 3]:
        return None
    out = view.outputs[0]
    if len(dims(out) or ()) != 3 or not isinstance((dims(out) or ())[-1], int):
        return None
    parts = [_by_token(query, (0, 2, 1, 3)), _by_token(key, (0, 2, 3, 1)), _by_token(weighted.inputs[1], (0, 2, 1, 3))]
    q, k, v = parts
    if q is None or k is None or v is None:
        return None
    return Attended(q, k, v, shape[1], scale, mask, out)


def _is_mask(mask: ir.Value, heads: int) -> bool:
    """Whether what is added to the scores has the four dimensions that the operators take."""
    shape = dims(mask)
    return shape is not None and len(shape) == 4 and shape[1] in (1, heads)


def _unscaled(value: ir.Value | None, scale: float) -> tuple[ir.Value | None, float]:
    """(x, scale · c) of a product x · c with a number."""
    times = made_by(value, "Mul")
    if times is None:
        return value, scale
    for x, c in (tuple(times.inputs), tuple(times.inputs)[::-1]):
        number = scalar(c)
        if number is not None:
            return x, scale * number
    return value, scale


def _by_token(value: ir.Value | None, perm: tuple[int, ...]) -> ir.Value | None:
    """The (batch, tokens, heads · width) of which `value` is the view by head, transposed by `perm` altogether."""
    order = [0, 1, 2, 3]
    while (turn := made_by(value, "Transpose")) is not None:
        order = [ints(turn, "perm")[i] for i in order] if len(ints(turn, "perm")) == 4 else []
        value = turn.inputs[0]
        if len(order) != 4:
            return None
    view = made_by(value, "Reshape")
    if tuple(order) != perm or view is None or view.inputs[0] is None:
        return None
    before, after = dims(view.inputs[0]), dims(view.outputs[0])
    if before is None or after is None or len(before) != 3 or len(after) != 4 or before[1] != after[1]:
        return None
    return view.inputs[0] if before[0] == after[0] else None
