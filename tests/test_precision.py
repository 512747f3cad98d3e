"""Precision: a file in fp16, bf16, int8 or int4 is its twin, rounded and no more; overflow and wrong weights show."""

from __future__ import annotations

import re

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from onnx_models import save_mlp
from packaging import version
from shipped import EMBEDDING, SIGNATURES
from test_parity import make_plan

from converters.onnx_export import export_onnx
from converters.precision import HALF, PRECISIONS, Limit, convert_precision
from converters.precision.formats import WEIGHT_ONLY
from converters.precision.given import matching, precision_of
from converters.precision.half import lower
from converters.precision.int8 import FROM, saturates
from converters.precision.proof import prove
from converters.surgery import compact
from converters.variants import CONTRIB
from deploy_prune.errors import ArtifactError, ParityError, UnavailableError, UnsupportedModelError, UsageError
from deploy_prune.pipeline.precisions import kept_in, stored_weights

ABLE = [p for p in PRECISIONS if version.parse(onnxruntime.__version__) >= version.parse(FROM.get(p, "1"))]
INT8 = {
    name: pytest.mark.skipif(name not in ABLE, reason=f"{name} needs onnxruntime {oldest}")
    for name, oldest in FROM.items()
}
DYNAMIC, STATIC = (pytest.param(name, marks=INT8[name]) for name in ("int8-dynamic", "int8-static"))
LAYERS = {"tiny_vit": 13, "tiny_distilbert": 14, "tiny_bert": 12}


def signature_of(name):
    return EMBEDDING if name == "tiny_bert" else SIGNATURES[name]


def inputs_of(signature, batch=8, sequence=12, seed=0):
    made = signature.random_inputs({"batch": batch, "sequence": sequence}, seed=seed, padding=True)
    return {key: value.numpy() for key, value in made.items()}


def given(signature):
    return [inputs_of(signature, seed=seed) for seed in range(3)]


def written(model, path, name, variant="standard"):
    export_onnx(model, path, signature_of(name), opset=20, variant=variant)
    return path


def edit(path, change):
    """Change one stored tensor of a file in place: `change` is given name and values, and returns values or None."""
    proto = onnx.load(path)
    for stored in proto.graph.initializer:
        values = change(stored.name, numpy_helper.to_array(stored).copy())
        if values is not None:
            stored.CopyFrom(numpy_helper.from_array(values, stored.name))
            onnx.save(proto, path)
            return
    raise AssertionError("nothing to change")


@pytest.fixture
def vit(tiny_vit, tmp_path):
    return written(tiny_vit, tmp_path / "m.onnx", "tiny_vit")


@pytest.mark.parametrize("name", LAYERS)
def test_a_cut_model_in_every_precision_is_its_twin(name, request, tmp_path):
    model, signature = request.getfixturevalue(name), signature_of(name)
    small = compact(model, make_plan(model)[1])
    twin = written(small, tmp_path / "m.onnx", name)
    for precision in ABLE:
        target = tmp_path / f"{precision}.onnx"
        report = convert_precision(
            twin,
            target,
            precision,
            given(signature),
            made_up=[inputs_of(signature, 3, 7, 9)],
            limit=Limit(0.4 if precision == "int4-weight-only" else 0.2, 0.9, 1),
            reduce_range=saturates(),
        )
        proto = onnx.load(target)
        assert [v.type.tensor_type.elem_type for v in proto.graph.output] == [onnx.TensorProto.FLOAT]
        assert {node.domain for node in proto.graph.node} == ({"", CONTRIB} if precision in WEIGHT_ONLY else {""})
        ops = [node.op_type for node in proto.graph.node]
        if precision in HALF:
            assert report.parity.error < (0.01 if precision == "fp16" else 0.08)
            assert report.bytes < 0.75 * twin.stat().st_size
        else:
            assert len(report.quantized) == LAYERS[name] and not {"QLinearMatMul", "Attention"} & set(ops)
            if precision in WEIGHT_ONLY:
                assert ops.count("MatMulNBits") == LAYERS[name] and "Gemm" not in ops
            if precision == "int8-dynamic":
                assert ops.count("MatMulInteger") == LAYERS[name] and "Gemm" not in ops


def test_a_conversion_is_the_same_bytes_every_time(vit, tmp_path):
    for precision in [p for p in ("fp16", "int8-static", "int4-weight-only") if p in ABLE]:
        found = {
            convert_precision(vit, tmp_path / f"{i}.onnx", precision, given(SIGNATURES["tiny_vit"])).sha256
            for i in range(2)
        }
        assert len(found) == 1


def overflowing(model):
    """The same function, with one neuron of the first block a million times as large between its two layers."""
    first, second = model.blocks[0].mlp.fc1, model.blocks[0].mlp.fc2
    model.blocks[0].mlp.act = torch.nn.ReLU()  # the same at any scale
    with torch.no_grad():
        first.weight[3] *= 1e6
        first.bias[3] *= 1e6
        second.weight[:, 3] *= 1e-6
    return model


def test_fp16_overflow_is_caught_and_the_node_named(tiny_vit, tmp_path):
    twin = written(overflowing(tiny_vit), tmp_path / "m.onnx", "tiny_vit")
    data = given(SIGNATURES["tiny_vit"])
    with pytest.raises(UnsupportedModelError, match=r"node \S+ \(Gemm\) makes values up to \d(.|\n)*at most 65504"):
        convert_precision(twin, tmp_path / "low.onnx", "fp16", data)
    assert not (tmp_path / "low.onnx").exists()
    convert_precision(twin, tmp_path / "low.onnx", "bf16", data)
    report = convert_precision(twin, tmp_path / "low.onnx", "fp16", data, overflow="keep")
    assert any("reaches" in why for why in report.kept.values()) and report.largest[1] < 65504


def test_infinity_in_the_output_of_a_half_file_never_passes(tiny_vit, tmp_path, monkeypatch):
    from converters.precision import ranges

    twin = written(overflowing(tiny_vit), tmp_path / "m.onnx", "tiny_vit")
    monkeypatch.setattr(ranges, "overflowing", lambda largest, limit: {})  # calibration data that does not show it
    with pytest.raises(ParityError, match="NaN or infinite"):
        convert_precision(twin, tmp_path / "low.onnx", "fp16", given(SIGNATURES["tiny_vit"]))
    assert not (tmp_path / "low.onnx").exists()


@pytest.mark.parametrize("precision", ["fp16", DYNAMIC, STATIC])
def test_swapped_heads_in_a_converted_file_are_caught(precision, vit, tmp_path):
    data, target = given(SIGNATURES["tiny_vit"]), tmp_path / "low.onnx"
    convert_precision(vit, target, precision, data)

    def swap(name, values):
        if not name.startswith("blocks.0.attn.qkv.weight[96:144].T") or values.ndim != 2:
            return None
        values[:, :16], values[:, 16:32] = values[:, 16:32].copy(), values[:, :16].copy()
        return values

    edit(target, swap)
    with pytest.raises(ParityError, match=r"blocks\.0\.attn\.qkv\.weight\[96:144\]\.T is off the fp32 weight"):
        prove(vit, target, precision, data)


@pytest.mark.parametrize("precision", ["fp16", DYNAMIC])
def test_a_right_copy_beside_a_wrong_weight_hides_nothing(precision, vit, tmp_path):
    from converters.precision.stored import stored_faults

    target, name = tmp_path / "low.onnx", "blocks.1.mlp.fc2.weight.T"
    convert_precision(vit, target, precision, given(SIGNATURES["tiny_vit"]))
    held = f"{name}.fp16" if precision == "fp16" else f"{name}_quantized"
    proto, right = onnx.load(target), {i.name: i for i in onnx.load(vit).graph.initializer}[name]
    for stored in proto.graph.initializer:
        if stored.name in (name, held):
            stored.CopyFrom(numpy_helper.from_array(np.roll(numpy_helper.to_array(stored), 1, 0), held))
    proto.graph.initializer.append(right)
    onnx.save(proto, target)
    assert any(fault.startswith(f"{name} is off") for fault in stored_faults(vit, target, precision))


@pytest.mark.parametrize("precision", [DYNAMIC, STATIC])
def test_a_wrong_scale_of_a_weight_is_caught(precision, vit, tmp_path):
    data, target = given(SIGNATURES["tiny_vit"]), tmp_path / "low.onnx"
    convert_precision(vit, target, precision, data)
    edit(target, lambda name, values: values * 1.05 if name == "blocks.1.mlp.fc2.weight.T_scale" else None)
    with pytest.raises(ParityError, match=r"blocks\.1\.mlp\.fc2\.weight\.T is off the fp32 weight by"):
        prove(vit, target, precision, data)


@INT8["int8-static"]
def test_a_wrong_range_of_an_activation_shows_in_the_outputs(vit, tmp_path):
    data, target = given(SIGNATURES["tiny_vit"]), tmp_path / "low.onnx"
    convert_precision(vit, target, "int8-static", data)
    stored = {name for node in onnx.load(target).graph.node if node.op_type == "QuantizeLinear" for name in node.input}
    edit(target, lambda name, values: values * 0 + 9 if name in stored and name.endswith("_scale") else None)
    with pytest.raises(ParityError, match=r"error .*, limit|predictions agree on"):
        prove(vit, target, "int8-static", data, limit=Limit(0.2, 0.9, 1))


def test_squares_and_positions_stay_in_fp32_and_a_masks_fill_is_finite(tiny_llama, tmp_path):
    signature = SIGNATURES["tiny_llama"]
    twin = written(tiny_llama, tmp_path / "m.onnx", "tiny_llama")
    report = convert_precision(twin, tmp_path / "low.onnx", "fp16", given(signature), mask="attention_mask")
    assert set(report.kept.values()) == {"squares, sums and roots", "positions"}
    assert report.fills
    for stored in onnx.load(tmp_path / "low.onnx").graph.initializer:
        if stored.data_type == onnx.TensorProto.FLOAT16:
            assert np.isfinite(numpy_helper.to_array(stored).astype(np.float32)).all()


@pytest.mark.parametrize(("precision", "kept"), [("fp16", False), ("bf16", True)])
def test_what_has_no_kernel_for_gpus_in_bf16_stays_in_fp32(precision, kept):
    text = '<ir_version: 10, opset_import: ["" : 20]> main (float[2,8] x, float[2,8] z) => (float[2,8] y) '
    text += "{ sum = Add(x, z)\n most = ReduceMax(sum)\n y = Sub(sum, most) }"
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))
    for node in model.graph:
        node.name = node.op_type
    assert (lower(model, precision).kept.get("ReduceMax") == "no kernel for GPUs") is kept


@pytest.mark.skipif(
    version.parse(onnxruntime.__version__) < version.parse("1.23"), reason="older ones fuse it in fp32 alone"
)
def test_norm_in_fp16_is_one_node_of_the_runtime_with_the_casts_around_it(tiny_llama, tmp_path):
    twin = written(tiny_llama, tmp_path / "m.onnx", "tiny_llama", "standard")
    convert_precision(twin, tmp_path / "low.onnx", "fp16", given(SIGNATURES["tiny_llama"]), mask="attention_mask")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    onnxruntime.InferenceSession(str(tmp_path / "low.onnx"), options, providers=["CPUExecutionProvider"])
    loaded = [node.op_type for node in onnx.load(tmp_path / "loaded.onnx").graph.node]
    assert loaded.count("SimplifiedLayerNormalization") == 5 and "Pow" not in loaded


@pytest.mark.parametrize("variant", ["ort", "standard"])
def test_norm_in_bf16_is_in_fp32_with_its_scale_and_what_it_gives_is_lowered_behind(variant, tiny_llama, tmp_path):
    twin = written(tiny_llama, tmp_path / "m.onnx", "tiny_llama", variant)
    convert_precision(twin, tmp_path / "low.onnx", "bf16", given(SIGNATURES["tiny_llama"]), mask="attention_mask")
    graph = ir.load(tmp_path / "low.onnx").graph
    norms = [node for node in graph if node.op_type == "Div" and node.inputs[1].producer().op_type == "Sqrt"]
    scales = [use.node for node in norms for use in node.outputs[0].uses()]
    assert len(norms) == 5 and [node.op_type for node in scales] == ["Mul"] * 5
    for node in scales:
        assert {value.dtype for value in node.inputs} == {ir.DataType.FLOAT}


@INT8["int8-static"]
def test_nodes_can_be_kept_in_fp32_by_pattern_and_an_unknown_one_is_refused(vit, tmp_path):
    data, target = given(SIGNATURES["tiny_vit"]), tmp_path / "low.onnx"
    name = next(n.name for n in onnx.load(vit).graph.node if "blocks.1.mlp.fc2.weight.T" in n.input)
    for precision in [p for p in ("fp16", "int8-static") if p in ABLE]:
        report = convert_precision(vit, target, precision, data, keep=[name[:-1] + "?"])
        held = {i.name: i.data_type for i in onnx.load(target).graph.initializer}
        assert report.kept[name] == "asked for" and held["blocks.1.mlp.fc2.weight.T"] == onnx.TensorProto.FLOAT
        with pytest.raises(UsageError, match="no node is called 'nothing"):
            convert_precision(vit, target, precision, data, keep=["nothing*"])
    with pytest.raises(UnsupportedModelError, match="no linear layer to quantise"):
        convert_precision(vit, target, "int8-dynamic", data, keep=["*"])


@pytest.mark.parametrize(("precision", "oldest"), FROM.items())
def test_quantisation_is_refused_with_a_quantiser_that_is_known_to_fail(precision, oldest, vit, tmp_path, monkeypatch):
    monkeypatch.setattr(onnxruntime, "__version__", "1.21.1")
    with pytest.raises(UnavailableError, match=f"onnxruntime {re.escape(oldest)} or newer"):
        convert_precision(vit, tmp_path / "low.onnx", precision, given(SIGNATURES["tiny_vit"]))
    assert not (tmp_path / "low.onnx").exists()


def test_a_half_precision_file_of_another_tool_is_known_by_what_it_stores(vit, tmp_path):
    converted = tmp_path / "low.onnx"
    convert_precision(vit, converted, "fp16", given(SIGNATURES["tiny_vit"]))
    proto = onnx.load(converted)
    del proto.metadata_props[:]
    onnx.save(proto, converted)
    assert (precision_of(vit), precision_of(converted)) == ("fp32", "fp16")


@pytest.mark.parametrize("precision", HALF)
def test_a_stored_value_that_any_node_reads_in_fp32_is_not_rounded_for_it(precision, tmp_path):
    from onnx import helper

    w = np.full((4, 4), 0.1, np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["low"], "low"),
        helper.make_node("MatMul", ["x", "w"], ["kept"], "kept"),
        helper.make_node("MatMul", ["x", "v"], ["lowest"], "lowest"),
        helper.make_node("Cast", ["v"], ["wide"], "cast", to=onnx.TensorProto.DOUBLE),  # neither kept nor lowered
        helper.make_node("Sum", ["low", "kept", "lowest"], ["y"], "sum"),
    ]
    float_, rows = onnx.TensorProto.FLOAT, ["n", 4]
    outputs = [("y", float_, rows), ("wide", onnx.TensorProto.DOUBLE, [4, 4])]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", float_, rows)],
        [helper.make_tensor_value_info(*output) for output in outputs],
        [numpy_helper.from_array(w, "w"), numpy_helper.from_array(w, "v")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    lowered = ir.from_proto(model)
    lower(lowered, precision, ["kept"])
    proto = ir.to_proto(lowered)
    onnx.checker.check_model(proto, full_check=True)
    stored = {i.name: i for i in proto.graph.initializer}
    read = {node.name: stored[name] for node in proto.graph.node for name in node.input if name in stored}
    for name in ("kept", "cast"):
        assert np.array_equal(numpy_helper.to_array(read[name]), w) and read[name].data_type == float_
    for name in ("low", "lowest"):
        assert not np.array_equal(numpy_helper.to_array(read[name]).astype(np.float32), w)


def test_a_pattern_of_nodes_to_keep_counts_in_every_model_that_has_such_a_node(tmp_path):
    files = {"dense": save_mlp(tmp_path / "dense.onnx"), "s50": save_mlp(tmp_path / "s50.onnx")}
    cut = onnx.load(files["s50"])
    for node in cut.graph.node:
        node.name = "" if node.name == "up" else node.name  # as if that layer had vanished from the member
    onnx.save(cut, files["s50"])
    assert kept_in(files, ["up", "d*"]) == {"dense": ["up", "d*"], "s50": ["d*"]}
    assert kept_in(files, []) == {"dense": [], "s50": []}
    with pytest.raises(UsageError, match="no node is called 'upper', 'sideways'"):
        kept_in(files, ["up", "upper", "sideways"])


def test_a_name_with_brackets_names_itself():
    assert matching(["attn[0]", "m[al]p"], ["attn[0]", "attn0", "map", "mop"]) == {"attn[0]", "map"}


@pytest.mark.parametrize("precision", ABLE)
def test_bytes_of_weights_are_those_of_the_twins_tensors_alone(precision, vit, tmp_path):
    target = tmp_path / "low.onnx"
    convert_precision(vit, target, precision, given(SIGNATURES["tiny_vit"]))
    before = stored_weights(vit, target, precision)
    proto = onnx.load(target)
    for name in [i.name for i in onnx.load(vit).graph.initializer]:
        proto.graph.initializer.append(numpy_helper.from_array(np.zeros(9, np.float32), f"{name}.of_something_else"))
    onnx.save(proto, target)
    assert stored_weights(vit, target, precision) == before
    assert (0.45 if precision in HALF else 0.2) < before / stored_weights(vit, vit, "fp32") < 0.6


@pytest.mark.parametrize(("cpu", "told"), [("flags : avx2 avx_vnni", False), ("flags : avx2", True)])
def test_a_refused_int8_file_names_the_remedy_of_a_cpu_whose_sums_saturate(cpu, told, vit, monkeypatch):
    monkeypatch.setattr("converters.precision.int8.platform.machine", lambda: "x86_64")
    monkeypatch.setattr("converters.precision.int8.Path.read_text", lambda self: cpu)
    with pytest.raises(ParityError) as refused:
        prove(vit, vit, "int8-static", given(SIGNATURES["tiny_vit"]), limit=Limit(-1.0, 0.9, 1))
    assert ("precision.reduce_range=true" in str(refused.value)) is told


@INT8["int8-dynamic"]
def test_tables_of_embeddings_are_stored_row_by_row_in_8_bits(tmp_path):
    from onnx import helper

    from converters.precision.stored import stored_faults

    table = np.random.default_rng(0).standard_normal((400, 48)).astype(np.float32) * np.logspace(-3, 3, 400)[:, None]
    table = table.astype(np.float32)
    weight = np.eye(48, dtype=np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "ids"], ["rows"], "look"),
            helper.make_node("MatMul", ["rows", "weight"], ["out"], "linear"),
        ],
        "g",
        [helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, ["n", 48])],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(weight, "weight")],
    )
    twin, target = tmp_path / "m.onnx", tmp_path / "low.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), twin)
    report = convert_precision(twin, target, "int8-dynamic", [{"ids": np.arange(350, 400)}])
    assert report.tables == ("table",) and report.parity.error < 0.01
    assert report.bytes < 0.4 * twin.stat().st_size
    edit(target, lambda name, values: np.roll(values, 1, 0) if name == "table_quantized" else None)
    assert stored_faults(twin, target, "int8-dynamic")


@INT8["int8-dynamic"]
def test_no_linear_layer_is_left_behind_silently(vit, tmp_path, monkeypatch):
    from onnxruntime import quantization

    real = quantization.quantize_dynamic

    def forgetful(model, target, *, nodes_to_quantize, **options):
        real(
            model, target, nodes_to_quantize=nodes_to_quantize[1 : -len(nodes_to_quantize) // 2] or ["none"], **options
        )

    monkeypatch.setattr(quantization, "quantize_dynamic", forgetful)
    with pytest.raises(UnsupportedModelError, match="left linear layers in fp32"):
        convert_precision(vit, tmp_path / "low.onnx", "int8-dynamic", given(SIGNATURES["tiny_vit"]))


@INT8["int8-static"]
@pytest.mark.parametrize("calibrate", ["percentile", "entropy"])
def test_static_ranges_may_leave_outliers_out(calibrate, vit, tmp_path, capsys):
    target = tmp_path / "low.onnx"
    data = given(SIGNATURES["tiny_vit"])
    first = convert_precision(vit, target, "int8-static", data).sha256
    options = {"calibrate": calibrate, "percentile": 99.0}
    assert convert_precision(vit, target, "int8-static", data, limit=Limit(1, 0.5, 1), **options).sha256 != first
    assert capsys.readouterr().out == ""


def test_what_a_conversion_cannot_take_is_refused_in_our_words(vit, tmp_path):
    data, target = given(SIGNATURES["tiny_vit"]), tmp_path / "low.onnx"
    ((name, images),) = data[0].items()
    nan = np.full_like(images, np.nan)
    for words, batches, options in (
        ("not the inputs of the graph", [{"other": images}], {}),
        ("is no numpy array", [{name: torch.from_numpy(images)}], {}),
        (r"float32 array of shape \(any, 3, 32, 32\)", [{name: images.astype(np.float64)}], {}),
        ("not as the graph wants it", [{name: images[..., :9]}], {}),
        ("holds NaN", [data[0], {name: nan}], {}),
        ("no calibration data", [], {}),
        ("no overflow 'ignore'", data, {"overflow": "ignore"}),
        ("no calibrate 'max'", data, {"calibrate": "max"}),
        ("no such percentile", data, {"percentile": 300}),
        ("keep is one text", data, {"keep": "node"}),
        ("no input is called 'other'", data, {"mask": "other"}),
    ):
        with pytest.raises(UsageError, match=words):
            convert_precision(vit, target, "fp16", batches, **options)
    with pytest.raises(UnsupportedModelError, match="no node is left"):
        convert_precision(vit, target, "fp16", data, keep=["*"])
    assert not target.exists()


def test_only_a_whole_fp32_file_that_holds_its_weights_is_converted(vit, tmp_path):
    data, low = given(SIGNATURES["tiny_vit"]), tmp_path / "low.onnx"
    convert_precision(vit, low, "fp16", data)
    with pytest.raises(UsageError, match="only fp32 files"):
        convert_precision(low, tmp_path / "again.onnx", "int8-dynamic", data)
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(vit.read_bytes()[:5000])
    with pytest.raises(ArtifactError, match="not an ONNX file"):
        convert_precision(damaged, tmp_path / "again.onnx", "fp16", data)
    apart = tmp_path / "apart.onnx"
    onnx.save(onnx.load(vit), apart, save_as_external_data=True, location="apart.data")
    for precision in [p for p in ("fp16", "int8-static") if p in ABLE]:
        with pytest.raises(UnsupportedModelError, match="external data"):
            convert_precision(apart, tmp_path / "again.onnx", precision, data)
