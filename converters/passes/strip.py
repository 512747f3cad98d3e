"""What a published graph must not carry: stack traces, source paths, module names of the exporting machine."""

from __future__ import annotations

import onnx_ir as ir


class StripMetadata(ir.passes.InPlacePass):
    """Removes doc strings and metadata of the model, its graphs, nodes, values and initialisers."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        model.doc_string = None
        model.metadata_props.clear()
        model.graph.name = "main"
        model.graph.doc_string = None
        model.graph.metadata_props.clear()
        values: set[ir.Value] = {*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()}
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            node.doc_string = None
            node.metadata_props.clear()
            values.update(node.outputs)
        for value in values:
            value.doc_string = None
            value.metadata_props.clear()
            if value.const_value is not None and value.const_value.metadata_props:
                value.const_value.metadata_props.clear()
        return ir.passes.PassResult(model, True)
