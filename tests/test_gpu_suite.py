"""The GPU suite: refused without a GPU, honest about what failed or was not begun, and whole on a CPU when small."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bench.suite.__main__ import main, slug
from bench.suite.checks import AHEAD, CHECKS, TIMED
from bench.suite.decoders import likely
from bench.suite.jobs import Jobs
from bench.suite.methods import SHARED, shared
from bench.suite.models import half_of, subjects
from bench.suite.report import BEGIN, END, NONE, replaced, section
from deploy_prune.errors import ArtifactError, ParityError, UnavailableError, UsageError

PASSED: dict[str, Any] = {"answer": 1}


def run(out: Path, *more: str) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(main, ["--small", "--out", str(out), *more])
    (folder,) = out.iterdir()
    return result.exit_code, json.loads((folder / "summary.json").read_text())


def test_without_a_gpu_the_suite_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.environment.gpu_name", lambda: None)
    result = CliRunner().invoke(main, ["--out", str(tmp_path)])
    assert isinstance(result.exception, UnavailableError)
    assert not any(tmp_path.iterdir())


def test_an_unknown_check_is_refused(tmp_path: Path) -> None:
    assert isinstance(CliRunner().invoke(main, ["--out", str(tmp_path), "--check", "familly"]).exception, UsageError)


def test_a_failed_check_says_why_the_others_go_on_and_the_exit_code_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(bench: Any) -> dict[str, Any]:
        raise ParityError("the answers differ", where="vit-b")

    monkeypatch.setattr("bench.suite.checks.CHECKS", {"wrong": wrong, "right": lambda bench: PASSED})
    code, summary = run(tmp_path)
    assert code == 1
    assert {name: check["state"] for name, check in summary["checks"].items()} == {"wrong": "failed", "right": "passed"}
    (folder,) = tmp_path.iterdir()
    assert "the answers differ" in json.loads((folder / "wrong.json").read_text())["error"]
    assert json.loads((folder / "right.json").read_text())["answer"] == 1


def test_what_does_not_fit_into_the_time_is_not_begun_and_not_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.suite.checks.CHECKS", {"one": lambda bench: PASSED})
    code, summary = run(tmp_path, "--limit", "1")
    assert code == 1 and summary["checks"]["one"]["state"] == "not begun"


def test_a_job_runs_once_in_another_process_and_raises_here_what_it_raised_there() -> None:
    jobs = Jobs()
    try:
        jobs.start(("process",), os.getpid)
        jobs.start(("process",), os.getppid)  # of the same name: not begun
        jobs.start(("wrong",), int, "seven")
        assert jobs["process",] not in (os.getpid(), os.getppid())
        with pytest.raises(ValueError, match="seven"):
            _ = jobs["wrong",]
        jobs.settle()
        assert jobs.waited > 0 and jobs.running() == 0
    finally:
        jobs.close()


def test_a_job_that_takes_too_long_is_given_up_and_ended() -> None:
    jobs = Jobs(until=time.monotonic() + 0.1)
    jobs.start(("long",), time.sleep, 600)
    with pytest.raises(TimeoutError):
        _ = jobs["long",]
    jobs.settle()
    assert jobs.running() == 1
    began = time.monotonic()
    jobs.close()
    assert time.monotonic() - began < 60


def test_what_waits_for_other_processes_has_begun_them_ahead() -> None:
    assert {"search", "methods", "decoders"} <= AHEAD.keys() <= CHECKS.keys()
    assert set(TIMED) <= CHECKS.keys()


def test_halves_have_half_the_work_at_aligned_widths() -> None:
    for subject in subjects(small=True):
        model = subject.build()
        half = half_of(model, subject.signature, 8)
        assert half.plan.achieved is not None and half.plan.achieved.macs <= 0.5 * half.path.costs.macs


def test_the_page_on_gpus_is_made_from_the_results_kept_here() -> None:
    root = Path(__file__).parents[1]
    page = (root / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert replaced(page, section(root / "bench" / "results")) == page


def test_checks_run_again_leave_the_results_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks: dict[str, Any] = {"one": lambda bench: PASSED, "two": lambda bench: PASSED}
    monkeypatch.setattr("bench.suite.checks.CHECKS", checks)
    run(tmp_path)

    def stopped(bench: Any) -> dict[str, Any]:
        bench.begin()["before"] = 7
        raise ParityError("the answers differ")

    checks["two"] = stopped
    code, summary = run(tmp_path, "--check", "two")
    assert code == 1
    assert {name: check["state"] for name, check in summary["checks"].items()} == {"one": "passed", "two": "failed"}
    (folder,) = tmp_path.iterdir()
    assert json.loads((folder / "two.json").read_text())["before"] == 7  # found before it failed


def test_without_results_the_section_says_that_there_are_none(tmp_path: Path) -> None:
    assert section(tmp_path) == NONE
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "summary.json").write_text(
        json.dumps({"small": True, "checks": {}, "device": "cpu", "seconds": 1})
    )
    assert section(tmp_path) == NONE  # small runs test the suite, they are no figures


def test_a_gpus_cells_become_rows(tmp_path: Path) -> None:
    folder = tmp_path / slug("NVIDIA H100 PCIe")
    folder.mkdir()
    summary = {
        "small": False,
        "device": "nvidia-h100-pcie",
        "seconds": 512.0,
        "checks": {"family": {"state": "passed"}},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    timed = [
        {"name": name, "p50_ms": ms, "ratio": {"value": ms / 4, "low": ms / 4, "high": ms / 4}, "verdict": "faster"}
        for name, ms in (("dense", 4.0), ("half", 2.0))
    ]
    here = {"packages": {"torch": "2.11.0"}, "gpus": [{"driver": "580"}]}
    cell = {"model": "vit-b", "batch": 8, "latencies": timed, "self_check": {"value": 1.3, "low": 1.2, "high": 1.4}}
    cell |= {"device": "NVIDIA H100 PCIe", "environment": here, "sessions": {"dense": {"version": "1.31.0"}}}
    (folder / "family.json").write_text(json.dumps({"ceilings": {"flops": 5e13, "bytes": 2e12}, "cells": [cell]}))
    text = section(tmp_path)
    assert "| vit-b | 8 |  | fp32 | 4.00 | 2.00 | 0.50 [0.50, 0.50] | faster (untrusted) |" in text
    assert "NVIDIA H100 PCIe, driver 580, ONNX Runtime 1.31.0, torch 2.11.0." in text
    assert replaced(f"a\n{BEGIN}\nold\n{END}\nb\n", text).count("old") == 0
    with pytest.raises(ArtifactError):
        replaced("no marks", text)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_small_suite_passes_on_a_cpu(tmp_path: Path) -> None:
    code, summary = run(tmp_path)
    assert {name: check["state"] for name, check in summary["checks"].items()} == dict.fromkeys(
        summary["checks"], "passed"
    )
    assert code == 0


def test_the_check_of_methods_tells_two_paths_apart() -> None:
    subject = subjects(small=True)[0]
    model = subject.build()
    one, other = (half_of(model, subject.signature, 8, seed=seed).path.plan(0.4) for seed in (0, 1))
    assert shared(one, one) == 1 and shared(one, other) < SHARED


def test_the_check_of_decoders_refuses_tokens_that_torch_finds_unlikely() -> None:
    model = subjects(small=True)[2].build()
    with pytest.raises(ParityError, match="other tokens than torch"):
        likely(model, list(range(20)), 10, 1e-2)
