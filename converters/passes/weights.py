"""How a graph stores the model's weights: once each, as they are read, under their own names."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from converters.passes.stored import TRANSPOSED, holds


class TransposeWeights(ir.passes.InPlacePass):
    """Replaces `Transpose(weight)` by a weight stored transposed, as `NAME.T`, where nothing else reads the weight.

    A weight with other readers (an output layer tied to the embedding) keeps its node and its single copy;
    runtimes fold it when they load the model.
    """

    def __init__(self, weights: Collection[str]) -> None:
        super().__init__()
        self.weights = weights

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, modified = model.graph, False
        for node in list(graph):
            if node.domain or node.op_type != "Transpose" or node.inputs[0] is None:
                continue
            weight = node.inputs[0]
            if weight.name not in self.weights or weight.name not in graph.initializers or len(weight.uses()) != 1:
                continue
            value = weight.const_value
            if value is None or len(value.shape) != 2 or list(node.attributes["perm"].as_ints()) != [1, 0]:
                continue
            transposed = ir.Value(
                name=f"{weight.name}{TRANSPOSED}",
                type=ir.TensorType(value.dtype),
                shape=ir.Shape(value.shape.numpy()[::-1]),
                const_value=ir.tensor(value.numpy().T.copy(), name=f"{weight.name}{TRANSPOSED}"),
            )
            node.outputs[0].replace_all_uses_with(transposed)
            graph.remove(node, safe=True)
            del graph.initializers[str(weight.name)]
            graph.register_initializer(transposed)
            modified = True
        return ir.passes.PassResult(model, modified)


class MergeConstants(ir.passes.InPlacePass):
    """Stores equal constants once; weights are left apart, even equal ones, so that their bytes stay countable."""

    def __init__(self, weights: Collection[str]) -> None:
        super().__init__()
        self.weights = weights

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, modified = model.graph, False
        first: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        for name, value in list(graph.initializers.items()):
            tensor = value.const_value
            if tensor is None or holds(name, self.weights):
                continue
            key = (tensor.dtype.name, tuple(tensor.shape.numpy()), tensor.tobytes())
            kept = first.setdefault(key, value)
            if kept is value or value.is_graph_output():
                continue
            value.replace_all_uses_with(kept)
            del graph.initializers[name]
            modified = True
        return ir.passes.PassResult(model, modified)
