"""Weights of linear layers in 4 or 8 bits in blocks, inputs and outputs in fp32: the form for decoders on CPUs.

A decoding step reads every weight once for a handful of tokens, so its time is the time to read them. ONNX Runtime's
MatMulNBits unpacks blocks as it multiplies, and on CPUs rounds its input to 8 bits, block by block, to multiply
integers (accuracy_level 4). Layers that end in an output of the graph, the head of a language model above all, and the
tables of embeddings, with which it may share its weight, have 8 bits in either format: in 4 they lose the most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from converters.cache import is_cache
from converters.precision.blocks import BLOCK, BLOCKS, packed
from converters.precision.compensated import Inputs
from converters.precision.given import matching
from converters.precision.int8 import (
    LINEAR,
    QUANTIZED,
    SCALE,
    TRANSPOSED,
    ZERO_POINT,
    NoLayerError,
    Quantized,
    check_version,
)
from converters.precision.second_moments import second_moments
from converters.variants import CONTRIB
from deploy_prune.errors import UnsupportedModelError

if TYPE_CHECKING:
    import onnx

Rounding = Literal["compensated", "nearest"]
BITS = {"int8-weight-only": 8, "int4-weight-only": 4}
_SMALL_TABLE = 65536  # bytes; a smaller table gains nothing
_OLDEST = 13  # opset in which Unsqueeze takes its axes as they are written here
# What only passes values on, moves them, or works on each alone: a layer before it still makes the output.
_PASSING = (
    *("Add", "Sub", "Mul", "Div", "Cast", "Identity", "Softmax", "LogSoftmax", "Sigmoid", "Tanh"),
    *("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Expand", "Slice", "Concat"),
    *("Gather", "GatherND", "GatherElements"),
)


@dataclass(frozen=True)
class _Layer:
    """A linear layer: its node, its stored weight, and whether that holds an output a row (as torch does)."""

    node: onnx.NodeProto
    weight: str
    by_row: bool

    @property
    def name(self) -> str:
        return self.node.name or self.node.output[0]


def quantize_weights(
    source: Path,
    target: Path,
    precision: str,
    keep: Sequence[str] = (),
    batches: Sequence[Mapping[str, np.ndarray]] = (),
    block: int = BLOCK,
) -> Quantized:
    """Write an fp32 file with its linear layers' weights in 8 or 4 bits, `block` of which share a scale. `keep` are
    names or patterns of nodes. In 4 bits and with calibration `batches` weights make up for each other's rounding
    (compensated.py); else each is rounded to the nearest.

    Raises UnavailableError for an onnxruntime that cannot run it, UnsupportedModelError when no layer is left to
    quantise, or the graph is none that this can be done to, UsageError for a pattern that names no node.
    """
    import onnx
    from onnx import helper, numpy_helper

    check_version(precision)
    model = onnx.load(source)
    _check_opset(model, source)
    graph = model.graph
    kept = matching(keep, [node.name for node in graph.node])
    stored = {i.name: i for i in graph.initializer}
    layers = list(_layers(graph))
    chosen = {layer.node.output[0]: layer for layer in layers if layer.node.name not in kept}
    if not chosen:
        raise NoLayerError(source, len(layers))
    tables = _tables(graph, kept, chosen)
    _refuse_not_finite([stored[name] for name in (*(layer.weight for layer in chosen.values()), *tables)], source)
    whole = {name: max(b for b in BLOCKS if b <= block and not stored[name].dims[1] % b) for name in tables}
    outer = _outermost(graph)
    fine = {layer.weight for output, layer in chosen.items() if output in outer} | set(tables)
    rounded = [layer for layer in chosen.values() if layer.weight not in fine and BITS[precision] == 4]
    inputs_of = _known_inputs(rounded, model, source, stored, batches)
    made: dict[str, list[str]] = {}  # what a weight is called, turned or not -> the names of its parts

    def store(weight: str, by_row: bool) -> list[str]:
        base = weight if by_row else weight + TRANSPOSED
        if base not in made:
            values = numpy_helper.to_array(stored[weight])
            bits = 8 if weight in fine else BITS[precision]
            inputs = inputs_of(weight, by_row)
            q, scale, zero = packed(values if by_row else values.T, bits, inputs, whole.get(weight, block))
            parts: dict[str, np.ndarray] = {base + QUANTIZED: q, base + SCALE: scale}
            if zero is not None:
                parts[base + ZERO_POINT] = zero
            if taken := set(parts) & set(stored):
                raise UnsupportedModelError(
                    "the file has tensors of the names that quantised weights get", where=str(source), got=str(taken)
                )
            graph.initializer.extend(numpy_helper.from_array(part, name) for name, part in parts.items())
            made[base] = list(parts)
        return made[base]

    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        layer = chosen.get(node.output[0]) if node.output else None
        if layer is not None:
            bits = 8 if layer.weight in fine else BITS[precision]
            parts, own = store(layer.weight, layer.by_row), whole.get(layer.weight, block)
            nodes.append(_product(node, parts, _widths(layer, stored), bits, own))
        elif node.op_type == "Gather" and node.input[0] in tables:
            nodes += _rows(node, store(node.input[0], True), stored[node.input[0]].dims[1])
        else:
            nodes.append(node)
    outputs = {value.name for value in graph.output}
    del graph.node[:]
    graph.node.extend(_used(nodes, outputs))
    read = outputs | set(_reads(graph.node))
    left = [i for i in graph.initializer if i.name in read]
    given = [value for value in graph.input if value.name not in stored or value.name in read]
    del graph.initializer[:], graph.input[:]
    graph.initializer.extend(left)
    graph.input.extend(given)
    if not any(opset.domain == CONTRIB for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(CONTRIB, 1))
    target.write_bytes(model.SerializeToString(deterministic=True))
    return Quantized(tuple(layer.name for layer in chosen.values()), tuple(sorted(kept)), tuple(tables))


def _known_inputs(
    layers: Sequence[_Layer],
    model: onnx.ModelProto,
    source: Path,
    stored: dict[str, onnx.TensorProto],
    batches: Sequence[Mapping[str, np.ndarray]],
) -> Callable[[str, bool], Inputs | None]:
    """(weight, by row) -> what is known of the inputs of the layers that read it so; None without `batches` and for
    weights of other layers."""
    read: dict[tuple[str, bool], list[str]] = {}
    for layer in layers if batches else ():
        read.setdefault((layer.weight, layer.by_row), []).append(layer.node.input[0])
    widths = {layer.node.input[0]: _widths(layer, stored)[0] for layer in layers}
    found = second_moments(model, source, widths, batches) if read else {}

    @lru_cache(maxsize=1)  # layers that read the same come one after the other
    def known(names: tuple[str, ...]) -> Inputs:
        return Inputs.of(
            np.sum([found[name].matrix for name in names], axis=0), sum(found[name].vectors for name in names)
        )

    return lambda weight, by_row: known(tuple(names)) if (names := read.get((weight, by_row))) else None


def _refuse_not_finite(weights: Iterable[onnx.TensorProto], source: Path) -> None:
    from onnx import numpy_helper

    for weight in weights:
        if not np.isfinite(numpy_helper.to_array(weight)).all():
            raise UnsupportedModelError(
                "a weight is not finite", where=str(source), got=weight.name, remedy="Keep its node in fp32 by name."
            )


def _check_opset(model: onnx.ModelProto, source: Path) -> None:
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset < _OLDEST:
        raise UnsupportedModelError(
            "weights alone are quantised in graphs of newer opsets",
            where=str(source),
            expected=f"opset {_OLDEST} or newer",
            got=str(opset),
        )


def _layers(graph: onnx.GraphProto) -> Iterator[_Layer]:
    """Products with a stored weight, plain (no factor but one), also by way of its transposition."""
    stored = {i.name: tuple(i.dims) for i in graph.initializer if len(i.dims) == 2 and i.data_type == 1}
    biases = {i.name: tuple(i.dims) for i in graph.initializer}
    turned = {n.output[0]: n.input[0] for n in graph.node if _turns(n) and n.input[0] in stored}
    for node in graph.node:
        if node.op_type not in LINEAR or node.domain or len(node.input) < 2:
            continue
        facts = {a.name: a.f or a.i for a in node.attribute}
        if facts.get("transA") or facts.get("alpha", 1) != 1 or facts.get("beta", 1) != 1:
            continue
        name = node.input[1]
        weight = turned.get(name, name)
        if weight not in stored:
            continue
        by_row = bool(facts.get("transB")) != (name in turned)
        outputs = stored[weight][0 if by_row else 1]
        if len(node.input) > 2 and node.input[2] and biases.get(node.input[2]) != (outputs,):
            continue
        yield _Layer(node, weight, by_row)


def _turns(node: onnx.NodeProto) -> bool:
    """Whether a node transposes a matrix."""
    perm = next((list(a.ints) for a in node.attribute if a.name == "perm"), [1, 0])
    return node.op_type == "Transpose" and not node.domain and perm == [1, 0]


def _widths(layer: _Layer, stored: dict[str, onnx.TensorProto]) -> tuple[int, int]:
    """(inputs, outputs) of a layer."""
    first, second = stored[layer.weight].dims
    return (second, first) if layer.by_row else (first, second)


def _product(node: onnx.NodeProto, weight: list[str], widths: tuple[int, int], bits: int, block: int) -> onnx.NodeProto:
    """y = x Wᵀ + b over the blocks of W."""
    from onnx import helper

    inputs = [node.input[0], *weight, *[""] * (3 - len(weight))]
    if len(node.input) > 2:
        inputs += ["", node.input[2]]  # no order of groups; the bias
    k, n = widths
    about: dict[str, Any] = {"K": k, "N": n, "bits": bits, "block_size": block, "accuracy_level": 4}
    while not inputs[-1]:
        inputs.pop()
    return helper.make_node("MatMulNBits", inputs, list(node.output), node.name, domain=CONTRIB, **about)


def _tables(graph: onnx.GraphProto, kept: set[str], chosen: Mapping[str, _Layer]) -> list[str]:
    """Stored tables of whole blocks that nodes read by row alone (Gather), or as the weight of a layer that is chosen
    too; a small one only in the latter case."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in _reads([node]):
            readers.setdefault(name, []).append(node)
    outputs = {value.name for value in graph.output}

    def goes(name: str, node: onnx.NodeProto) -> bool:
        """Whether a reader of the table does without it afterwards."""
        if node.op_type == "Gather":
            return node.input[0] == name and not _axis(node) and node.name not in kept
        if _turns(node):
            return all(reader.output[0] in chosen for reader in readers.get(node.output[0], ()))
        return node.output[0] in chosen

    found = []
    for stored in graph.initializer:
        name, users = stored.name, readers.get(stored.name, [])
        if stored.data_type != 1 or len(stored.dims) != 2 or stored.dims[1] % BLOCK or name in outputs:
            continue
        gathered = [node for node in users if node.op_type == "Gather"]
        if not gathered or not all(goes(name, node) for node in users):
            continue
        if len(gathered) < len(users) or 4 * stored.dims[0] * stored.dims[1] >= _SMALL_TABLE:
            found.append(name)
    return found


def _rows(node: onnx.NodeProto, table: list[str], width: int) -> list[onnx.NodeProto]:
    """Gather of rows that are stored in blocks of 8 bits: s (q - 128)."""
    from onnx import helper, numpy_helper

    ids, out = node.input[1], node.output[0]
    name = node.name or out

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


def _outermost(graph: onnx.GraphProto) -> set[str]:
    """First outputs of the layers whose result becomes an output of the graph, caches aside, without another product or
    a sum with something computed elsewhere in between."""
    makers = {name: node for node in graph.node for name in node.output}
    computed = {name for name, node in makers.items() if node.op_type != "Constant"} | {v.name for v in graph.input}
    computed -= {i.name for i in graph.initializer}
    waiting = [value.name for value in graph.output if not is_cache(value.name)]
    found: set[str] = set()
    seen: set[str] = set()
    while waiting:
        node = makers.get(waiting.pop())
        if node is None or node.output[0] in seen:
            continue
        seen.add(node.output[0])
        if node.op_type in LINEAR:
            found.add(node.output[0])
        elif node.op_type in _PASSING:
            joins = node.op_type in ("Add", "Sub", "Mul", "Div") and len(computed & set(node.input)) > 1
            waiting += (
                []
                if joins
                else list(node.input)
                if node.op_type == "Concat"
                else [name for name in node.input if name in computed][:1]
            )
    return found


def _used(nodes: list[onnx.NodeProto], wanted: set[str]) -> list[onnx.NodeProto]:
    """The nodes on which the outputs depend, in their order."""
    kept = []
    wanted = set(wanted)
    for node in reversed(nodes):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= set(_reads([node]))
    return kept[::-1]


def _reads(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    """What nodes read, those of graphs inside them too."""
    for node in nodes:
        yield from node.input
        for attribute in node.attribute:
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _reads(graph.node)
                yield from (value.name for value in graph.output)


def _axis(node: onnx.NodeProto) -> int:
    return next((int(a.i) for a in node.attribute if a.name == "axis"), 0)
