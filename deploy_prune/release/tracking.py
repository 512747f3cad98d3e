"""A finished bundle as a run of MLflow: its recipe as parameters, its figures as metrics, card, report and manifest as
artifacts. The client is spoken to directly; no state of an MLflow session elsewhere in the process is touched."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deploy_prune.errors import UnavailableError
from deploy_prune.release.bundle import CARD, REPORT
from deploy_prune.release.gate import cell_name
from deploy_prune.release.manifest import MANIFEST, Manifest, Member

EXPERIMENT = "deploy-prune"
_BATCH = 100  # parameters or tags in one request: MLflow's limit
_METRICS = 1000 - _BATCH  # metrics in one request, which may hold 1,000 of everything
_LONGEST = 500  # characters of a parameter: the limit of servers before MLflow 2
_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"


@contextlib.contextmanager
def _few_retries() -> Iterator[None]:
    """A server that is not there shows in seconds; MLflow's own seven retries take four minutes."""
    if _RETRIES in os.environ:
        yield
        return
    os.environ[_RETRIES] = "2"
    try:
        yield
    finally:
        del os.environ[_RETRIES]


def connect(uri: str, experiment: str = EXPERIMENT) -> tuple[Any, str]:
    """MLflow's client and the experiment's id, which is made if need be. Called before a run begins, so that what is
    missing shows then. Raises UnavailableError."""
    try:
        from mlflow import MlflowClient
    except ImportError as error:
        raise UnavailableError(
            "MLflow is not installed", where="--mlflow", got=str(error), remedy="pip install 'deploy-prune[mlflow]'"
        ) from error
    with _explained(uri), _few_retries():
        client = MlflowClient(tracking_uri=uri)
        known = client.get_experiment_by_name(experiment)
        return client, str(known.experiment_id if known is not None else client.create_experiment(experiment))


@contextlib.contextmanager
def _explained(uri: str) -> Iterator[None]:
    """MLflow's failures as UnavailableError: wrong addresses, servers that do not answer, stores that are refused."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:  # requests' errors are OSErrors
        raise UnavailableError(
            "MLflow does not take the run",
            where=uri,
            got=str(error).strip()[:600],
            remedy="Check the tracking URI and its credentials. A finished bundle stays: the same run with --resume "
            "logs it again.",
        ) from error


def log_bundle(bundle: Path | str, uri: str, experiment: str = EXPERIMENT) -> str:
    """Log a finished bundle; returns the id of the MLflow run. Raises UnavailableError when the server does not take it
    all; the run is then marked as failed there."""
    bundle = Path(bundle)
    manifest = Manifest.load(bundle / MANIFEST)
    client, number = connect(uri, experiment)
    with _explained(uri):
        from mlflow.entities import Metric, Param, RunTag

        tags = {"deploy-prune.run": manifest.run or "", "deploy-prune.weights_sha256": manifest.base.weights_sha256}
        run = client.create_run(number, run_name=manifest.name, tags=tags)
        run_id = str(run.info.run_id)
        try:
            begun = run.info.start_time
            params = [Param(name, text) for name, text in parameters(manifest.recipe).items()]
            values = [Metric(name, value, begun, 0) for name, value in metrics(manifest).items()]
            versions = [RunTag(f"version.{name}", text) for name, text in manifest.versions.items() if text]
            for i in range(0, len(params), _BATCH):
                client.log_batch(run_id, params=params[i : i + _BATCH])
            for i in range(0, len(values), _METRICS):
                client.log_batch(run_id, metrics=values[i : i + _METRICS])
            client.log_batch(run_id, tags=versions[:_BATCH])
            for name in (CARD, REPORT, MANIFEST):
                client.log_artifact(run_id, str(bundle / name))
        except BaseException:
            client.set_terminated(run_id, "FAILED")
            raise
        client.set_terminated(run_id, "FINISHED")
    return run_id


def parameters(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """`{"search.method": "spp", ...}`: what the recipe says, defaults included; None is left out."""
    found: dict[str, str] = {}
    for key, value in recipe.items():
        if isinstance(value, Mapping):
            found |= parameters(value, f"{prefix}{key}.")
        elif value is not None and value != "":
            found[f"{prefix}{key}"] = str(value)[:_LONGEST]
    return found


def metrics(manifest: Manifest) -> dict[str, float]:
    """`{"s30/top1": 0.97, "s30/bytes": ..., "s30/p50_ms/ort-cpu_b1": ...}`, and the seconds of every stage."""
    found = {f"{member.name}/{name}": float(value) for member in manifest.members for name, value in _figures(member)}
    return found | {f"seconds/{stage}": seconds for stage, seconds in manifest.seconds.items()}


def _figures(member: Member) -> Iterator[tuple[str, float]]:
    yield "bytes", member.bytes
    if member.achieved is not None:
        for name in ("sparsity", "params", "macs"):
            yield name, getattr(member.achieved, name)
    if member.quality is not None:
        metric = member.quality.metric.replace("@", "_at_")
        yield metric, member.quality.value
        yield f"{metric}_low", member.quality.interval[0]
        yield f"{metric}_high", member.quality.interval[1]
    if isinstance(error := member.parity.get("error"), (int, float)):
        yield "parity_error", error
    for entry in member.latency:
        cell = cell_name(entry).replace(" ", "_")
        yield f"p50_ms/{cell}", entry.p50_ms
        yield f"p99_ms/{cell}", entry.p99_ms
        yield f"ratio/{cell}", entry.ratio.value
