"""Searches that are killed, alone or as one of two processes: nothing half-written, and the same bytes after all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import assert_same_order

from deploy_prune.cli.main import run_command
from deploy_prune.path import SolutionPath

TESTS = Path(__file__).resolve().parents[1]
LAUNCHER = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")


def search(out: Path, *more: str) -> list[str]:
    return [
        *("search", "python:mortal:digits", "--task", "image-classification", "--data", "digits:train"),
        *(
            "--method",
            "spp",
            "--set",
            "steps=20",
            "--set",
            "objective=distill",
            "--stages",
            "",
            "--basis",
            "own",
            "--examples",
            "50",
            "--precision",
            "fp32",
            "--device",
            "cpu",
        ),
        *("--checkpoint-minutes", "0", "-o", str(out), *more),
    ]


def run(arguments: list[str], *launcher: str, mortal: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {
        **{k: v for k, v in os.environ.items() if k != "MORTAL"},
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
        "OMP_NUM_THREADS": "1",
        **({"MORTAL": mortal} if mortal else {}),
    }
    command = [*(launcher or (sys.executable,)), "-m", "deploy_prune", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)


def left_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "path.safetensors"
    assert run_command(["-q", *search(path)]) == 0
    assert left_in(path.parent) == {"path.safetensors"}
    return path


@pytest.mark.parametrize("after", [7, 16])  # in the pass for the curvature; in the search itself
def test_a_killed_search_resumes_to_the_same_bytes(whole: Path, tmp_path: Path, after: int) -> None:
    out = tmp_path / "path.safetensors"
    killed = run(search(out), mortal=f"kill:0:{after}")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert left_in(tmp_path) == {"path.safetensors.work"}
    assert run_command(["-q", *search(out)]) == 2, "a new search does not go on by chance"
    assert run_command(["-q", *search(out, "--resume")]) == 0
    assert out.read_bytes() == whole.read_bytes()
    assert left_in(tmp_path) == {"path.safetensors"}


@pytest.mark.slow
def test_a_killed_worker_stops_all_and_resume_goes_on_to_the_path_of_one_process(whole: Path, tmp_path: Path) -> None:
    two, out = tmp_path / "two" / "path.safetensors", tmp_path / "killed" / "path.safetensors"
    assert run(search(two), *LAUNCHER).returncode == 0
    killed = run(search(out), *LAUNCHER, mortal="kill:1:16")
    assert killed.returncode not in (0, 2), killed.stderr
    assert left_in(out.parent) == {"path.safetensors.work"}
    assert {name for name in left_in(out.parent / "path.safetensors.work") if name.startswith(".partial")} == set()
    resumed = run(search(out, "--resume"), *LAUNCHER)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stderr.count("wrote ") == 1, "the main process alone tells"
    assert out.read_bytes() == two.read_bytes()
    found, alone = (SolutionPath.load(file).scores for file in (out, whole))
    for kind in ("head", "qk", "vo", "neuron"):  # between kinds decide losses of 1e-8, of this model without training
        own = ({k: v for k, v in scores.items() if k.endswith(f"/{kind}")} for scores in (found, alone))
        assert_same_order(*own, least=0.99)


@pytest.mark.slow
def test_a_failure_of_one_process_ends_all_and_says_whose_it_was(tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe = [
        *("run", "digits", "--out", str(out), "--set", "model=python:mortal:digits", "--set", "device=cpu"),
        *("--set", "refit.examples=40", "--set", "quality.limit=40", "--set", "bench.enabled=false"),
        *("--set", "search.examples=50", "--set", "search.options={steps: 20}", "--set", "family.sparsities=[0.3]"),
    ]
    failed = run(recipe, *LAUNCHER, mortal="fail:1:8")
    assert failed.returncode not in (0, 2)
    assert "process 1: UnavailableError: out of memory" in failed.stderr
    assert left_in(tmp_path) == {"out.work"}
    done = run([*recipe, "--resume"], *LAUNCHER)
    assert done.returncode == 0, done.stderr
    assert left_in(tmp_path) == {"out"}
    assert run_command(["-q", "verify", str(out)]) == 0
