"""Whole runs through the command line: a bundle that is right, the same bytes again, and no half bundle ever."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from clockwork import by_size

from deploy_prune.cli.main import run_command
from deploy_prune.path import SolutionPath
from deploy_prune.plan import PrunePlan
from deploy_prune.release.manifest import Manifest

# The demo's model, hardly trained, searched by the cheapest method: everything but the figures is real.
QUICK = (
    "model=python:deploy_prune.demo:digits_vit?epochs=2",
    "search.method=magnitude",
    "search.options={}",
    "refit.examples=200",
    "quality.limit=100",
    "bench.enabled=false",
    "family.sparsities=[0.3,0.5]",
)


def arguments(out: Path, *more: str) -> list[str]:
    return ["-q", "run", "digits", "--out", str(out), *(part for s in QUICK for part in ("--set", s)), *more]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    assert run_command(arguments(out)) == 0
    return out


def test_a_run_leaves_one_bundle_and_nothing_else(bundle: Path) -> None:
    assert [p.name for p in bundle.parent.iterdir()] == ["out"]
    manifest = Manifest.load(bundle / "manifest.json")
    assert [member.name for member in manifest.members] == ["dense", "s30", "s50"]
    on_disk = {p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()} - {"manifest.json"}
    assert on_disk == set(manifest.files)
    assert {
        "path.safetensors",
        "plans/s30.json",
        "models/s30.onnx",
        "samples/s30.safetensors",
        "checkpoints/s30/model.safetensors",
        "README.md",
    } <= on_disk


def test_members_are_nested_and_smaller_by_exactly_what_their_plans_announce(bundle: Path) -> None:
    manifest = Manifest.load(bundle / "manifest.json")
    dense, *members = manifest.members
    plans = [PrunePlan.load(bundle / str(member.plan)) for member in members]
    assert plans[1].is_nested_in(plans[0])
    for member, plan in zip(members, plans, strict=True):
        assert plan.achieved is not None and member.achieved == plan.achieved
        assert plan.achieved.sparsity >= plan.asked.value  # type: ignore[union-attr]
        assert dense.weight_bytes - member.weight_bytes == 4 * (manifest.base.parameters - plan.achieved.params)


def test_every_member_was_judged_and_proved(bundle: Path) -> None:
    for member in Manifest.load(bundle / "manifest.json").members:
        assert member.quality is not None and member.quality.n == 100
        assert member.parity["error"] < 1e-4
    pairs = [(pair["reference"], pair["candidate"]) for pair in member.parity["pairs"]]
    assert pairs == [("masked", "compact"), ("compact", "onnx")]


def test_the_same_run_gives_the_same_bytes_of_path_plans_and_models(bundle: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert run_command(arguments(again)) == 0
    for pattern in ("path.safetensors", "plans/*", "models/*", "checkpoints/*/model.safetensors"):
        first = sorted(bundle.glob(pattern))
        assert first
        for file in first:
            assert file.read_bytes() == (again / file.relative_to(bundle)).read_bytes(), file.name


def test_a_run_whose_files_may_not_grow_says_so_and_goes_on_to_the_same_bytes(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, hard))  # the dense model is larger
    try:
        assert run_command(arguments(tmp_path / "out")) == 3
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err
    assert "UnavailableError: " in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()
    assert run_command(arguments(tmp_path / "out", "--resume")) == 0
    for name in ("path.safetensors", "plans/s30.json", "models/dense.onnx", "models/s50.onnx", "report.html"):
        assert (tmp_path / "out" / name).read_bytes() == (bundle / name).read_bytes(), name


def test_the_manifest_names_no_place_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    data = tmp_path / "data"
    data.mkdir()
    np.savez(
        data / "digits.npz", image=np.random.default_rng(0).random((40, 8, 8), np.float32), label=np.arange(40) % 10
    )
    monkeypatch.setenv("DEPLOY_PRUNE_DATA", str(data))
    out = tmp_path / "out"
    reference = "npz:${DEPLOY_PRUNE_DATA}/digits.npz"
    assert (
        run_command(
            arguments(
                out,
                "--set",
                f"task.calibration={reference}",
                "--set",
                f"task.evaluation={reference}",
                "--set",
                "quality.limit=null",
                "--set",
                "family.sparsities=[0.3]",
            )
        )
        == 0
    )
    assert str(tmp_path) not in (out / "manifest.json").read_text()
    assert SolutionPath.load(out / "path.safetensors").options["task"]["calibration"] == reference


def test_a_finished_run_is_not_repeated_by_resume_nor_replaced_by_chance(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (bundle / "manifest.json").stat().st_mtime_ns
    assert run_command(arguments(bundle, "--resume")) == 0
    assert run_command(arguments(bundle)) == 2
    assert "--fresh replaces it" in capsys.readouterr().err
    assert run_command(arguments(bundle, "--resume", "--set", "seed=1")) == 2
    assert "bundle of another run" in capsys.readouterr().err
    assert (bundle / "manifest.json").stat().st_mtime_ns == before


def test_export_cuts_another_budget_from_the_path_of_a_bundle(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "more"
    assert (
        run_command(
            [
                "-q",
                "export",
                str(bundle / "path.safetensors"),
                "--macs",
                "0.6",
                "--no-bench",
                "--set",
                "refit.examples=200",
                "--set",
                "quality.limit=100",
                "-o",
                str(out),
                "--json",
            ]
        )
        == 0
    )
    dense, member = json.loads(capsys.readouterr().out)["members"]
    assert member["name"] == "macs60" and member["macs"] <= 0.6 * dense["macs"]
    assert (out / "path.safetensors").read_bytes() == (bundle / "path.safetensors").read_bytes()


@pytest.mark.timeout(900)  # two dozen exports, on machines that may be busy
def test_export_at_a_speedup_says_what_was_asked_predicted_and_measured(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("deploy_prune.latency.place.Place.time", by_size)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "fast"
    asked = ["--speedup", "1.2x", "--batch", "4", "--threads", "1", "--kinds", "neuron", "--no-bench"]
    quick = ["--set", "refit.examples=200", "--set", "quality.limit=100", "-o", str(out)]
    assert run_command(["-q", "export", str(bundle / "path.safetensors"), *asked, *quick]) == 0
    fit = Manifest.load(out / "manifest.json").members[1].latency_fit
    assert fit is not None
    assert (fit.runtime, fit.threads, fit.batch, fit.budget, fit.value) == ("ort-cpu", 1, 4, "speedup", 1.2)
    assert fit.met and fit.measured_ms <= 1.03 * fit.dense_ms / 1.2
    assert fit.measured_ms == pytest.approx(fit.predicted_ms, rel=0.05)
    plan = PrunePlan.load(out / "plans" / "1p2x.json")
    assert plan.asked is not None and (plan.asked.budget, plan.asked.align) == ("speedup", 8)
    assert all(len(kept["neuron"]) % 8 == 0 for site, kept in plan.keep.items() if "neuron" in kept)
    assert (out / "bench" / "latency-table.json").is_file()
    assert run_command(["-q", "verify", str(out)]) == 0
    capsys.readouterr()
    beyond = ["--speedup", "1000", "--kinds", "neuron", "--no-bench", "-o", str(tmp_path / "beyond")]
    assert (
        run_command(["-q", "export", str(bundle / "path.safetensors"), "--batch", "4", "--threads", "1", *beyond]) == 2
    )
    said = capsys.readouterr().err
    assert "best reachable" in said and "outside the sites" in said
    assert not (tmp_path / "beyond").exists()


def test_where_latency_is_measured_is_refused_for_other_budgets(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(bundle / "path.safetensors")
    assert run_command(["-q", "export", path, "--macs", ".5", "--batch", "8", "-o", str(tmp_path / "o")]) == 2
    assert "--batch" in capsys.readouterr().err


def test_export_with_other_weights_than_the_path_was_searched_on_is_refused(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "other"
    assert (
        run_command(
            [
                "-q",
                "export",
                str(bundle / "path.safetensors"),
                "--sparsity",
                ".3",
                "-o",
                str(out),
                "--model",
                "python:deploy_prune.demo:digits_vit_untrained",
            ]
        )
        == 2
    )
    assert "sha256" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_target_no_plan_reaches_names_the_best_and_leaves_nothing(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        run_command(
            [
                "-q",
                "export",
                str(bundle / "path.safetensors"),
                "--params",
                "100",
                "--no-bench",
                "-o",
                str(tmp_path / "out"),
            ]
        )
        == 2
    )
    assert "best reachable" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_member_that_is_not_what_was_planned_stops_the_run_with_exit_1_and_leaves_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import converters.surgery
    from deploy_prune.layers import layer_at, matrix

    right = converters.surgery.cut

    def wrong(model: Any, name: str, axis: Any, stays: Any) -> None:
        right(model, name, axis, stays)
        weight = matrix(layer_at(model, name))
        if axis == "in":
            weight.copy_(weight.flip(1))  # units in another order

    monkeypatch.setattr(converters.surgery, "cut", wrong)
    out = tmp_path / "out"
    assert run_command(arguments(out)) == 1
    assert "masked -> compact" in capsys.readouterr().err
    assert not out.exists()
    assert {p.name for p in (tmp_path / "out.work").glob("*/")} == {"path", "moments", "dense"}


def test_search_then_export_is_a_run_in_two_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "path.safetensors"
    search = [
        "-q",
        "search",
        "python:deploy_prune.demo:digits_vit?epochs=2",
        "--task",
        "image-classification",
        "--data",
        "digits:train",
        "--eval",
        "digits:test",
        "--method",
        "magnitude",
        "-o",
        str(path),
    ]
    assert run_command(search) == 0
    assert run_command(["inspect", str(path)]) == 0
    assert "magnitude" in capsys.readouterr().out
    (tmp_path / "mine.txt").write_text("mine")
    assert run_command([*search[:-1], str(tmp_path / "mine.txt")]) == 2
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("thing", ["", "path.safetensors", "plans/s30.json"])
def test_inspect_reads_everything_a_bundle_holds(bundle: Path, thing: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["inspect", str(bundle / thing)]) == 0
    assert "weights_sha256" in capsys.readouterr().out
    assert run_command(["inspect", str(bundle / thing), "--json"]) == 0
    assert "type" in json.loads(capsys.readouterr().out)


def started(out: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "deploy_prune", *arguments(out, *more)[1:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs tests in the background ignores it, and what it starts would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_stopped_run_leaves_no_bundle_and_resumes_to_the_same_bytes(
    bundle: Path, tmp_path: Path, signum: signal.Signals, code: int
) -> None:
    out, work = tmp_path / "out", tmp_path / "out.work"
    process = started(out)
    wait_for((work / "dense").exists, process)  # the first member is under way
    os.kill(process.pid, signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in err
    assert not out.exists()
    if signum == signal.SIGINT:
        assert not [p for p in work.iterdir() if p.name.startswith(".partial-")]
    made = (work / "dense" / "dense.onnx").stat().st_mtime_ns
    assert run_command(arguments(out, "--resume")) == 0
    assert (out / "models" / "dense.onnx").stat().st_mtime_ns == made  # linked from the stage, not made again
    for name in ("path.safetensors", "models/s30.onnx", "plans/s50.json"):
        assert (out / name).read_bytes() == (bundle / name).read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
