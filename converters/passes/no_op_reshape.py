"""A Reshape to the shape its input has already says nothing; torch leaves some around attention of unlike widths."""

from __future__ import annotations

import onnx_ir as ir

from converters.passes.match import dims, replace


class NoOpReshape(ir.passes.InPlacePass):
    """Removes every Reshape whose input and output have the same dimensions, all of them known by size or by name."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.domain or node.op_type != "Reshape" or node.inputs[0] is None:
                continue
            source, out = node.inputs[0], node.outputs[0]
            shape = dims(source)
            if shape is None or None in shape or shape != dims(out) or out.is_graph_output():
                continue
            replace(out, source)
            model.graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified)
