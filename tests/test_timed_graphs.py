"""What a latency budget times: the nodes that ship, of decoders on caches of their own, nothing proved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from decoders import build
from forms import decoder_signature, image_signature, random_path
from onnx_models import save_mlp
from packaging import version
from torch import nn

from bench.inputs import graph_inputs
from bench.latency_table import LatencyTable
from converters.precision import PRECISIONS, convert_precision
from converters.precision.formats import LIMITS, WEIGHT_ONLY, Limit, check_timed
from converters.precision.int8 import FROM
from converters.precision.timed import write_timed
from deploy_prune.errors import UsageError
from deploy_prune.latency.graph import Graph
from deploy_prune.latency.place import DEFAULT_SEQUENCE, Place, last_level_cache
from deploy_prune.latency.shapes import probe
from deploy_prune.recipe import recipe_from

SIGNATURE = image_signature()
OLD = version.parse(onnxruntime.__version__) < version.parse(FROM["int8-weight-only"])


def nodes(file: Path) -> list[str]:
    return [node.op_type for node in onnx.load(file).graph.node]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_timed_graph_has_the_nodes_of_the_one_that_ships(precision: Any, tiny_vit: nn.Module, tmp_path: Path) -> None:
    if precision in WEIGHT_ONLY and OLD:
        pytest.skip("an older onnxruntime")
    images = [{"pixel_values": np.random.default_rng(0).standard_normal((4, 3, 32, 32)).astype(np.float32)}]
    graph = Graph(SIGNATURE, 20, "standard", precision=precision, batches=images)
    graph(tiny_vit, tmp_path / "timed.onnx")
    replace(graph, precision="fp32")(tiny_vit, tmp_path / "fp32.onnx")
    loose = Limit(1e9, 0.0, LIMITS[precision].again)
    convert_precision(tmp_path / "fp32.onnx", tmp_path / "shipped.onnx", precision, images, limit=loose)
    assert nodes(tmp_path / "timed.onnx") == nodes(tmp_path / "shipped.onnx")
    assert not list(tmp_path.glob("*.fp32.onnx"))


@pytest.mark.parametrize("precision", ["int8-dynamic", "fp16"])
def test_a_graph_that_has_lost_its_layers_can_be_timed_all_the_same(precision: Any, tmp_path: Path) -> None:
    file = save_mlp(tmp_path / "mlp.onnx")
    write_timed(file, tmp_path / "kept.onnx", precision, keep=["up", "down", "of another member"])
    assert nodes(tmp_path / "kept.onnx").count("MatMul") == 2


def test_tables_of_unlike_graphs_are_kept_apart() -> None:
    plain = Graph(SIGNATURE, 20, "standard")
    others = [
        replace(plain, variant="ort"),
        replace(plain, cache=True),
        replace(plain, cache=True, last_logits=True),
        replace(plain, precision="int8-dynamic"),
        replace(plain, precision="int8-dynamic", options={"reduce_range": True}),
    ]
    assert len({graph.form for graph in [plain, *others]}) == 6
    assert plain.form == "standard-20"


def test_decoders_that_lost_attentions_are_timed_on_caches_of_their_own(tmp_path: Path) -> None:
    model = build("tiny_llama")
    path = random_path(model, decoder_signature())
    lost = {site.name: dict(site.counts) for site in path.sites if site.name != path.sites[0].name}
    files = {"dense": tmp_path / "dense.onnx", "lost": tmp_path / "lost.onnx"}
    graph = Graph(decoder_signature(), cache=True)
    graph(model, files["dense"])
    graph(probe(model, path.sites, lost), files["lost"])
    place = Place("ort-cpu", 2, threads=1, seconds=0.01, past=7).settled(files["dense"])
    assert place.sizes() == {"batch": 2, "sequence": 1, "past": 7}
    report = place.time(files)
    assert report["lost"].p50_ms > 0
    assert report.samples.sizes == {"batch": 2, "past": 7}
    assert len(graph_inputs(files["lost"])) < len(graph_inputs(files["dense"]))
    prompt = Place("ort-cpu", 1, threads=1, past=0).settled(files["dense"])
    assert prompt.sequence == DEFAULT_SEQUENCE
    with pytest.raises(UsageError, match="no decoders with a cache"):
        replace(place, sequence=None).settled(save_mlp(tmp_path / "mlp.onnx"))


def test_ranges_of_a_decoder_come_from_prompts_on_its_own_empty_caches(tmp_path: Path) -> None:
    model = build("tiny_llama")
    path = random_path(model, decoder_signature())
    lost = {site.name: dict(site.counts) for site in path.sites if site.name != path.sites[0].name}
    texts = {name: np.ones((2, 6), np.int64) for name in ("input_ids", "attention_mask")}
    graph = Graph(decoder_signature(), cache=True, precision="int8-static", batches=[texts])
    for name, own in {"dense": model, "lost": probe(model, path.sites, lost)}.items():
        graph(own, tmp_path / f"{name}.onnx")
        assert "DequantizeLinear" in nodes(tmp_path / f"{name}.onnx")
    caches = [
        sum("past" in spec.name for spec in graph_inputs(tmp_path / f"{name}.onnx")) for name in ("dense", "lost")
    ]
    assert caches[0] == caches[1] + 2  # keys and values


@pytest.mark.parametrize(("cache", "cold"), [(None, False), (1, True), (1 << 40, False)])
def test_a_model_larger_than_the_caches_has_its_table_measured_cold(
    cache: int | None, cold: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy_prune.latency.place.last_level_cache", lambda: cache)
    file = save_mlp(tmp_path / "mlp.onnx")
    place = Place("ort-cpu", 1, threads=1, seconds=0.01).settled(file)
    assert place.cold is cold and place.facts(file)["cold"] is cold
    samples = place.time({"dense": file, "other": file}).samples
    assert (samples.ns.shape[2] == 1) is cold  # calls of one graph in a row


def test_the_largest_cache_is_told_in_bytes() -> None:
    size = last_level_cache()
    assert size is None or size > 1 << 14


def test_plans_are_timed_at_the_length_of_the_table(tmp_path: Path) -> None:
    model = build("tiny_llama")
    Graph(decoder_signature())(model, tmp_path / "dense.onnx")
    place = Place("ort-cpu", 1, threads=1, seconds=0.01)
    settled = place.settled(tmp_path / "dense.onnx")
    table = LatencyTable(2.0, 1.0, (), {"batch": 1, "sequence": settled.sequence})
    assert place.of(table) == settled
    assert settled.cell({"dense": tmp_path / "dense.onnx"}).inputs["input_ids"].shape == (1, DEFAULT_SEQUENCE)


@pytest.mark.parametrize(
    ("runtime", "precision", "steps"),
    [("ort-cpu", "fp16", False), ("torch-cpu", "fp32", True), ("ort-cuda", "bf16", True), ("openvino", "fp16", False)],
)
def test_what_a_runtime_cannot_time_is_refused(runtime: str, precision: str, steps: bool) -> None:
    check_timed("ort-cpu", "fp32", steps)
    with pytest.raises(UsageError):
        check_timed(runtime, precision, steps)


@pytest.mark.parametrize(
    ("latency", "more", "said"),
    [
        ({"past": 12}, {}, "expected `export.cache: true` with `family.latency.past`"),
        ({"precision": "int8-dynamic"}, {"precision": {"also": ["fp16"]}}, "among `precision.also`"),
    ],
)
def test_a_recipe_whose_bundle_would_not_hold_what_was_timed_is_refused(
    latency: dict[str, Any], more: dict[str, Any], said: str
) -> None:
    recipe = {
        "name": "r",
        "model": "timm:vit_tiny_patch16_224",
        "task": {"name": "causal-lm", "calibration": "text:t.txt"},
        "family": {"budget": "speedup", "targets": [2.0], "latency": latency},
        **more,
    }
    with pytest.raises(Exception, match=said):
        recipe_from(recipe)
    fits = {"export": {"cache": True}, "precision": {"also": ["int8-dynamic"]}}
    recipe_from({**recipe, **fits})
    recipe_from({**recipe, "family": {"sparsities": [0.3], "latency": latency}})  # nothing is timed by it


def test_how_weights_are_rounded_reaches_what_ships_and_what_is_timed() -> None:
    from deploy_prune.pipeline.choosing import timed_graph
    from deploy_prune.pipeline.precisions import options_of
    from deploy_prune.pipeline.setup import prepare
    from deploy_prune.recipe import load_recipe

    changes = ("precision.also=[int4-weight-only]", "precision.rounding=nearest", "precision.block=64")
    setup = prepare(load_recipe("digits", ["model=python:deploy_prune.demo:digits_vit_untrained", *changes]))
    ships = options_of(setup, "int4-weight-only")
    assert (ships["rounding"], ships["block"]) == ("nearest", 64)
    assert timed_graph(setup).options["block"] == 64
