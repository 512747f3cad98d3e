"""Made-up inputs for timing, read off an ONNX graph: what it takes, and values it can digest."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from deploy_prune.errors import ArtifactError, UsageError
from deploy_prune.files import existing

if TYPE_CHECKING:
    import numpy as np
    import onnx

Role = Literal["batch", "sequence", "past", "total"]
_PASS_THROUGH = {"Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Flatten"}  # ids stay ids


@dataclass(frozen=True)
class GraphInput:
    """`GraphInput("input_ids", "int64", ("batch", "sequence"), rows=30522)`.

    A string or None in `shape` is a dynamic dimension. `rows` is the length of the shortest embedding table that an
    integer input indexes, 0 when it indexes none.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]
    rows: int = 0

    def role(self, axis: int) -> Role | None:
        """What a dynamic dimension counts: the first one examples, one called like `past_seq...` or `total_seq...` the
        tokens in a cache, or these and the new ones; the second of an integer matrix or one called like `seq...`
        positions; None for any other."""
        name = str(self.shape[axis] or "").lower()
        if axis == 0:
            return "batch"
        if name.startswith(("past_seq", "total_seq")):
            return "past" if name.startswith("past") else "total"
        tokens = axis == 1 and len(self.shape) == 2 and self.dtype.startswith(("int", "bool"))
        return "sequence" if tokens or name.startswith("seq") else None


def graph_inputs(path: Path | str) -> tuple[GraphInput, ...]:
    """The inputs of an ONNX file, in order. Raises UnavailableError, or ArtifactError when it is not ONNX."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    path = existing(path, "ONNX file")
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except (DecodeError, OSError, ValueError) as error:
        raise ArtifactError("not an ONNX file", where=str(path), got=str(error)[:200]) from error
    weights = {tensor.name for tensor in graph.initializer}
    inputs = tuple(_graph_input(value, graph) for value in graph.input if value.name not in weights)
    if not graph.node or not inputs:
        raise ArtifactError(
            "not an ONNX model that takes inputs", where=str(path), got=f"{len(graph.node)} nodes, {len(inputs)} inputs"
        )
    return inputs


def check_positions(path: Path | str, tokens: int) -> None:
    """Raises UsageError for more tokens than the decoder in an ONNX file says that it has positions for."""
    import onnx

    from converters.generation import METADATA

    properties = {p.key: p.value for p in onnx.load(str(path), load_external_data=False).metadata_props}
    longest = json.loads(properties[METADATA])["longest"] if METADATA in properties else None
    if longest is not None and tokens > longest:
        raise UsageError(
            "more tokens than the model has positions for",
            where=str(path),
            expected=f"at most {longest}, in the caches (--past) and new (--seq)",
            got=str(tokens),
        )


def has_sequence(inputs: Sequence[GraphInput]) -> bool:
    """Whether any dynamic dimension counts positions."""
    dynamic = [(i, axis) for i in inputs for axis, size in enumerate(i.shape) if not isinstance(size, int)]
    return any(i.role(axis) == "sequence" for i, axis in dynamic)


def has_past(inputs: Sequence[GraphInput]) -> bool:
    """Whether the graph is a decoder with a cache, or one whose every attention vanished: its mask covers a past."""
    return any(
        i.role(axis) in ("past", "total")
        for i in inputs
        for axis, size in enumerate(i.shape)
        if not isinstance(size, int)
    )


def make_inputs(
    inputs: Sequence[GraphInput], *, batch: int, sequence: int | None = None, past: int | None = None, seed: int = 0
) -> dict[str, np.ndarray]:
    """Arrays at the given sizes: standard normal floats, ids within their embedding table, masks of ones. `past` is how
    many tokens a decoder's caches hold.

    Raises UsageError, with every problem at once, when the graph cannot take these sizes.
    """
    import numpy as np

    problems: list[str] = []
    for role, size, least in (("batch", batch, 1), ("sequence", sequence, 1), ("past", past, 0)):
        if size is not None and size < least:
            problems.append(f"{role} size must be at least {least}, got {size}")
    if sequence is not None and not has_sequence(inputs):
        problems.append("a sequence size was given, but no input has a dynamic sequence dimension")
    if past is not None and not has_past(inputs):
        problems.append("a past was given, but no input is a cache")
    total = None if past is None else past + (sequence or 0)
    sizes: dict[str, int | None] = {"batch": batch, "sequence": sequence, "past": past, "total": total}
    shapes = {i.name: _shape(i, sizes, problems) for i in inputs}
    if problems:
        raise UsageError(
            "the model cannot be run at the asked sizes",
            problems=_first(list(dict.fromkeys(problems))),
            expected="; ".join(_first([f"{i.name} {i.dtype}{_written(i.shape)}" for i in inputs])),
        )
    generator = np.random.default_rng(seed)
    return {i.name: _values(i, shapes[i.name], generator) for i in inputs}


def _first(lines: list[str], most: int = 8) -> list[str]:
    """The first lines, and how many more there are: a decoder has dozens of caches with the same fault."""
    return lines if len(lines) <= most else [*lines[:most], f"and {len(lines) - most} more"]


def _shape(spec: GraphInput, sizes: Mapping[str, int | None], problems: list[str]) -> tuple[int, ...]:
    shape = []
    for axis, size in enumerate(spec.shape):
        role = spec.role(axis)
        if isinstance(size, int):
            asked = sizes["batch"] if axis == 0 else None
            if asked is not None and size != asked:
                problems.append(f"{spec.name} has a fixed batch of {size}, asked is {asked}")
            shape.append(size)
        elif role is None:
            problems.append(
                f"{spec.name}: cannot tell what dimension {axis} ({size or 'unnamed'}) counts; export the "
                "model with that dimension fixed"
            )
        elif sizes[role] is None:
            needed = "past size (--past)" if role in ("past", "total") else f"{role} size"
            problems.append(f"{spec.name}: dimension {axis} needs a {needed}")
        else:
            shape.append(int(sizes[role] or 0))
    if not spec.shape:
        problems.append(f"{spec.name} is a scalar: no batch of examples goes in")
    return tuple(shape)


def _values(spec: GraphInput, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    import numpy as np

    dtype = np.dtype(spec.dtype)
    if dtype.kind == "f":
        return generator.standard_normal(shape).astype(dtype)
    if "mask" in spec.name.lower() or dtype.kind == "b":
        return np.ones(shape, dtype)
    # Without a table to learn the vocabulary from, 0 and 1 are ids (and flags) every model has.
    return generator.integers(0, spec.rows or 2, shape).astype(dtype)


def _graph_input(value: onnx.ValueInfoProto, graph: onnx.GraphProto) -> GraphInput:
    import onnx

    tensor = value.type.tensor_type
    dtype = str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)) if tensor.elem_type else "unknown"
    shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim)
    if dtype not in ("float16", "float32", "float64", "int32", "int64", "bool"):
        raise UsageError(
            "cannot make up values of this type",
            where=f"input {value.name}",
            got=dtype,
            expected="float16, float32, float64, int32, int64 or bool",
        )
    return GraphInput(value.name, dtype, shape, _table_rows(value.name, graph) if dtype.startswith("int") else 0)


def _table_rows(name: str, graph: onnx.GraphProto) -> int:
    lengths = {tensor.name: tensor.dims[0] for tensor in graph.initializer if len(tensor.dims) >= 2}
    same = {name}
    rows = []
    for node in graph.node:  # ONNX graphs are topologically sorted
        if node.op_type in _PASS_THROUGH and node.input[0] in same:
            same.update(node.output)
        elif node.op_type == "Gather" and node.input[1] in same and node.input[0] in lengths:
            rows.append(lengths[node.input[0]])
    return min(rows, default=0)


def _written(shape: Sequence[int | str | None]) -> str:
    return "[" + ", ".join(str(size if size is not None else "?") for size in shape) + "]"
