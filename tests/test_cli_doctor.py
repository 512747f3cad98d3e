"""`deploy-prune doctor`: says what is here and what is missing; fails only when something was required."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deploy_prune.cli.main import run_command


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.runtimes.ort_cuda.OrtCuda.available", lambda self: "no GPU answers")


@pytest.mark.usefixtures("no_gpu")
def test_report_names_what_is_missing_and_how_to_get_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "no GPU answers" in out
    assert "deploy-prune[gpu]" in out
    assert "onnxruntime" in out


@pytest.mark.usefixtures("no_gpu")
def test_json_is_all_there_is_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["doctor", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["runtimes"]["ort-cpu"]["available"] is True
    assert data["runtimes"]["ort-cuda"]["reason"] == "no GPU answers"
    assert data["cpu"]["usable"] >= 1
    assert data["packages"]["numpy"]


@pytest.mark.usefixtures("no_gpu")
def test_required_runtime_that_is_missing_exits_3_after_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["doctor", "--json", "--require", "ort-cpu", "--require", "ort-cuda"]) == 3
    captured = capsys.readouterr()
    json.loads(captured.out)
    assert "ort-cuda: no GPU answers" in captured.err
    assert "deploy-prune[gpu]" in captured.err


def test_required_runtime_that_works_exits_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["doctor", "--require", "ort-cpu"]) == 0


def test_unknown_required_runtime_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["doctor", "--require", "ort-gpu"]) == 2
    captured = capsys.readouterr()
    assert "no runtime 'ort-gpu'" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(("value", "words"), [(None, "not set"), ("here", "set"), ("gone", "set, but no directory")])
def test_place_of_the_data_is_reported_without_its_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str | None, words: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.delenv("DEPLOY_PRUNE_DATA", raising=False)
    if value:
        monkeypatch.setenv("DEPLOY_PRUNE_DATA", str(tmp_path / value))
    assert run_command(["doctor", "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out)["data"]["DEPLOY_PRUNE_DATA"] == words
    assert str(tmp_path) not in out


def test_doctor_and_bench_never_import_torch() -> None:
    code = (
        "import sys, bench.timing, bench.inputs, deploy_prune.cli.bench;"
        "from deploy_prune.cli.main import run_command;"
        "code = run_command(['doctor', '--json']); sys.exit(code or ('torch' in sys.modules) * 9)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
