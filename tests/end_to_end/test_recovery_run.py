"""A run that trains its members: quality before and after is told, and a kill inside the training loses nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deploy_prune.cli.main import run_command
from deploy_prune.release.manifest import Manifest

QUICK = (
    "model=python:deploy_prune.demo:digits_vit?epochs=2",
    "search.method=magnitude",
    "search.options={}",
    "refit.examples=200",
    "bench.enabled=false",
    "family.sparsities=[0.5,0.7]",
    "recover.examples=400",
    "recover.epochs=null",
    "recover.steps=40",
    "recover.evaluations=4",
    "compute.checkpoint_minutes=0",
)


def arguments(out: Path, *more: str) -> list[str]:
    return ["-q", "run", "digits-recover", "--out", str(out), *(part for s in QUICK for part in ("--set", s)), *more]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    assert run_command(arguments(out)) == 0
    return out


def test_every_member_says_how_it_was_trained_and_what_it_was_before(bundle: Path) -> None:
    dense, larger, smaller = Manifest.load(bundle / "manifest.json").members
    assert dense.recovery is None
    for member, seed in ((larger, None), (smaller, "s50")):
        found = member.recovery
        assert found is not None and member.quality is not None and found.quality_before is not None
        assert (found.seed, found.held_out, found.metric) == (seed, 40, "top1")
        assert found.after >= found.before and found.seconds > 0
        assert member.quality.value >= found.quality_before.value - 0.02
        pairs = [(pair["reference"], pair["candidate"]) for pair in member.parity["pairs"]]
        assert pairs == [("masked", "compact"), ("compact", "onnx")]
    assert smaller.recovery is not None and smaller.recovery.after > smaller.recovery.before
    assert "before recovery" in (bundle / "README.md").read_text()


def test_a_run_killed_inside_the_training_goes_on_to_the_same_bytes(bundle: Path, tmp_path: Path) -> None:
    out, saved = tmp_path / "out", tmp_path / "out.work" / "s50.trained.saved"
    process = subprocess.Popen(
        [sys.executable, "-m", "deploy_prune", *arguments(out)[1:]], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    end = time.monotonic() + 200
    while not list(saved.glob("*.safetensors")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "out.work" / "s50.trained").exists()
    assert run_command(arguments(out, "--resume")) == 0
    for name in ("models/s50.onnx", "models/s70.onnx"):
        assert (out / name).read_bytes() == (bundle / name).read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
