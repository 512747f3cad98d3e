"""Masked scores no further below a row's largest than e⁻⁵⁰ of its weight: a softmax without subnormal numbers.

What a mask shuts out has the lowest float added to its score. ONNX Runtime's CPU kernel bounds the exponent at −88.4
and so computes e^−88.4 = 4·10⁻³⁹ for each of them, a subnormal number, which the processor handles about a hundred
times slower than others: with a causal mask over 128 tokens the softmax takes eight times as long as with none
(bench/notes.md, "Export"). With

    max(s + M, max_row(s + M) − FLOOR)

before it a masked score weighs e⁻⁵⁰ = 2·10⁻²² of the row's largest, which a sum of 32-bit floats does not notice below
10¹⁴ tokens. A row with nothing to attend to stays even.
"""

from __future__ import annotations

import onnx_ir as ir

from converters.passes.match import Builder, constant, dims, integer, made_by

FLOOR = 50.0


class FloorMaskedScores(ir.passes.InPlacePass):
    """Puts the bound in front of every Softmax over the last axis of four-dimensional scores that a computed mask was
    added to; masks that are stored with the graph stay as they are."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        import numpy as np

        modified = False
        for node in list(model.graph):
            scores = node.inputs[0] if node.op_type == "Softmax" and not node.domain else None
            shape = None if scores is None else dims(scores)
            if scores is None or shape is None or len(shape) != 4 or integer(node, "axis", -1) not in (-1, 3):
                continue
            masked = made_by(scores, "Add")
            if masked is None or any(constant(value) is not None for value in masked.inputs):
                continue
            build = Builder(model.graph, node)
            rows = (*shape[:-1], 1)
            (highest,) = build.node(
                "ReduceMax", [scores, build.integers([-1], "floor.axis")], like=scores, shape=rows, keepdims=1
            )
            depth = build.constant(np.array(FLOOR, np.float32), "floor.depth")
            (lowest,) = build.node("Sub", [highest, depth], like=scores, shape=rows)
            (bounded,) = build.node("Max", [scores, lowest], like=scores, shape=shape)
            node.replace_input_with(0, bounded)
            modified = True
        return ir.passes.PassResult(model, modified)
