"""Parity: right forms agree at every size; every wrong one is caught, named and explained."""

from __future__ import annotations

import copy
import json

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from shipped import MODELS, SIGNATURES, exported

from converters.comparison import compare
from converters.onnx_export import EXAMPLE_SIZES, export_onnx
from converters.parity import check_parity, parity_sizes
from converters.surgery import compact
from deploy_prune.adapters import find_sites
from deploy_prune.architecture import weights_sha256
from deploy_prune.errors import ParityError, UsageError
from deploy_prune.gates import masked
from deploy_prune.plan import plan_from_units
from deploy_prune.units import PER_HEAD, UnitKind, groups


def make_plan(model, drop=1):
    """A plan that drops the first `drop` heads of every site, and the first third of its neurons and of the qk and vo
    of every kept head."""
    sites = find_sites(model)
    kept = {}
    for site, kind in groups(sites):
        slots = site.counts[kind]
        lanes = range(drop, site.lanes(kind)) if kind in PER_HEAD else [0]
        gone = drop if kind is UnitKind.HEAD else slots // 3
        kept[site.name, kind] = [lane * slots + slot for lane in lanes for slot in range(gone, slots)]
    return sites, plan_from_units("tiny", weights_sha256(model), sites, kept)


def masked_form(model, sites, plan, signature):
    def form(inputs):
        with masked(model, sites, plan):
            return signature.call(model, inputs)

    return form


@pytest.mark.parametrize("name", MODELS)
def test_masked_compact_and_onnx_agree(name, request, tmp_path):
    model, signature = request.getfixturevalue(name), SIGNATURES[name]
    sites, plan = make_plan(model)
    small = compact(model, plan)
    export_onnx(small, tmp_path / "small.onnx", signature)
    report = check_parity(
        {"masked": masked_form(model, sites, plan, signature), "compact": small, "onnx": tmp_path / "small.onnx"},
        signature,
    )
    assert [(p.reference, p.candidate) for p in report.pairs] == [("masked", "compact"), ("compact", "onnx")]
    assert all(
        p.agreement == 1.0 and p.error <= p.tolerance and len(p.checks) == len(parity_sizes(signature))
        for p in report.pairs
    )
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["pairs"][1]["candidate"] == "onnx"


@pytest.fixture
def vit(tiny_vit):
    """(model, ONNX file, signature) of the dense tiny ViT."""
    return tiny_vit, exported("tiny_vit", tiny_vit)[0], SIGNATURES["tiny_vit"]


def test_real_examples_are_compared_beside_made_up_inputs(vit):
    model, path, signature = vit
    report = check_parity(
        {"torch": model, "onnx": path}, signature, sizes=[{"batch": 1}], examples=[{"images": torch.ones(4, 3, 32, 32)}]
    )
    assert [check.sizes for check in report.pairs[0].checks] == [{"batch": 1}, {"batch": 4}]


def damaged(path, change, to):
    """`path` with one weight changed by `change`, written to `to`."""
    proto = onnx.load(path)
    initializer = next(i for i in proto.graph.initializer if i.name == "blocks.1.mlp.fc2.weight.T")
    value = numpy_helper.to_array(initializer).copy()
    value[3, 7] += change
    initializer.CopyFrom(numpy_helper.from_array(value, initializer.name))
    onnx.save(proto, to)
    return to


def test_corrupted_weight_in_the_file_is_caught_by_the_outputs(vit, tmp_path):
    model, path, signature = vit
    bad = damaged(path, 0.5, tmp_path / "bad.onnx")
    with pytest.raises(ParityError) as caught:
        check_parity({"compact": model, "onnx": bad}, signature, same_weights=False)
    text = str(caught.value)
    assert caught.value.exit_code == 1
    assert len(caught.value.problems) == len(parity_sizes(signature))
    assert "compact -> onnx at batch 3: error" in text and "tolerance 2e-04" in text
    assert "first at output[0, " in text and "damaged weight" in text


def test_corrupted_weight_too_small_to_show_in_the_outputs_is_caught(vit, tmp_path):
    model, path, signature = vit
    bad = damaged(path, 1e-6, tmp_path / "bad.onnx")
    check_parity({"compact": model, "onnx": bad}, signature, same_weights=False)
    with pytest.raises(ParityError, match=r"blocks.1.mlp.fc2.weight.T differs in 1 of 4608 values"):
        check_parity({"compact": model, "onnx": bad}, signature)


def swap_heads(layer, width):
    with torch.no_grad():
        first = layer.weight[:, :width].clone()
        layer.weight[:, :width] = layer.weight[:, width : 2 * width]
        layer.weight[:, width : 2 * width] = first


@pytest.mark.parametrize(
    ("name", "output"), [("tiny_vit", "blocks.0.attn.proj"), ("tiny_llama", "model.layers.1.self_attn.o_proj")]
)
def test_swapped_heads_are_caught(name, output, request):
    model, signature = request.getfixturevalue(name), SIGNATURES[name]
    sites, plan = make_plan(model)
    small = compact(model, plan)
    layer = small.get_submodule(output)  # reads two heads
    swap_heads(layer, layer.in_features // 2)
    with pytest.raises(ParityError, match=r"masked -> compact .*(.|\n)*heads cut in another order"):
        check_parity({"masked": masked_form(model, sites, plan, signature), "compact": small}, signature)


def test_stale_head_count_is_caught(tiny_vit):
    signature = SIGNATURES["tiny_vit"]
    sites, plan = make_plan(tiny_vit)
    small = compact(tiny_vit, plan)
    small.blocks[0].attn.num_heads = 3
    with pytest.raises(ParityError, match=r"compact fails: RuntimeError(.|\n)*stale head count"):
        check_parity({"masked": masked_form(tiny_vit, sites, plan, signature), "compact": small}, signature)


def test_stale_head_count_that_still_runs_is_caught(tiny_bert):
    signature = SIGNATURES["tiny_bert"]
    wrong = copy.deepcopy(tiny_bert)
    attention = wrong.bert.encoder.layer[0].attention.self
    attention.num_attention_heads, attention.attention_head_size = 2, 16  # the same width in fewer heads
    with pytest.raises(ParityError, match="stale head count"):
        check_parity({"dense": tiny_bert, "compact": wrong}, signature)


def test_wrong_attention_scale_is_caught(tiny_llama):
    wrong = copy.deepcopy(tiny_llama)
    for layer in wrong.model.layers:
        layer.self_attn.scaling *= 0.9
    with pytest.raises(ParityError, match="wrong attention scale"):
        check_parity({"dense": tiny_llama, "compact": wrong}, SIGNATURES["tiny_llama"])


def test_nan_is_never_equal_even_to_itself(vit):
    model, _, signature = vit
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[0, 0] = float("nan")
    with pytest.raises(ParityError, match=r"values of the reference are NaN or infinite(.|\n)*a weight that is NaN"):
        check_parity({"dense": model, "same": copy.deepcopy(model)}, signature)


def test_output_of_another_shape_is_caught(vit):
    model, _, signature = vit
    with pytest.raises(ParityError, match=r"shape \(3, 4\) instead of \(3, 5\)"):
        check_parity({"dense": model, "cut": lambda x: signature.call(model, x)[:, :4]}, signature)


def test_only_unpadded_positions_count(tiny_llama):
    signature = SIGNATURES["tiny_llama"]

    def noise(where):
        def form(inputs):
            output = signature.call(tiny_llama, inputs)
            return output + where(inputs["attention_mask"]).unsqueeze(-1)

        return form

    size = [{"batch": 3, "sequence": 9}]
    on_padding = noise(lambda mask: torch.where(mask == 1, 0.0, torch.nan))
    check_parity({"dense": tiny_llama, "noisy on padding": on_padding}, signature, sizes=size)
    with pytest.raises(ParityError):
        check_parity({"dense": tiny_llama, "noisy": noise(lambda mask: 0.01 * mask)}, signature, sizes=size)


def test_one_form_proves_nothing(vit):
    with pytest.raises(UsageError, match="at least two forms"):
        check_parity({"dense": vit[0]}, vit[2])


def test_parity_sizes_lie_off_the_trace():
    text, image = SIGNATURES["tiny_bert"], SIGNATURES["tiny_vit"]
    for sizes in (parity_sizes(text), parity_sizes(image), parity_sizes(text, {"batch": 3, "sequence": 7}, longest=64)):
        assert all(size.get("sequence") not in (EXAMPLE_SIZES["sequence"],) for size in sizes)
        assert {1} < {size["batch"] for size in sizes} and 2 not in {size["batch"] for size in sizes}
    assert {"batch": 5, "sequence": 64} in parity_sizes(text, {"batch": 3, "sequence": 7}, longest=64)
    assert max(size["sequence"] for size in parity_sizes(text, longest=9)) == 9


def test_error_is_relative_to_the_largest_reference_value():
    a = np.array([[4.0, -8.0], [1.0, 2.0]], np.float32)
    b = a + np.array([[0.0, 0.4], [0.0, 0.0]], np.float32)
    difference = compare(a, b, tolerance=0.01)
    assert difference.error == pytest.approx(0.05)
    assert (difference.index, difference.agreement) == ((0, 1), 1.0)
    assert compare(np.zeros((1, 2)), np.zeros((1, 2)), tolerance=0.0).error == 0.0
    assert compare(np.zeros((1, 2)), np.ones((1, 2)), tolerance=0.1).error == float("inf")
    assert compare(a, np.full_like(a, np.inf), tolerance=0.1).error == float("inf")
