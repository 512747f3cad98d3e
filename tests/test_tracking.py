"""A bundle logged to MLflow: recipe, figures and pages arrive in a real store; what is missing shows before a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from figures import changed, judged, latency
from shipped import bundle_of

from deploy_prune.cli.main import run_command
from deploy_prune.errors import UnavailableError
from deploy_prune.release.manifest import Manifest
from deploy_prune.release.tracking import connect, log_bundle, metrics, parameters

RUN = ("run", "digits", "--out", "out", "--set", "bench.enabled=false")


@pytest.fixture
def bundle(tiny_vit: Any, tmp_path: Path) -> Path:
    path = bundle_of(tiny_vit, tmp_path)
    return changed(path, s02={**judged(path, "s02", [1.0, 0.0]), "latency": [latency(0.5, 0.4, 0.6)]})


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store in files, which MLflow still has but wants to be asked for."""
    pytest.importorskip("mlflow", reason="needs the extra mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return (tmp_path / "mlruns").as_uri()


def test_a_bundle_arrives_with_its_recipe_figures_and_pages(bundle: Path, store: str) -> None:
    from mlflow import MlflowClient

    run_id = log_bundle(bundle, store, "ours")
    client = MlflowClient(tracking_uri=store)
    run = client.get_run(run_id)
    manifest = Manifest.load(bundle / "manifest.json")
    assert run.info.status == "FINISHED" and run.info.run_name == manifest.name
    assert client.get_experiment(run.info.experiment_id).name == "ours"
    assert run.data.params == parameters(manifest.recipe)
    assert run.data.metrics == pytest.approx(metrics(manifest))
    assert {
        "s02/top1": 0.5,
        "s02/p50_ms/ort-cpu_b1": 2.0,
        "s02/ratio/ort-cpu_b1": 0.5,
    }.items() <= run.data.metrics.items()
    assert {"dense/bytes", "s02/parity_error", "s02/sparsity", "s02/macs"} <= run.data.metrics.keys()
    assert run.data.tags["deploy-prune.weights_sha256"] == manifest.base.weights_sha256
    pages = {entry.path for entry in client.list_artifacts(run_id)}
    assert {"README.md", "report.html", "manifest.json"} <= pages
    assert log_bundle(bundle, store, "ours") != run_id  # a second run beside the first


def test_many_figures_are_logged_in_several_requests(bundle: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setattr("deploy_prune.release.tracking._METRICS", 3)
    logged = MlflowClient(tracking_uri=store).get_run(log_bundle(bundle, store)).data.metrics
    assert logged == pytest.approx(metrics(Manifest.load(bundle / "manifest.json"))) and len(logged) > 3


def test_parameters_are_the_recipe_flat_and_short() -> None:
    recipe = {"a": {"b": [1, 2], "c": None}, "d": "x" * 900, "e": ""}
    assert parameters(recipe) == {"a.b": "[1, 2]", "d": "x" * 500}


def test_a_run_that_was_not_taken_whole_is_marked_failed(bundle: Path, store: str) -> None:
    from mlflow import MlflowClient

    (bundle / "report.html").unlink()
    with pytest.raises(UnavailableError, match="--resume logs it again"):
        log_bundle(bundle, store)
    client = MlflowClient(tracking_uri=store)
    (run,) = client.search_runs([client.get_experiment_by_name("deploy-prune").experiment_id])
    assert run.info.status == "FAILED"


def test_without_mlflow_the_run_does_not_begin_and_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.chdir(tmp_path)
    assert run_command([*RUN, "--mlflow", "http://localhost:1"]) == 3
    assert "pip install 'deploy-prune[mlflow]'" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_store_that_cannot_be_used_stops_the_run_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow", reason="needs the extra mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.chdir(tmp_path)
    for uri in ("http://127.0.0.1:9", "nonsense://x"):
        with pytest.raises(UnavailableError, match="does not take the run"):
            connect(uri)
        assert run_command([*RUN, "--mlflow", uri]) == 3
    assert "Traceback" not in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_an_experiment_without_a_server_is_wrong_usage() -> None:
    assert run_command([*RUN, "--mlflow-experiment", "x"]) == 2
