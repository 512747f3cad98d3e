"""Compare: what got worse beyond chance fails; what chance explains, and what got better, does not."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from figures import changed, judged, latency
from shipped import bundle_of

from deploy_prune.cli.main import run_command
from deploy_prune.errors import UsageError
from deploy_prune.release.manifest import Manifest, QualityEntry
from deploy_prune.release.scores import Change, contradiction, drop, load_scores, save_scores
from deploy_prune.release.versions import compare_bundles


@pytest.fixture
def old(tiny_vit, tmp_path):
    path = bundle_of(tiny_vit, tmp_path)
    hits = [1.0] * 80 + [0.0] * 20
    return changed(
        path,
        dense={**judged(path, "dense", hits), "latency": [latency(1.0, 1.0, 1.0)]},
        s02={**judged(path, "s02", hits), "latency": [latency(0.5, 0.48, 0.52)]},
    )


@pytest.fixture
def new(old, tmp_path):
    return shutil.copytree(old, tmp_path / "new")


def kinds(old, new, **options):
    found = compare_bundles(old, new, **options)
    return {(f.member, f.figure): (f.kind, f.fails) for f in found.findings}


def test_a_bundle_against_itself_has_no_regression(old):
    found = kinds(old, old)
    assert found[("s02", "top1")] == ("noise", False)
    assert found[("s02", "time/dense ort-cpu b1")] == ("noise", False)
    assert found[("s02", "bytes")] == ("equal", False)
    assert ("dense", "time/dense ort-cpu b1") not in found
    assert run_command(["compare", str(old), str(old)]) == 0


def test_quality_is_compared_example_by_example(old, new):
    changed(new, s02=judged(new, "s02", [1.0] * 68 + [0.0] * 32))
    assert kinds(old, new)[("s02", "top1")] == ("regression", True)
    assert kinds(old, new, max_regression=0.2)[("s02", "top1")] == ("regression", False)
    assert kinds(new, old)[("s02", "top1")] == ("improvement", False)
    changed(new, s02={"scores": None})  # only the two intervals are left, and they overlap
    assert kinds(old, new)[("s02", "top1")] == ("noise", False)


def test_latency_is_compared_relative_to_the_dense_model_of_the_same_run(old, new):
    changed(new, s02={"latency": [latency(0.56, 0.54, 0.58)]})
    assert kinds(old, new)[("s02", "time/dense ort-cpu b1")] == ("regression", True)
    assert kinds(old, new, max_regression=0.2)[("s02", "time/dense ort-cpu b1")] == ("regression", False)
    changed(new, s02={"latency": [latency(0.52, 0.49, 0.55)]})
    assert kinds(old, new)[("s02", "time/dense ort-cpu b1")] == ("noise", False)


@pytest.mark.parametrize("other", [{"device": "another CPU"}, {"trusted": False}])
def test_latency_of_another_device_or_without_trust_is_not_comparable_and_fails_unless_allowed(old, new, other):
    changed(new, s02={"latency": [latency(0.5, 0.48, 0.52, **other)]})
    assert kinds(old, new)[("s02", "time/dense ort-cpu b1")] == ("not comparable", True)
    assert kinds(old, new, allow_incomparable=True)[("s02", "time/dense ort-cpu b1")] == ("not comparable", False)


def test_counts_are_exact(old, new):
    small = Manifest.load(new / "manifest.json").members[1]
    assert small.achieved is not None
    changed(new, s02={"achieved": small.achieved.model_copy(update={"macs": 2}), "bytes": small.bytes - 1})
    assert kinds(old, new)[("s02", "MACs")] == ("regression", True)
    assert kinds(old, new)[("s02", "bytes")] == ("improvement", False)


def test_missing_member_and_figure_fail_and_new_ones_do_not(old, new):
    manifest = Manifest.load(new / "manifest.json")
    manifest.model_copy(update={"members": manifest.members[:1]}).save(new / "manifest.json")
    assert kinds(old, new)[("s02", "member")] == ("missing", True)
    assert kinds(new, old)[("s02", "member")] == ("new", False)
    shutil.rmtree(new)
    changed(shutil.copytree(old, new), s02={"latency": [], "quality": None, "scores": None})
    found = kinds(old, new)
    assert found[("s02", "top1")] == found[("s02", "time/dense ort-cpu b1")] == ("missing", True)


def test_bundles_without_a_common_member_are_refused(old, new):
    manifest = Manifest.load(new / "manifest.json")
    members = [m.model_copy(update={"name": f"x{m.name}"}) for m in manifest.members]
    manifest.model_copy(update={"members": members}).save(new / "manifest.json")
    with pytest.raises(UsageError, match="no member in common"):
        compare_bundles(old, new)


def test_command_exits_with_1_and_names_what_fails(old, new, capsys):
    changed(new, s02={"latency": [latency(0.9, 0.89, 0.91)]})
    assert run_command(["compare", str(old), str(new), "--max-regression", "3%", "--json"]) == 1
    captured = capsys.readouterr()
    assert not json.loads(captured.out)["passed"]
    assert "s02: time/dense ort-cpu b1 regression: 0.500 -> 0.900" in captured.err


def entry(value, interval, metric="top1", better=True, n=50):
    return QualityEntry(metric=metric, value=value, n=n, interval=interval, higher_is_better=better)


def test_paired_hits_have_tangos_interval():
    """The example of Tango's paper: 50 subjects, 12 for the first alone, 2 for the second alone."""
    first = np.array([1.0] * 36 + [1.0] * 12 + [0.0] * 2)
    second = np.array([1.0] * 36 + [0.0] * 12 + [1.0] * 2)
    change = drop(entry(0.96, (0.8, 1.0)), entry(0.76, (0.6, 0.9)), first, second)
    assert (change.low, change.high) == pytest.approx((0.0611, 0.3447), abs=1e-4)
    same = drop(entry(1.0, (0.9, 1.0)), entry(1.0, (0.9, 1.0)), np.ones(50), np.ones(50))
    assert same == Change(0.0, pytest.approx(-3.8415 / 53.8415, abs=1e-5), pytest.approx(0.07135, abs=1e-4), True)


def test_lower_is_better_turns_the_drop_around():
    change = drop(
        entry(10.0, (9.0, 11.5), "perplexity", better=False), entry(12.0, (11.0, 14.0), "perplexity", better=False)
    )
    assert change.value == pytest.approx(2.0) and not change.paired
    assert (change.low, change.high) == pytest.approx((2 - (1 + 1.5**2) ** 0.5, 2 + (4 + 1) ** 0.5))


def test_scores_are_stored_exactly_and_must_give_the_stated_figure(tmp_path):
    for rows in (np.array([1.0, 0.0, 1.0]), np.array([[0.1, 3.0], [1e-9, 7.0]])):
        save_scores(tmp_path / "scores.safetensors", rows)
        assert np.array_equal(load_scores(tmp_path / "scores.safetensors"), rows)
    hits = np.array([1.0, 0.0, 1.0, 1.0])
    assert contradiction(entry(0.75, (0.2, 0.9), n=4), hits) is None
    assert "gives top1 0.75" in str(contradiction(entry(0.8, (0.2, 0.9), n=4), hits))
    assert "holds 4 scores" in str(contradiction(entry(0.75, (0.2, 0.9), n=5), hits))
