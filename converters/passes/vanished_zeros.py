"""What a sublayer that lost all its units leaves behind, zeros of the tokens' shape plus its bias, is just the bias."""

from __future__ import annotations

import onnx_ir as ir

from converters.passes.match import dims, made_by, replace, scalar


class VanishedZeros(ir.passes.InPlacePass):
    """x + (zeros like x + b) becomes x + b, and x + zeros like x becomes x.

    Only where x has the zeros' shape, so that nothing relied on them for its own.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.domain or node.op_type != "Add":
                continue
            for i, value in enumerate(node.inputs):
                other = node.inputs[1 - i]
                if value is None or other is None or dims(value) is None or dims(value) != dims(other):
                    continue
                if _is_zeros(value) and not node.outputs[0].is_graph_output():
                    replace(node.outputs[0], other)
                    model.graph.remove(node, safe=True)
                elif (bias := _biased_zeros(value)) is not None:
                    node.replace_input_with(i, bias)
                else:
                    continue
                modified = True
                break
        return ir.passes.PassResult(model, modified)


def _is_zeros(value: ir.Value | None) -> bool:
    expand = made_by(value, "Expand")
    return expand is not None and scalar(expand.inputs[0]) == 0.0


def _biased_zeros(value: ir.Value) -> ir.Value | None:
    """b of (zeros + b), b having fewer dimensions."""
    add = made_by(value, "Add")
    for zeros, bias in (add.inputs, add.inputs[::-1]) if add is not None else ():
        if _is_zeros(zeros) and bias is not None and bias.shape is not None and len(bias.shape) <= 1:
            return bias
    return None
