"""The manifest: what was written is read, and nothing else is."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError
from shipped import bundle_of

from deploy_prune.errors import ArtifactError, UnavailableError
from deploy_prune.release.bundle import latency_entries, place
from deploy_prune.release.card import model_card
from deploy_prune.release.manifest import LatencyEntry, Manifest, RatioEntry, check_relative

RATIO = {"value": 0.7, "low": 0.6, "high": 0.8}
CELL = {
    "runtime": "ort-cpu",
    "device": "some CPU",
    "batch": 8,
    "self_check": {"result": "passed", **RATIO},
    "latencies": [
        {
            "name": "dense",
            "p50_ms": 1.0,
            "p90_ms": 1.2,
            "p99_ms": 2.0,
            "mean_ms": 1.1,
            "throughput": 7000.0,
            "ratio": RATIO,
            "verdict": "faster",
            "stable": True,
            "speedup": 1.4,
        }
    ],
}


@pytest.fixture
def bundle(tiny_vit, tmp_path):
    return bundle_of(tiny_vit, tmp_path)


def test_saved_manifest_loads_equal_and_saves_to_the_same_bytes(bundle):
    manifest = Manifest.load(bundle / "manifest.json")
    assert [member.name for member in manifest.members] == ["dense", "s02"]
    assert manifest.dense.plan is None and manifest.members[1].asked.value == 0.02
    before = (bundle / "manifest.json").read_bytes()
    manifest.save(bundle / "manifest.json")
    assert (bundle / "manifest.json").read_bytes() == before


def edited(bundle, change):
    """The manifest with `change` applied to its data, as somebody would who knows how to compute the digest."""
    from deploy_prune.release.manifest import _digest, _text

    path = bundle / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    body = {key: value for key, value in data.items() if key != "_digest"}
    path.write_text(_text({**body, "_digest": _digest(body)}))
    return path


def test_every_problem_is_listed_at_once(bundle):
    def change(data):
        data["members"][0]["name"] = "../dense"
        data["members"][1]["bytes"] = -1
        data["base"]["weights_sha256"] = "abc"
        data["surprise"] = 1

    with pytest.raises(ArtifactError) as caught:
        Manifest.load(edited(bundle, change))
    text = str(caught.value)
    assert caught.value.exit_code == 4
    for place_ in ("members.0.name", "members.1.bytes", "base.weights_sha256", "surprise"):
        assert place_ in text


@pytest.mark.parametrize("path", ["/etc/passwd", "../other", "a/../../b", "a\\b", "C:x", "", ".", "a//b", "./a", "a/"])
def test_path_that_could_leave_the_bundle_is_refused(bundle, path):
    with pytest.raises(ValueError, match="not a plain path"):
        check_relative(path)
    with pytest.raises(ArtifactError, match="not a plain path"):
        Manifest.load(edited(bundle, lambda data: data["members"][0].update(file=path)))
    with pytest.raises(ArtifactError, match="not a plain path"):
        Manifest.load(edited(bundle, lambda data: data["files"].update({path: data["files"]["README.md"]})))


def test_member_named_twice_and_file_not_listed_are_refused(bundle):
    def change(data):
        data["members"][1]["name"] = "dense"
        del data["files"]["models/s02.onnx"]

    with pytest.raises(ArtifactError, match=r"named twice: dense; member dense names models/s02.onnx"):
        Manifest.load(edited(bundle, change))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a manifest"),
        ('{"_type": "PrunePlan"}', "not a manifest"),
        ('{"_type": "Bundle", "_version": 99}', "unknown manifest version"),
        ('{"_type": "Bundle", "_version": 1, "x": NaN}', "not a valid manifest"),
        ('{"_type": "Bundle", "_version": 1, "x": "\\ud800"}', "not a valid manifest"),
    ],
)
def test_other_content_is_refused(tmp_path, content, message):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ArtifactError, match=message):
        Manifest.load(tmp_path / "manifest.json")


def test_missing_manifest_is_unavailable(tmp_path):
    with pytest.raises(UnavailableError, match="no such manifest"):
        Manifest.load(tmp_path / "manifest.json")


def test_not_a_number_is_never_published(bundle):
    manifest = Manifest.load(bundle / "manifest.json")
    with pytest.raises(ValidationError, match="finite"):
        RatioEntry(value=float("nan"), low=0.0, high=1.0)
    bad = manifest.model_copy(update={"seconds": {"search": float("inf")}})
    with pytest.raises(ValueError, match="JSON"):
        bad.save(bundle / "other.json")
    assert not (bundle / "other.json").exists()


def test_bench_cells_become_one_line_per_member():
    entry = latency_entries([CELL, {**CELL, "sequence": 128}])["dense"]
    assert [(e.runtime, e.batch, e.sequence, e.trusted) for e in entry] == [
        ("ort-cpu", 8, None, True),
        ("ort-cpu", 8, 128, True),
    ]
    assert isinstance(entry[0], LatencyEntry) and entry[0].ratio.low == 0.6


def test_model_card_tells_members_latency_and_interface(bundle):
    manifest = Manifest.load(bundle / "manifest.json")
    dense = manifest.dense.model_copy(update={"latency": latency_entries([CELL])["dense"]})
    card = model_card(manifest.model_copy(update={"members": [dense, manifest.members[1]]}))
    assert "| s02 | sparsity 0.02 | 1 | 1 |" in card
    assert "| dense | ort-cpu | 8 | – | – | 1 | 2 | 0.700 (0.600–0.800) | faster |" in card
    assert "| images | float32 | batch×3×32×32 | values |" in card
    assert "0.75 (0.4–0.9, n=8)" in card


def test_two_files_for_one_place_are_refused(tmp_path):
    (tmp_path / "source").write_text("x")
    place(tmp_path / "bundle", "models/a", tmp_path / "source")
    with pytest.raises(ArtifactError, match="two files"):
        place(tmp_path / "bundle", "models/a", tmp_path / "source")
    place(tmp_path / "bundle", "models/linked", tmp_path / "source", link=True)
    assert (tmp_path / "bundle/models/linked").read_text() == "x"
