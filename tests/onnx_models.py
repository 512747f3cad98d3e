"""Tiny ONNX models for tests that need a real file and no torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def save_mlp(path: Path, hidden: int = 8, *, batch: int | str = "batch", extra: str | None = None) -> Path:
    """x (batch, 4) -> Relu(x A) B, (batch, 3); `extra` appends one node of that type that keeps the shape."""
    generator = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(generator.standard_normal(shape).astype(np.float32), name)
        for name, shape in (("A", (4, hidden)), ("B", (hidden, 3)))
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "A"], ["h"], name="up"),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "B"], ["y0"], name="down"),
        helper.make_node(extra or "Identity", ["y0"], ["y"], name="last"),
    ]
    return _save(path, nodes, [("x", TensorProto.FLOAT, [batch, 4])], ("y", [batch, 3]), weights)


def save_embedder(path: Path, vocabulary: int = 7) -> Path:
    """input_ids, token_type_ids, attention_mask (batch, sequence) int64 -> (batch, sequence, 2) float."""
    generator = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(generator.standard_normal((rows, 2)).astype(np.float32), name)
        for name, rows in (("words", vocabulary), ("types", 2))
    ]
    weights.append(numpy_helper.from_array(np.array([-1], np.int64), "last"))
    nodes = [
        helper.make_node("Gather", ["words", "input_ids"], ["w"]),
        helper.make_node("Cast", ["token_type_ids"], ["t32"], to=TensorProto.INT32),
        helper.make_node("Gather", ["types", "t32"], ["t"]),
        helper.make_node("Add", ["w", "t"], ["wt"]),
        helper.make_node("Cast", ["attention_mask"], ["m"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["m", "last"], ["m3"]),
        helper.make_node("Mul", ["wt", "m3"], ["y"]),
    ]
    names = ("input_ids", "token_type_ids", "attention_mask")
    ids: list[tuple[str, int, list[int | str]]] = [(n, TensorProto.INT64, ["batch", "sequence"]) for n in names]
    return _save(path, nodes, ids, ("y", ["batch", "sequence", 2]), weights)


def _save(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: list[tuple[str, int, list[int | str]]],
    output: tuple[str, list[int | str]],
    weights: list[onnx.TensorProto],
) -> Path:
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(output[0], TensorProto.FLOAT, output[1])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path))
    return path
