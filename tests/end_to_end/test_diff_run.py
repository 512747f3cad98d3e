"""A recipe that learns its task as a delta first ends in a verified bundle, from whose files alone members are cut."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import deploy_prune as dp
from deploy_prune.architecture import weights_sha256
from deploy_prune.cli.main import run_command
from deploy_prune.delta import TaskDelta
from deploy_prune.release.manifest import Manifest

QUICK = (
    "model=python:deploy_prune.demo:digits_vit?epochs=2",
    "diff.enabled=true",
    "diff.fit=l1",
    "diff.share=0.02",
    "diff.lr=1e-3",
    "diff.mask_lr=1e-3",
    "diff.epochs=1",
    "diff.mask_epochs=1",
    "diff.examples=300",
    "search.method=fisher",
    "search.options={}",
    "search.examples=64",
    "refit.examples=100",
    "bench.enabled=false",
    "family.sparsities=[0.3]",
)


def arguments(*settings: str) -> list[str]:
    return [part for s in (*QUICK, *settings) for part in ("--set", s)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    assert run_command(["-q", "run", "digits", "--out", str(out), *arguments()]) == 0
    return out


def test_the_bundle_is_whole_and_its_dense_model_is_the_base_and_the_delta(bundle: Path) -> None:
    assert run_command(["-q", "verify", str(bundle)]) == 0
    manifest = Manifest.load(bundle / "manifest.json")
    assert manifest.delta is not None
    delta = TaskDelta.load(bundle / manifest.delta.file)
    assert delta.count == manifest.delta.changed > 0
    model = delta.apply(dp.load_model(manifest.base.reference))
    assert weights_sha256(model) == manifest.base.weights_sha256
    assert weights_sha256(dp.load_model(manifest.base.reference)) != manifest.base.weights_sha256


def test_members_are_cut_from_the_path_and_the_delta_beside_it(bundle: Path, tmp_path: Path) -> None:
    cut = ["--sparsity", ".5", "--no-bench", "-o", str(tmp_path / "more")]
    assert run_command(["-q", "export", str(bundle / "path.safetensors"), *cut]) == 0
    assert run_command(["-q", "verify", str(tmp_path / "more")]) == 0


def test_a_path_without_its_delta_says_what_is_missing(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(bundle / "path.safetensors", tmp_path / "path.safetensors")
    cut = ["--sparsity", ".5", "--no-bench", "-o", str(tmp_path / "more")]
    assert run_command(["-q", "export", str(tmp_path / "path.safetensors"), *cut]) == 3
    assert "delta is not beside it" in capsys.readouterr().err


def test_the_outlook_names_the_delta_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["run", "digits", "--dry-run", *arguments()]) == 0
    assert "delta: l1, 2.00% of the values, before the search" in capsys.readouterr().out
