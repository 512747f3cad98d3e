"""Variants: every form of a graph computes the same function, whatever was cut, and uses only what it may."""

from __future__ import annotations

import onnx
import pytest
import torch
from shipped import MODELS, SIGNATURES
from test_parity import make_plan

from converters.onnx_export import export_onnx
from converters.parity import check_parity
from converters.surgery import compact
from deploy_prune.errors import ParityError, UnsupportedModelError, UsageError

FORMS = ("standard", "ort")


def ops(path):
    found = {}
    for node in onnx.load(path).graph.node:
        found[node.op_type] = found.get(node.op_type, 0) + 1
    return found


def export(model, path, name, variant):
    return export_onnx(model, path, SIGNATURES[name], opset=20, variant=variant)


@pytest.mark.parametrize("variant", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_every_variant_of_a_cut_model_equals_torch(name, variant, request, tmp_path):
    model = request.getfixturevalue(name)
    small = compact(model, make_plan(model)[1])  # heads, qk, vo and neurons gone: qk and vo of unlike width
    report = export(small, tmp_path / "m.onnx", name, variant)
    check_parity({"compact": small, "onnx": tmp_path / "m.onnx"}, SIGNATURES[name])
    assert report.weight_bytes == 4 * sum(p.numel() for p in small.parameters())
    domains = {node.domain for node in onnx.load(tmp_path / "m.onnx").graph.node}
    assert domains <= ({""} if variant == "standard" else {"", "com.microsoft"})


@pytest.mark.parametrize("name", ["tiny_vit", "tiny_distilbert"])
def test_layers_of_unlike_widths_and_a_vanished_one_all_fuse(name, request, tmp_path):
    from deploy_prune.adapters import find_sites
    from deploy_prune.architecture import weights_sha256
    from deploy_prune.plan import plan_from_units
    from deploy_prune.units import PER_HEAD, UnitKind, groups

    model = request.getfixturevalue(name)
    sites = find_sites(model)
    attentions = [site.name for site in sites if UnitKind.HEAD in site.counts]
    kept = {}
    for site, kind in groups(sites):
        last = site.name == attentions[-1]
        count = site.counts[kind]
        if last and (kind is UnitKind.HEAD or kind in PER_HEAD):
            kept[site.name, kind] = []  # the whole sublayer
        elif kind is UnitKind.VO:
            kept[site.name, kind] = [lane * count + slot for lane in range(site.lanes(kind)) for slot in range(3)]
        else:
            kept[site.name, kind] = list(range(site.units(kind)))
    small = compact(model, plan_from_units("tiny", weights_sha256(model), sites, kept))
    export(small, tmp_path / "m.onnx", name, "ort")
    check_parity({"compact": small, "onnx": tmp_path / "m.onnx"}, SIGNATURES[name])
    assert ops(tmp_path / "m.onnx").get("Attention") == len(attentions) - 1
    found = ops(tmp_path / "m.onnx")
    assert "Softmax" not in found


@pytest.mark.parametrize("variant", FORMS)
def test_tokens_are_rows_and_an_activation_is_one_node(tiny_vit, variant, tmp_path):
    export(tiny_vit, tmp_path / "m.onnx", "tiny_vit", variant)
    found = ops(tmp_path / "m.onnx")
    assert found["Gelu"] == 2 and "Erf" not in found
    assert {"standard": 13, "ort": 7}[variant] == found["Gemm"]  # every linear layer; q, k and v are apart, or inside
    assert "Slice" not in found and "Squeeze" not in found


def test_packed_weights_keep_the_names_of_what_they_hold(tiny_distilbert, tiny_vit, tmp_path):
    bert = export(tiny_distilbert, tmp_path / "b.onnx", "tiny_distilbert", "ort")
    prefix = "distilbert.transformer.layer.0.attention."
    assert "|".join(f"{prefix}{x}_lin.weight.T" for x in "qkv") in bert.initializers.weights
    cut = export(tiny_vit, tmp_path / "s.onnx", "tiny_vit", "standard")
    assert {f"blocks.0.attn.qkv.weight[{a}:{a + 48}].T" for a in (0, 48, 96)} <= set(cut.initializers.weights)
    whole = export(tiny_vit, tmp_path / "o.onnx", "tiny_vit", "ort")
    assert "blocks.0.attn.qkv.weight.T" in whole.initializers.weights  # what was one tensor is one again


@pytest.mark.parametrize("variant", FORMS)
def test_a_variant_is_the_same_bytes_every_time(tiny_distilbert, variant, tmp_path):
    first, second = (export(tiny_distilbert, tmp_path / f"{i}.onnx", "tiny_distilbert", variant) for i in range(2))
    assert first.sha256 == second.sha256


@pytest.mark.parametrize("attribute", ["num_heads", "scale"])
def test_a_stale_attribute_of_a_fused_attention_is_caught_by_parity(tiny_vit, attribute, tmp_path):
    path = tmp_path / "m.onnx"
    export(tiny_vit, path, "tiny_vit", "ort")
    proto = onnx.load(path)
    node = next(n for n in proto.graph.node if n.op_type == "Attention")
    stored = next(a for a in node.attribute if a.name == attribute)
    if attribute == "scale":
        stored.f *= 1.1
    else:
        stored.i = 2  # 48 columns divide by it as well
    onnx.save(proto, path)
    with pytest.raises(ParityError, match="error"):
        check_parity({"compact": tiny_vit, "onnx": path}, SIGNATURES["tiny_vit"])


def test_swapped_heads_inside_a_packed_weight_are_caught(tiny_vit, tmp_path):
    path = tmp_path / "m.onnx"
    export(tiny_vit, path, "tiny_vit", "ort")
    proto = onnx.load(path)
    stored = next(i for i in proto.graph.initializer if i.name == "blocks.0.attn.qkv.weight.T")
    value = onnx.numpy_helper.to_array(stored).copy()
    value[:, 96:112], value[:, 112:128] = value[:, 112:128].copy(), value[:, 96:112].copy()  # of the values
    stored.CopyFrom(onnx.numpy_helper.from_array(value, stored.name))
    onnx.save(proto, path)
    with pytest.raises(ParityError, match=r"blocks.0.attn.qkv.weight.T differs"):
        check_parity({"compact": tiny_vit, "onnx": path}, SIGNATURES["tiny_vit"])
    with pytest.raises(ParityError, match="error"):
        check_parity({"compact": tiny_vit, "onnx": path}, SIGNATURES["tiny_vit"], same_weights=False)


def test_standard_refuses_operators_of_one_runtime(tiny_vit, tmp_path, monkeypatch):
    import converters.variants as variants

    made = variants.passes("ort", {name for name, _ in tiny_vit.named_parameters()})
    monkeypatch.setattr(variants, "passes", lambda variant, weights: made)
    with pytest.raises(UnsupportedModelError, match=r"variant standard may not use(.|\n)*com.microsoft::Attention"):
        export(tiny_vit, tmp_path / "m.onnx", "tiny_vit", "standard")
    assert not list(tmp_path.iterdir())


def test_an_unknown_variant_is_refused(tiny_vit, tmp_path):
    with pytest.raises(UsageError, match="plain, standard, ort"):
        export(tiny_vit, tmp_path / "m.onnx", "tiny_vit", "fastest")


def test_rows_of_one_parameter_side_by_side_become_that_parameter_again():
    from converters.passes.stored import Part, assemble, parts_of, side_by_side

    weight = torch.arange(12.0).view(6, 2).numpy()
    parts = parts_of("w[0:2].T|w[2:6].T")
    assert parts == (Part("w", 0, 2, True), Part("w", 2, 6, True))
    assert side_by_side(parts, lambda name: 6) == "w.T"
    assert side_by_side(parts, lambda name: 8) == "w[0:6].T"
    assert (assemble("w[0:2].T|w[2:6].T", {"w": weight}) == weight.T).all()
    assert side_by_side(parts_of("a.T|b.T"), lambda name: 6) == "a.T|b.T"
