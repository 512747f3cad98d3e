"""The audit: what ONNX Runtime makes of each layer is told, and a lost fusion or a stale head count is found."""

from __future__ import annotations

import json

import onnx
import pytest
from shipped import SIGNATURES
from test_parity import make_plan

from bench.audit import GraphAudit, judge_graph, layers_of, read_graph
from converters.onnx_export import export_onnx
from converters.surgery import compact
from deploy_prune.adapters import find_sites
from deploy_prune.errors import ArtifactError

ATTENTIONS = ("blocks.0.attn", "blocks.1.attn")


@pytest.fixture
def dense(tiny_vit, tmp_path):
    """(modules, audit) of the tiny ViT in variant ort."""
    export_onnx(tiny_vit, tmp_path / "dense.onnx", SIGNATURES["tiny_vit"], opset=20, variant="ort")
    modules = layers_of(find_sites(tiny_vit))
    return modules, read_graph(tmp_path / "dense.onnx", modules)


def audit_of(model, tmp_path, modules, variant):
    export_onnx(model, tmp_path / "m.onnx", SIGNATURES["tiny_vit"], opset=20, variant=variant)
    return read_graph(tmp_path / "m.onnx", modules)


def test_every_layer_is_told_with_its_nodes_and_heads(dense):
    _, audit = dense
    assert [audit.layer(name).heads for name in ATTENTIONS] == [3, 3]
    assert audit.layer("blocks.1.mlp").ops["Gelu"] == 1
    assert sum(sum(layer.ops.values()) for layer in audit.layers) == audit.nodes
    found = judge_graph(audit, audit, dict.fromkeys(ATTENTIONS, 3), [])
    assert found["passed"] and GraphAudit.of(json.loads(json.dumps(found))) == audit


def test_a_cut_member_with_all_its_fusions_passes_and_a_lost_one_is_named(dense, tiny_vit, tmp_path):
    modules, audit = dense
    small = compact(tiny_vit, make_plan(tiny_vit)[1])
    heads = dict.fromkeys(ATTENTIONS, 2)
    assert judge_graph(audit_of(small, tmp_path, modules, "ort"), audit, heads, [])["passed"]
    lost = judge_graph(audit_of(small, tmp_path, modules, "standard"), audit, heads, [])
    assert not lost["passed"]
    assert len(lost["problems"]) == 2
    assert lost["problems"][0].startswith("blocks.0.attn: attention fused in the dense model, not here (")
    assert judge_graph(audit_of(small, tmp_path, modules, "standard"), audit, heads, ATTENTIONS)[
        "passed"
    ]  # gone by plan


def test_a_stale_head_count_is_named(dense):
    _, audit = dense
    found = judge_graph(audit, audit, {"blocks.0.attn": 2, "blocks.1.attn": 3}, [])
    assert found["problems"] == ["blocks.0.attn: attention of 3 heads, the plan keeps 2"]


def test_a_graph_the_runtime_refuses_is_no_audit(dense, tmp_path):
    modules, _ = dense
    proto = onnx.load(tmp_path / "dense.onnx")
    next(n for n in proto.graph.node if n.op_type == "Attention").op_type = "Attraction"
    onnx.save(proto, tmp_path / "bad.onnx")
    with pytest.raises(ArtifactError, match="cannot load the model"):
        read_graph(tmp_path / "bad.onnx", modules)
