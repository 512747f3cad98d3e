"""Weights in blocks of 8 and 4 bits: rounded to nearest, read back as stored, heads in 8 bits, faults seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from packaging import version

from converters.precision import Limit, convert_precision
from converters.precision.blocks import BLOCKS, FURTHEST, fitted_range, packed, unpacked
from converters.precision.compensated import Inputs
from converters.precision.int8 import FROM
from converters.precision.proof import prove
from converters.precision.stored import stored_faults
from deploy_prune.errors import ArtifactError, ParityError, UnsupportedModelError, UsageError

BOTH = {"int8-weight-only": 8, "int4-weight-only": 4}
needs_kernels = pytest.mark.skipif(
    version.parse(onnxruntime.__version__) < version.parse(FROM["int8-weight-only"]), reason="an older onnxruntime"
)
each = pytest.mark.parametrize("precision", BOTH)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 5),
    st.integers(1, 300),
    st.sampled_from([4, 8]),
    st.sampled_from(BLOCKS),
    st.integers(0, 99),
    st.sampled_from([0, 1e-30, 1, 1e6]),
)
def test_every_weight_is_the_nearest_of_its_block(
    n: int, k: int, bits: int, block: int, seed: int, size: float
) -> None:
    rows = (np.random.default_rng(seed).standard_normal((n, k)) * size).astype(np.float32)
    q, scale, zero = packed(rows, bits, block=block)
    assert q.shape == (n, -(-k // block), block * bits // 8) and scale.shape == q.shape[:2]
    found = unpacked(q, scale, zero, k)
    assert found is not None
    values, step = found
    assert values.shape == rows.shape and (np.abs(values - rows) <= 0.501 * step).all()
    assert np.isfinite(values).all() and (values[rows == 0] == 0).all()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 4),
    st.integers(1, 150),
    st.integers(1, 200),
    st.sampled_from(BLOCKS),
    st.integers(0, 99),
    st.sampled_from([0, 1, 1e6]),
)
def test_compensated_weights_are_moved_no_further_than_a_file_may_be_off(
    n: int, k: int, tokens: int, block: int, seed: int, size: float
) -> None:
    generator = np.random.default_rng(seed)
    rows = generator.standard_normal((n, k)).astype(np.float32)
    x = generator.standard_normal((tokens, 3)) @ generator.standard_normal((3, k)) * size  # far from full rank
    found = unpacked(*packed(rows, 4, Inputs.of(x.T @ x, 10**6), block), k)
    assert found is not None
    values, step = found
    assert np.isfinite(values).all() and (np.abs(values - rows) <= (FURTHEST + 1e-3) * step).all()


def test_compensation_lowers_the_error_of_outputs_where_inputs_go_together() -> None:
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((48, 160)).astype(np.float32)
    x = generator.standard_normal((900, 160)) @ (np.eye(160) + generator.standard_normal((160, 160)) / 10)

    def error(inputs: Inputs | None, of: np.ndarray) -> float:
        found = unpacked(*packed(rows, 4, inputs), 160)
        assert found is not None
        return float(np.linalg.norm(of @ (rows - found[0]).T))

    assert error(Inputs.of(x.T @ x, 900), x) < 0.85 * error(None, x)
    sizes = np.arange(1.0, 161, dtype=np.float32)
    apart = Inputs.of(np.diag(sizes**2), 160)
    assert error(apart, np.diag(sizes)) < error(None, np.diag(sizes))
    found = unpacked(*packed(rows, 4, apart), 160)  # nothing to make up: each to the nearest, but beyond the range
    assert found is not None and (np.abs(found[0] - rows) > 0.501 * found[1]).mean() < 0.1


def test_few_vectors_say_nothing_of_what_goes_together() -> None:
    x = np.random.default_rng(3).standard_normal((40, 64)).astype(np.float32)
    second = x.T @ x
    assert (Inputs.of(second, 63).upper == np.diag(np.diag(Inputs.of(second, 63).upper))).all()
    assert np.abs(np.triu(Inputs.of(second, 64).upper, 1)).max() > 0


def test_the_range_of_a_block_is_the_one_that_loses_least() -> None:
    w = np.random.default_rng(1).standard_normal((6, 4, 32)).astype(np.float32)
    felt = np.ones((4, 32), np.float32)

    def lost(scale: np.ndarray, zero: np.ndarray, weight: np.ndarray) -> np.ndarray:
        q = np.clip(np.rint(w / scale[..., None]) + zero[..., None], 0, 15)
        return np.asarray((weight * (w - scale[..., None] * (q - zero[..., None])) ** 2).sum(-1))

    low, high = w.min(-1), w.max(-1)
    plain = (high - low) / 15
    whole = plain, np.rint(-low / plain)
    assert (lost(*fitted_range(w, felt), felt) <= lost(*whole, felt) + 1e-6).all()
    felt[:, 5] = 1e4  # one input that is felt above all others
    one = np.zeros_like(felt)
    one[:, 5] = 1
    assert lost(*fitted_range(w, felt), one).mean() < 0.3 * lost(*whole, one).mean()


def test_second_moments_are_those_of_what_a_graph_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from converters.precision import second_moments as module

    model = onnx.load(language_model(tmp_path / "m.onnx", tied=False))
    batches = [*ids(), {"ids": np.random.default_rng(2).integers(0, 600, (3, 4))}]
    stored = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    x = np.concatenate([stored["table"][batch["ids"].ravel()] for batch in batches])
    a = np.maximum(x @ stored["up.T"], 0)
    passes = []
    monkeypatch.setattr(module, "_summed", lambda *args, own=module._summed: passes.append(1) or own(*args))
    for at_once, many in ((2**30, 1), (1, 2)):
        monkeypatch.setattr(module, "_AT_ONCE", at_once)
        passes.clear()
        found = module.second_moments(model, tmp_path, {"x": 64, "a": 96}, batches)
        assert found["x"].matrix == pytest.approx(x.T @ x, abs=1e-4) and found["x"].vectors == len(x)
        assert found["a"].matrix == pytest.approx(a.T @ a, abs=1e-4)
        assert len(passes) == many
    monkeypatch.setattr(module, "ENOUGH", 18 / 96)  # vectors of the first batch for each dimension
    few = module.second_moments(model, tmp_path, {"a": 96}, batches)["a"]
    assert few.matrix == pytest.approx(a[:18].T @ a[:18], abs=1e-4) and few.vectors == 18
    (table,) = (i for i in model.graph.initializer if i.name == "up.T")
    table.CopyFrom(numpy_helper.from_array(np.full((64, 96), np.float32(3e38)), "up.T"))
    with pytest.raises(ArtifactError, match="NaN or infinity"):
        module.second_moments(model, tmp_path, {"a": 96}, batches)


@needs_kernels
def test_four_bits_are_rounded_as_asked(tmp_path: Path) -> None:
    twin = language_model(tmp_path / "m.onnx", tied=True)
    made = {}
    for rounding in ("compensated", "nearest"):
        target = tmp_path / f"{rounding}.onnx"
        report = convert_precision(twin, target, "int4-weight-only", ids(), limit=loose(), rounding=rounding)  # type: ignore[arg-type]
        assert stored_faults(twin, target, "int4-weight-only") == [] and set(report.quantized) == {"up", "down", "head"}
        made[rounding] = {i.name: numpy_helper.to_array(i) for i in onnx.load(target).graph.initializer}
    compensated, nearest = made["compensated"], made["nearest"]
    changed = {name for name in nearest if (compensated[name] != nearest[name]).any()}
    assert {"up.T_Transposed_quantized", "down_quantized"} < changed and not changed & {
        name for name in nearest if name.startswith("table")
    }
    with pytest.raises(UsageError, match="no rounding 'up'"):
        convert_precision(twin, tmp_path / "w.onnx", "int4-weight-only", ids(), rounding="up")  # type: ignore[arg-type]


@needs_kernels
@each
@pytest.mark.parametrize("block", [64, 128])
def test_longer_blocks_are_converted_rightly(precision: Any, block: int, tmp_path: Path) -> None:
    twin, target = language_model(tmp_path / "m.onnx", tied=True, width=160), tmp_path / "w.onnx"
    report = convert_precision(twin, target, precision, ids(), limit=loose(), block=block)
    assert report.parity.error < (0.04 if precision.startswith("int8") else 0.35) and report.tables == ("table",)
    layers = [n for n in onnx.load(target).graph.node if n.op_type == "MatMulNBits"]
    sizes = {n.name: next(a.i for a in n.attribute if a.name == "block_size") for n in layers}
    assert sizes == {"up": block, "down": block, "head": 32}  # which shares a table of rows of 160 = 5 * 32
    assert stored_faults(twin, target, precision) == []
    for wrong in (48, 64.0):
        with pytest.raises(UsageError, match="no such block"):
            convert_precision(twin, target, precision, ids(), block=wrong)  # type: ignore[arg-type]


@needs_kernels
def test_a_weight_of_two_layers_is_rounded_for_the_inputs_of_both(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", "x w", "h"),
        node("Tanh", "h", "t"),
        node("MatMul", "t w", "z"),
        node("Tanh", "z", "u"),
        node("MatMul", "u v", "y"),
    ]
    x = np.random.default_rng(5).standard_normal((400, 64)).astype(np.float32)
    x[:, 1:] += x[:, :1]
    twin = graph_of(tmp_path / "m.onnx", nodes, {"w": square(), "v": square(1)})
    convert_precision(twin, tmp_path / "w.onnx", "int4-weight-only", [{"x": x}], limit=loose())
    t = np.tanh(x @ square())
    q, scale, zero = packed(square().T, 4, Inputs.of(x.T @ x + t.T @ t, 800))
    held = {i.name: numpy_helper.to_array(i) for i in onnx.load(tmp_path / "w.onnx").graph.initializer}
    assert (held["w_Transposed_scale"] == scale).all() and (held["w_Transposed_zero_point"] == zero).all()
    assert (held["w_Transposed_quantized"] == q).mean() > 0.98  # sums in another order round others


def language_model(path: Path, *, tied: bool, width: int = 64, vocabulary: int = 600, bias: bool = True) -> Path:
    """A table, two layers and a head, which may be the table again."""
    generator = np.random.default_rng(0)

    def stored(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(generator.standard_normal(shape).astype(np.float32) / 8, name)

    kept = [
        stored("table", vocabulary, width),
        stored("up.T", width, 96),
        stored("down", width, 96),
        *([stored("b", width)] if bias else []),
    ]
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"], "look-up"),
        helper.make_node("MatMul", ["x", "up.T"], ["h"], "up"),
        helper.make_node("Relu", ["h"], ["a"], "act"),
        helper.make_node("Reshape", ["a", "flat"], ["f"], "flat"),
        helper.make_node("Gemm", ["f", "down", *(["b"] if bias else [])], ["z"], "down", transB=1),
    ]
    kept.append(numpy_helper.from_array(np.array([-1, 96], np.int64), "flat"))
    if tied:
        nodes += [helper.make_node("Transpose", ["table"], ["turned"], "turn", perm=[1, 0])]
    else:
        kept.append(stored("turned", width, vocabulary))
    nodes.append(helper.make_node("MatMul", ["z", "turned"], ["logits"], "head"))
    graph = helper.make_graph(
        nodes,
        "lm",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "tokens"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", vocabulary])],
        kept,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


def ids(vocabulary: int = 600) -> list[dict[str, np.ndarray]]:
    return [{"ids": np.random.default_rng(1).integers(0, vocabulary, (2, 9))}]


def bits_of(path: Path) -> dict[str, int]:
    nodes = [node for node in onnx.load(path).graph.node if node.op_type == "MatMulNBits"]
    return {node.name: next(a.i for a in node.attribute if a.name == "bits") for node in nodes}


def loose() -> Limit:
    return Limit(0.5, 0.0, 1)


@needs_kernels
@each
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_heads_and_tables_have_eight_bits_and_a_shared_weight_is_stored_once(
    precision: str, tied: bool, bias: bool, tmp_path: Path
) -> None:
    twin = language_model(tmp_path / "m.onnx", tied=tied, bias=bias)
    report = convert_precision(twin, tmp_path / "w.onnx", precision, ids(), limit=loose())  # type: ignore[arg-type]
    assert bits_of(tmp_path / "w.onnx") == {"up": BOTH[precision], "down": BOTH[precision], "head": 8}
    assert set(report.quantized) == {"up", "down", "head"} and report.tables == ("table",)
    names = [i.name for i in onnx.load(tmp_path / "w.onnx").graph.initializer]
    assert len(names) == len(set(names))
    assert ("turned_Transposed_quantized" in names) == (not tied) and "table_quantized" in names
    assert not {"table", "turned", "up.T", "down"} & set(names)
    assert report.parity.error < (0.03 if precision.startswith("int8") else 0.3)
    weights = (600 + 96 + 96) * 64 * 4 + (0 if tied else 600 * 64 * 4)
    assert report.bytes < 0.32 * weights + 4000


@needs_kernels
def test_a_table_that_has_no_whole_blocks_stays_and_the_head_that_shares_it_does_not(tmp_path: Path) -> None:
    twin = language_model(tmp_path / "m.onnx", tied=True, width=40)
    report = convert_precision(twin, tmp_path / "w.onnx", "int4-weight-only", ids(), limit=loose())
    assert report.tables == () and bits_of(tmp_path / "w.onnx") == {"up": 4, "down": 4, "head": 8}
    names = {i.name for i in onnx.load(tmp_path / "w.onnx").graph.initializer}
    assert {"table", "table_quantized"} <= names


@needs_kernels
@each
def test_nodes_asked_for_stay_in_fp32(precision: str, tmp_path: Path) -> None:
    twin = language_model(tmp_path / "m.onnx", tied=True)
    target = tmp_path / "w.onnx"
    report = convert_precision(twin, target, precision, ids(), keep=["head", "look-*"], limit=loose())  # type: ignore[arg-type]
    assert set(bits_of(target)) == {"up", "down"} and set(report.kept) == {"head", "look-up"} and not report.tables
    report = convert_precision(twin, target, precision, ids(), keep=["head"], limit=loose())  # type: ignore[arg-type]
    assert not report.tables and "table_quantized" not in {i.name for i in onnx.load(target).graph.initializer}
    with pytest.raises(UnsupportedModelError, match="no linear layer to quantise"):
        convert_precision(twin, target, precision, ids(), keep=["*"], limit=loose())  # type: ignore[arg-type]


@needs_kernels
@pytest.mark.parametrize(
    ("precision", "part"),
    [*((p, part) for p in BOTH for part in ("_quantized", "_scale")), ("int4-weight-only", "_zero_point")],
)
def test_wrong_values_scales_and_zero_points_are_found(precision: str, part: str, tmp_path: Path) -> None:
    twin, target = language_model(tmp_path / "m.onnx", tied=True), tmp_path / "w.onnx"
    convert_precision(twin, target, precision, ids(), limit=loose())  # type: ignore[arg-type]
    assert stored_faults(twin, target, precision) == []
    proto = onnx.load(target)
    (stored,) = (i for i in proto.graph.initializer if i.name == f"down{part}")
    values = numpy_helper.to_array(stored).copy()
    values[3] = (
        values[3] * np.float32(1.5 if precision.startswith("int4") else 1.2) if part == "_scale" else values[3] ^ 0x30
    )
    stored.CopyFrom(numpy_helper.from_array(values, stored.name))
    onnx.save(proto, target)
    with pytest.raises(ParityError, match="down is off the fp32 weight"):
        prove(twin, target, precision, ids(), limit=loose())


@needs_kernels
def test_values_that_are_all_a_little_off_are_found(tmp_path: Path) -> None:
    twin, target = language_model(tmp_path / "m.onnx", tied=True), tmp_path / "w.onnx"
    convert_precision(twin, target, "int4-weight-only", ids(), limit=loose())
    proto = onnx.load(target)
    (stored,) = (i for i in proto.graph.initializer if i.name == "down_zero_point")
    values = numpy_helper.to_array(stored)
    stored.CopyFrom(numpy_helper.from_array((values + 0x11).astype(np.uint8), stored.name))  # all zero points by one
    onnx.save(proto, target)
    (fault,) = stored_faults(twin, target, "int4-weight-only")
    assert fault.startswith("down is off the fp32 weight by")


@needs_kernels
@each
def test_rows_of_two_layers_that_were_swapped_are_found(precision: str, tmp_path: Path) -> None:
    twin, target = language_model(tmp_path / "m.onnx", tied=False), tmp_path / "w.onnx"
    convert_precision(twin, target, precision, ids(), limit=loose())  # type: ignore[arg-type]
    proto = onnx.load(target)
    for stored in proto.graph.initializer:
        if stored.name.startswith("up.T_Transposed"):
            values = numpy_helper.to_array(stored)
            stored.CopyFrom(numpy_helper.from_array(np.roll(values, 1, 0), stored.name))
    onnx.save(proto, target)
    assert any(fault.startswith("up.T is off") for fault in stored_faults(twin, target, precision))


def graph_of(
    path: Path, nodes: list[onnx.NodeProto], stored: dict[str, np.ndarray], opset: int = 20, **more: Any
) -> Path:
    """A graph from x (rows, 64) to y."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 64]), *more.get("inputs", [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None), *more.get("outputs", [])],
        [numpy_helper.from_array(values.astype(np.float32), name) for name, values in stored.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9), path)
    return path


def square(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((64, 64)).astype(np.float32) / 8


def node(op: str, inputs: str, output: str, name: str | None = None, **how: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), [output], output if name is None else name, **how)


UNEVEN = np.random.default_rng(7).standard_normal((64, 96)).astype(np.float32) / 8
ROWS = [{"x": np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)}]
GRAPHS: dict[str, tuple[list[onnx.NodeProto], dict[str, int]]] = {
    # name -> (nodes, bits of its layers in int4)
    "one weight within and at the end": (
        [node("MatMul", "x w", "h"), node("Tanh", "h", "t"), node("MatMul", "t w", "y")],
        {"h": 8, "y": 8},
    ),
    "one weight both ways": (
        [node("MatMul", "x w", "h"), node("Tanh", "h", "t"), node("Gemm", "t w", "y", transB=1)],
        {"h": 8, "y": 8},
    ),
    "one weight both ways, within": (
        [
            node("MatMul", "x u", "h"),
            node("Tanh", "h", "t"),
            node("Gemm", "t u", "z", transB=1),
            node("Tanh", "z", "s"),
            node("MatMul", "s v", "y"),
        ],
        {"h": 4, "z": 4, "y": 8},
    ),
    "nodes without names": (
        [node("MatMul", "x w", "h", ""), node("Tanh", "h", "t", ""), node("MatMul", "t v", "y", "")],
        {"h": 4, "y": 8},
    ),
    "a head behind views": (
        [
            node("MatMul", "x w", "h"),
            node("Tanh", "h", "t"),
            node("MatMul", "t v", "z"),
            node("Transpose", "z", "turned"),
            node("Softmax", "turned", "soft"),
            node("Div", "soft two", "y"),
        ],
        {"h": 4, "z": 8},
    ),
    "a residual stream": (
        [node("MatMul", "x w", "h"), node("Tanh", "h", "t"), node("MatMul", "t v", "z"), node("Add", "z x", "y")],
        {"h": 4, "z": 4},
    ),
    "what is no transposition": (
        [node("Transpose", "w", "same", perm=[0, 1]), node("MatMul", "x same", "h"), node("MatMul", "h v", "y")],
        {"y": 8},
    ),
    "a bias of one number": (
        [node("Gemm", "x w one", "h"), node("MatMul", "h v", "y")],
        {"y": 8},
    ),
}


@needs_kernels
@each
@pytest.mark.parametrize("name", GRAPHS)
def test_unusual_graphs_are_converted_rightly(name: str, precision: str, tmp_path: Path) -> None:
    nodes, bits = GRAPHS[name]
    stored = {"w": square(), "v": square(1), "u": UNEVEN, "two": np.array(2.0), "one": np.array([0.5])}
    read = {each for node in nodes for each in node.input}
    twin = graph_of(tmp_path / "m.onnx", nodes, {k: v for k, v in stored.items() if k in read})
    target = tmp_path / "w.onnx"
    report = convert_precision(twin, target, precision, ROWS, limit=loose())  # type: ignore[arg-type]
    assert report.parity.error < (0.03 if precision.startswith("int8") else 0.3)
    made = {
        node.output[0]: next(a.i for a in node.attribute if a.name == "bits")
        for node in onnx.load(target).graph.node
        if node.op_type == "MatMulNBits"
    }
    assert made == (bits if precision.startswith("int4") else dict.fromkeys(bits, 8))


@needs_kernels
def test_inner_graphs_inputs_and_outputs_keep_what_they_read(tmp_path: Path) -> None:
    def branch(name: str, text: str) -> onnx.GraphProto:
        made = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        return helper.make_graph([node("Mul", text, name)], name, [], [made])

    nodes = [
        node("MatMul", "x w", "h"),
        node("Greater", "one two", "more"),
        node("If", "more", "c", then_branch=branch("a", "h one"), else_branch=branch("b", "h two")),
        node("MatMul", "c v", "y"),
    ]
    values = {"w": square(), "v": square(1), "one": np.array(1.0), "two": np.array(2.0)}
    given = [helper.make_tensor_value_info("w", TensorProto.FLOAT, [64, 64])]
    out = [helper.make_tensor_value_info("v", TensorProto.FLOAT, [64, 64])]
    twin = graph_of(tmp_path / "m.onnx", nodes, values, inputs=given, outputs=out)
    report = convert_precision(twin, tmp_path / "w.onnx", "int8-weight-only", ROWS, limit=loose())
    assert report.parity.error < 0.03 and len(report.quantized) == 2
    graph = onnx.load(tmp_path / "w.onnx").graph
    assert [value.name for value in graph.input] == ["x"] and "v" in {i.name for i in graph.initializer}


@needs_kernels
@each
def test_what_cannot_be_converted_is_refused_in_words(precision: Any, tmp_path: Path) -> None:
    nodes = [node("MatMul", "x w", "h"), node("Tanh", "h", "y")]
    endless = square()
    endless[3, 5] = np.inf
    more = [nodes[0], node("Tanh", "h", "t"), node("MatMul", "t v", "y")]
    for made, weights in ((nodes, {"w": endless}), (more, {"w": endless, "v": square(1)})):
        twin = graph_of(tmp_path / "m.onnx", made, weights)
        with pytest.raises(UnsupportedModelError, match="a weight is not finite"):
            convert_precision(twin, tmp_path / "w.onnx", precision, ROWS, limit=loose())
    model = onnx.load(language_model(tmp_path / "m.onnx", tied=False))
    (table,) = (i for i in model.graph.initializer if i.name == "table")
    values = numpy_helper.to_array(table).copy()
    values[3, 5] = np.nan  # in a table that no layer reads, of a row that no batch asks for
    table.CopyFrom(numpy_helper.from_array(values, "table"))
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(UnsupportedModelError, match="a weight is not finite"):
        convert_precision(tmp_path / "m.onnx", tmp_path / "w.onnx", precision, [{"ids": np.array([[1, 2]])}])
    twin = graph_of(tmp_path / "m.onnx", nodes, {"w": square()}, opset=12)
    with pytest.raises(UnsupportedModelError, match="opset 13 or newer"):
        convert_precision(twin, tmp_path / "w.onnx", precision, ROWS, limit=loose())
    twin = graph_of(
        tmp_path / "m.onnx",
        [*nodes, node("Identity", "w_Transposed_scale", "z")],
        {"w": square(), "w_Transposed_scale": square()},
        outputs=[helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
    )
    with pytest.raises(UnsupportedModelError, match="of the names that quantised weights get"):
        convert_precision(twin, tmp_path / "w.onnx", precision, ROWS, limit=loose())
    assert not (tmp_path / "w.onnx").exists()


@needs_kernels
def test_four_bits_in_place_of_eight_and_scales_that_are_not_finite_are_found(tmp_path: Path) -> None:
    twin, target = language_model(tmp_path / "m.onnx", tied=True), tmp_path / "w.onnx"
    convert_precision(twin, target, "int4-weight-only", ids(), limit=loose())
    assert any(fault.startswith("down is off") for fault in stored_faults(twin, target, "int8-weight-only"))
    proto = onnx.load(target)
    (stored,) = (i for i in proto.graph.initializer if i.name == "down_scale")
    values = numpy_helper.to_array(stored).copy()
    values[0, 0] = np.inf
    stored.CopyFrom(numpy_helper.from_array(values, stored.name))
    onnx.save(proto, target)
    assert any(fault.startswith("down is off") for fault in stored_faults(twin, target, "int4-weight-only"))


@needs_kernels
def test_a_call_reads_fewer_bytes_of_fewer_bits(tmp_path: Path) -> None:
    from bench.work import work_of

    twin = language_model(tmp_path / "m.onnx", tied=True)
    read = [work_of(twin, ids()[0]).bytes]
    for precision in BOTH:
        convert_precision(twin, tmp_path / "w.onnx", precision, ids(), limit=loose())  # type: ignore[arg-type]
        read.append(work_of(tmp_path / "w.onnx", ids()[0]).bytes)
    assert read[0] > read[1] > read[2]
    uneven = language_model(tmp_path / "m.onnx", tied=True, vocabulary=601)
    convert_precision(uneven, tmp_path / "w.onnx", "int8-weight-only", ids(), limit=loose())
    assert work_of(tmp_path / "w.onnx", ids()[0]).unaligned == work_of(uneven, ids()[0]).unaligned > 0
