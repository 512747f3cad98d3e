"""Weights of linear layers in 4 or 8 bits in blocks, inputs and outputs in fp32: the form for decoders on CPUs.

A decoding step reads every weight once for a handful of tokens, so its time is the time to read them. ONNX Runtime's
MatMulNBits unpacks blocks as it multiplies, and on CPUs rounds its input to 8 bits, block by block, to multiply
integers (accuracy_level 4). Layers that end in an output of the graph, the head of a language model above all, and the
tables of embeddings, with which it may share its weight, have 8 bits in either format: in 4 they lose the most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.precision.blocks import BLOCK, packed
from converters.precision.given import matching
from converters.precision.int8 import LINEAR, QUANTIZED, SCALE, ZERO_POINT, Quantized, check_version, no_layer
from converters.precision.stored import TRANSPOSED
from converters.variants import CONTRIB

if TYPE_CHECKING:
    import numpy as np
    import onnx

BITS = {"int8-weight-only": 8, "int4-weight-only": 4}
_SMALL_TABLE = 65536  # bytes; a smaller table gains nothing
_VIEWS = ("Add", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Mul", "Slice", "Gather", "Cast")


@dataclass(frozen=True)
class _Layer:
    """A linear layer: its node, its stored weight, and whether that holds an output a row (as torch does)."""

    node: onnx.NodeProto
    weight: str
    by_row: bool


def quantize_weights(source: Path, target: Path, precision: str, keep: Sequence[str] = ()) -> Quantized:
    """Write an fp32 file with its linear layers' weights in 8 or 4 bits. `keep` are names or patterns of nodes.

    Raises UnavailableError for an onnxruntime that cannot run it, UnsupportedModelError when no layer is left to
    quantise, UsageError for a pattern that names no node.
    """
    import onnx
    from onnx import helper, numpy_helper

    check_version(precision)
    model = onnx.load(source)
    graph = model.graph
    kept = matching(keep, [node.name for node in graph.node])
    stored = {i.name: i for i in graph.initializer}
    layers = list(_layers(graph))
    chosen = {layer.node.name: layer for layer in layers if layer.node.name not in kept}
    if not chosen:
        raise no_layer(source, len(layers))
    outer = set(_outermost(graph))
    made: dict[tuple[str, int], list[str]] = {}  # (weight, bits) -> the names it is stored under now

    def store(weight: str, by_row: bool, bits: int) -> list[str]:
        if (weight, bits) not in made:
            values = numpy_helper.to_array(stored[weight])
            q, scale, zero = packed(values if by_row else values.T, bits)
            base = weight if by_row else weight + TRANSPOSED
            parts: dict[str, np.ndarray] = {base + QUANTIZED: q, base + SCALE: scale}
            if zero is not None:
                parts[base + ZERO_POINT] = zero
            graph.initializer.extend(numpy_helper.from_array(part, name) for name, part in parts.items())
            made[weight, bits] = list(parts)
        return made[weight, bits]

    nodes: list[onnx.NodeProto] = []
    tables = _tables(graph, kept)
    for node in graph.node:
        if node.name in chosen:
            layer = chosen[node.name]
            bits = 8 if node.name in outer or layer.weight in tables else BITS[precision]
            nodes.append(_product(node, store(layer.weight, layer.by_row, bits), _widths(layer, stored), bits))
        elif node.op_type == "Gather" and node.input[0] in tables:
            nodes += _rows(node, store(node.input[0], True, 8), stored[node.input[0]].dims[1])
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(_used(nodes, {value.name for value in graph.output}))
    read = {name for node in graph.node for name in node.input}
    left = [i for i in graph.initializer if i.name in read]
    del graph.initializer[:]
    graph.initializer.extend(left)
    if not any(opset.domain == CONTRIB for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(CONTRIB, 1))
    target.write_bytes(model.SerializeToString(deterministic=True))
    return Quantized(tuple(chosen), tuple(sorted(kept)), tuple(tables))


def _layers(graph: onnx.GraphProto) -> Iterator[_Layer]:
    """Products with a stored weight, plain (no factor but one), also by way of its transposition."""
    stored = {i.name for i in graph.initializer if len(i.dims) == 2 and i.data_type == 1}
    turned = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Transpose" and n.input[0] in stored}
    biases = {i.name: i.dims for i in graph.initializer}
    for node in graph.node:
        if node.op_type not in LINEAR or node.domain or len(node.input) < 2:
            continue
        facts = {a.name: a.f or a.i for a in node.attribute}
        if facts.get("transA") or facts.get("alpha", 1) != 1 or facts.get("beta", 1) != 1:
            continue
        if len(node.input) > 2 and len(biases.get(node.input[2], ())) != 1:
            continue
        weight = node.input[1]
        if weight in stored or weight in turned:
            yield _Layer(node, turned.get(weight, weight), bool(facts.get("transB")) != (weight in turned))


def _widths(layer: _Layer, stored: dict[str, onnx.TensorProto]) -> tuple[int, int]:
    """(inputs, outputs) of a layer."""
    first, second = stored[layer.weight].dims
    return (second, first) if layer.by_row else (first, second)


def _product(node: onnx.NodeProto, weight: list[str], widths: tuple[int, int], bits: int) -> onnx.NodeProto:
    """y = x Wᵀ + b over the blocks of W."""
    from onnx import helper

    inputs = [node.input[0], *weight, *[""] * (3 - len(weight))]
    if len(node.input) > 2:
        inputs += ["", node.input[2]]  # no order of groups; the bias
    k, n = widths
    about: dict[str, Any] = {"K": k, "N": n, "bits": bits, "block_size": BLOCK, "accuracy_level": 4}
    while not inputs[-1]:
        inputs.pop()
    return helper.make_node("MatMulNBits", inputs, list(node.output), node.name, domain=CONTRIB, **about)


def _tables(graph: onnx.GraphProto, kept: set[str]) -> list[str]:
    """Stored tables that Gather reads by row, of whole blocks; products may read them too."""
    layers = {layer.node.name: layer for layer in _layers(graph)}
    heads = {layer.weight for layer in layers.values() if layer.by_row}
    found = []
    for stored in graph.initializer:
        if stored.data_type != 1 or len(stored.dims) != 2 or stored.dims[1] % BLOCK:
            continue
        users = [node for node in graph.node if stored.name in node.input]
        gathers = [node for node in users if node.op_type == "Gather" and node.input[0] == stored.name]
        if not gathers or any(_axis(node) or node.name in kept for node in gathers):
            continue
        if stored.name in heads or (len(gathers) == len(users) and 4 * stored.dims[0] * stored.dims[1] >= _SMALL_TABLE):
            found.append(stored.name)
    return found


def _rows(node: onnx.NodeProto, table: list[str], width: int) -> list[onnx.NodeProto]:
    """Gather of rows that are stored in blocks of 8 bits: s (q - 128)."""
    import numpy as np
    from onnx import helper, numpy_helper

    ids, out, name = node.input[1], node.output[0], node.name

    def constant(what: str, value: np.ndarray) -> onnx.NodeProto:
        tensor = numpy_helper.from_array(value)
        return helper.make_node("Constant", [], [f"{out}.{what}"], f"{name}_{what}", value=tensor)

    return [
        constant("middle", np.array(128, np.float32)),
        constant("last", np.array([-1], np.int64)),
        constant("width", np.array([width], np.int64)),
        helper.make_node("Gather", [table[0], ids], [f"{out}.rows"], f"{name}_rows"),
        helper.make_node("Gather", [table[1], ids], [f"{out}.steps"], f"{name}_steps"),
        helper.make_node("Cast", [f"{out}.rows"], [f"{out}.wide"], f"{name}_wide", to=1),
        helper.make_node("Sub", [f"{out}.wide", f"{out}.middle"], [f"{out}.signed"], f"{name}_signed"),
        helper.make_node("Unsqueeze", [f"{out}.steps", f"{out}.last"], [f"{out}.each"], f"{name}_each"),
        helper.make_node("Mul", [f"{out}.signed", f"{out}.each"], [f"{out}.blocks"], f"{name}_blocks"),
        helper.make_node("Shape", [ids], [f"{out}.lead"], f"{name}_lead"),
        helper.make_node("Concat", [f"{out}.lead", f"{out}.width"], [f"{out}.shape"], f"{name}_shape", axis=0),
        helper.make_node("Reshape", [f"{out}.blocks", f"{out}.shape"], [out], f"{name}_values"),
    ]


def _outermost(graph: onnx.GraphProto) -> Iterator[str]:
    """Names of the layers whose result is, but for a view of it or a bias, an output of the graph."""
    makers = {name: node for node in graph.node for name in node.output}
    seen: set[str] = set()
    waiting = [value.name for value in graph.output]
    while waiting:
        node = makers.get(waiting.pop())
        if node is None or node.name in seen:
            continue
        seen.add(node.name)
        if node.op_type in LINEAR:
            yield node.name
        elif node.op_type in _VIEWS:
            waiting += node.input


def _used(nodes: list[onnx.NodeProto], wanted: set[str]) -> list[onnx.NodeProto]:
    """The nodes on which the outputs depend, in their order."""
    kept = []
    wanted = set(wanted)
    for node in reversed(nodes):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= set(node.input)
    return kept[::-1]


def _axis(node: onnx.NodeProto) -> int:
    return next((int(a.i) for a in node.attribute if a.name == "axis"), 0)
