"""A recipe whose members train while their structure changes ends in a verified bundle, base and adapters apart too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from converters.adapters_apart import load_apart
from converters.checkpoint import load_pruned
from deploy_prune.cli.main import run_command
from deploy_prune.dynamic.history import History
from deploy_prune.plan import PrunePlan
from deploy_prune.recipe import load_recipe
from deploy_prune.release.manifest import Manifest

QUICK = (
    "model=python:deploy_prune.demo:digits_vit?epochs=2",
    "search.method=layer-adaptive",
    "search.options={}",
    "search.examples=128",
    "refit.examples=200",
    "bench.enabled=false",
    "family.sparsities=[0.5]",
    "dynamic.enabled=true",
    "dynamic.method=lora",
    "dynamic.apart=true",
    "dynamic.examples=300",
    "dynamic.steps=12",
    "dynamic.every=3",
    "dynamic.evaluations=2",
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("peft")
    out = tmp_path_factory.mktemp("run") / "out"
    settings = [part for s in QUICK for part in ("--set", s)]
    assert run_command(["-q", "run", "digits", "--out", str(out), *settings]) == 0
    return out


def test_the_bundle_is_whole_and_says_what_happened(bundle: Path) -> None:
    assert run_command(["-q", "verify", str(bundle)]) == 0
    _, member = Manifest.load(bundle / "manifest.json").members
    assert member.recovery is not None and member.recovery.after >= member.recovery.before
    assert member.history == "plans/s50.history.json" and member.adapters == "adapters/s50"
    history = History.load(bundle / member.history)
    assert [change.step for change in history.changes] == [3, 6]
    plan = PrunePlan.load(bundle / "plans" / "s50.json")
    assert plan.achieved is not None and plan.achieved.sparsity >= 0.5 - 1e-9
    pairs = {(pair["reference"], pair["candidate"]) for pair in member.parity["pairs"]}
    assert {("masked", "compact"), ("compact", "onnx")} <= pairs and any("apart" in pair for pair in pairs)


def test_base_and_adapters_in_the_bundle_are_the_merged_model(bundle: Path) -> None:
    merged = load_pruned(bundle / "checkpoints" / "s50", trust_code=True)
    apart = load_apart(bundle / "adapters" / "s50", trust_code=True)
    image = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(apart(image), merged(image), rtol=1e-4, atol=1e-5)


def test_two_trainings_of_one_member_are_refused(tmp_path: Path) -> None:
    from deploy_prune.errors import RecipeError

    with pytest.raises(RecipeError, match=r"dynamic\.enabled"):
        load_recipe("digits-recover", ["dynamic.enabled=true"])
    with pytest.raises(RecipeError, match="apart"):
        load_recipe("digits", ["dynamic.enabled=true", "dynamic.apart=true"])
