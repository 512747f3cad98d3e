"""Graph passes for decoders: each computes what it replaced, whatever the tables and masks, and leaves alone what it
does not know."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxruntime
import pytest
from decoders import build
from forms import random_path, signature_of

from converters.onnx_export import export_onnx
from converters.parity import check_parity
from converters.passes.grouped_heads import StackGroups
from converters.passes.rms_norm import DivideByRoot
from converters.passes.rotary import FuseRotary
from converters.passes.softmax_floor import FloorMaskedScores
from converters.surgery import compact

LOWEST = np.float32(-3.4028234663852886e38)
SIZES = {"B": 2, "S": 5, "T": 7}


def graph(text, opset=20):
    """A model from ONNX's text form, shapes inferred, with every number of the text as a stored constant."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]> {text}')
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return model


def run(model, inputs):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    file = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"]).run(None, inputs)[0]


def inputs_of(model, seed=0):
    generator = np.random.default_rng(seed)
    shapes = {v.name: [d if isinstance(d, int) else SIZES[d.value] for d in v.shape] for v in model.graph.inputs}
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def ops(model):
    return [node.op_type for node in model.graph]


def fused(model, step, inputs=None):
    """Whether `step` changed the model; if so it computes as before."""
    inputs = inputs or inputs_of(model)
    before = run(model, inputs)
    changed = step(model).modified
    common.RemoveUnusedNodesPass()(model)
    np.testing.assert_allclose(run(model, inputs), before, rtol=2e-5, atol=2e-6)
    return changed


NORM = """main (float[B,S,8] x, float[8] w) => (float[B,S,8] y) {
  two = Constant <value_float = 2.0> ()
  tiny = Constant <value_float = 0.001> ()
  axis = Constant <value_ints = [%s]> ()
  square = Pow(x, two)
  mean = ReduceMean <keepdims = 1> (square, axis)
  shifted = Add(mean, tiny)
  root = Sqrt(shifted)
  inverse = Reciprocal(root)
  scaled = Mul(x, inverse)
  y = Mul(w, scaled)
}"""


@pytest.mark.parametrize("axis", ["-1", "2"])
def test_rms_norm_takes_the_form_that_the_runtime_makes_one_node_of(axis, tmp_path):
    model = graph(NORM % axis)
    assert fused(model, DivideByRoot())
    assert ops(model) == ["Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul"]
    assert loaded(ir.to_proto(model), tmp_path) == ["SimplifiedLayerNormalization"]


def loaded(proto, directory):
    """The operators that ONNX Runtime runs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(directory / "loaded.onnx")
    onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(directory / "loaded.onnx").graph.node]


def test_norm_over_another_axis_stays():
    assert not fused(graph(NORM % "1"), DivideByRoot())


def test_norm_whose_root_something_else_reads_stays():
    text = NORM.replace("=> (float[B,S,8] y)", "=> (float[B,S,8] y, float[B,S,1] also)")
    text = text.replace("inverse =", "also = Neg(root)\n  inverse =")
    assert not fused(graph(text % "-1"), DivideByRoot())


def rotary(lead, halves="f, f", order="minus, first"):
    """Embedding of (B, 3, S, 8) by angles of the leading dimensions `lead`."""
    return f"""main (float[B,3,S,8] x, float[{lead},S,4] f, float[{lead},S,4] g) => (float[B,3,S,8] y) {{
      angles = Concat <axis = -1> ({halves})
      cos = Cos(angles)
      sin = Sin(angles)
      sizes = Constant <value_ints = [4, 4]> ()
      first, second = Split <axis = 3> (x, sizes)
      minus = Neg(second)
      swapped = Concat <axis = -1> ({order})
      straight = Mul(x, cos)
      crossed = Mul(swapped, sin)
      y = Add(straight, crossed)
    }}"""


@pytest.mark.parametrize("lead", ["1,1", "1,3", "B,1", "B,3"])
def test_rotary_embedding_is_one_node_with_tables_for_all_for_each_head_and_for_each_example(lead):
    model = graph(rotary(lead))
    assert fused(model, FuseRotary())
    assert ops(model).count("RotaryEmbedding") == 1 and "Neg" not in ops(model)


@pytest.mark.parametrize("other", [{"halves": "f, g"}, {"order": "first, minus"}])
def test_embedding_with_unlike_halves_or_another_order_stays(other):
    assert not fused(graph(rotary("1,1", **other)), FuseRotary())


SHARED = """main (float[B,6,S,4] q, float[B,2,T,4] k, float[B,2,T,5] v) => (float[B,6,S,5] y) {
  two = Constant <value_ints = [2]> ()
  many = Constant <value_ints = [1, 1, 3, 1, 1]> ()
  keys = Constant <value_ints = [0, 6, -1, 4]> ()
  values = Constant <value_ints = [0, 6, -1, 5]> ()
  k1 = Unsqueeze(k, two)
  k2 = Expand(k1, many)
  k3 = Reshape(k2, keys)
  k4 = Transpose <perm = [0, 1, 3, 2]> (k3)
  v1 = Unsqueeze(v, two)
  v2 = Expand(v1, many)
  v3 = Reshape(v2, values)
  scores = MatMul(q, k4)
  weights = Softmax <axis = -1> (scores)
  y = MatMul(weights, v3)
}"""


def with_shapes(model, shapes):
    for value in (out for node in model.graph for out in node.outputs if out.name in shapes):
        value.shape = ir.Shape(shapes[value.name])
    return model


def test_heads_that_share_keys_and_values_are_stacked_not_repeated():
    model = with_shapes(
        graph(SHARED),
        {"k2": ["B", 2, 3, "T", 4], "v2": ["B", 2, 3, "T", 5], "k3": ["B", 6, "T", 4], "v3": ["B", 6, "T", 5]}
        | {"scores": ["B", 6, "S", "T"], "weights": ["B", 6, "S", "T"]},
    )
    assert fused(model, StackGroups())
    assert "Expand" not in ops(model)


MASKED = """main (float[B,3,S,S] scores, float[B,1,S,S] mask) => (float[B,3,S,S] y) {
  masked = Add(scores, mask)
  y = Softmax <axis = -1> (masked)
}"""


def test_masked_scores_weigh_nothing_and_make_no_subnormal_numbers():
    model = graph(MASKED)
    inputs = inputs_of(model)
    inputs["scores"] *= 200  # apart by more than any bound on the mask alone would bear
    open_ = np.tril(np.ones((5, 5), bool))[None, None].repeat(2, 0)
    open_[1, 0, 0] = False  # a row with nothing to attend to
    inputs["mask"] = np.where(open_, np.float32(0), LOWEST)
    assert fused(model, FloorMaskedScores(), inputs)
    weights = run(model, inputs)
    np.testing.assert_allclose(weights[1, :, 0], 0.2)
    weights[1, :, 0] = 1
    assert weights.min() > np.finfo(np.float32).tiny
    assert (weights[np.broadcast_to(~open_, weights.shape)] < 1e-20).sum() == (~open_).sum() * 3 - 15


def test_stored_mask_stays():
    text = MASKED.replace(", float[B,1,S,S] mask", "").replace(
        "masked = Add", "mask = Constant <value_float = -100.0> ()\n masked = Add"
    )
    assert not FloorMaskedScores()(graph(text)).modified


def cut(name):
    model = build(name)
    return compact(model, random_path(model, signature_of(name), seed=4).plan(0.3))


@pytest.mark.parametrize(
    ("name", "rotary_nodes", "norms"), [("tiny_llama", 4, 5), ("tiny_qwen3", 4, 9), ("tiny_smollm3", 2, 5)]
)
def test_every_layer_of_a_cut_decoder_fuses_and_equals_torch(name, rotary_nodes, norms, tmp_path):
    small, signature = cut(name), signature_of(name)
    export_onnx(small, tmp_path / "m.onnx", signature, opset=20, variant="ort")
    check_parity({"compact": small, "onnx": tmp_path / "m.onnx"}, signature)
    found = loaded(onnx.load(tmp_path / "m.onnx"), tmp_path)
    assert (found.count("RotaryEmbedding"), found.count("SimplifiedLayerNormalization")) == (rotary_nodes, norms)
    assert found.count("ReduceMax") == 2 and "Pow" not in found and "Neg" not in found
