"""Every search and every correction on the device against the CPU's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.suite.base import Bench, all_well, close
from deploy_prune.errors import DeployPruneError

if TYPE_CHECKING:
    from torch import nn

    from deploy_prune.path import SolutionPath
    from deploy_prune.tasks import Task

SHARED = 0.9  # of the units of either plan; importances that lie close change places by rounding
REFERENCE = "python:deploy_prune.demo:digits_vit"
# Searches that train: fewer steps keep rounding from growing into another path.
OPTIONS: dict[str, dict[str, Any]] = {"structural-diff": {"steps": 20}}


def every_method(bench: Bench) -> dict[str, Any]:
    """Every search of the registry finds on the device the units that it finds on the CPU, and every correction of a
    plan makes the same model there."""
    import torch

    from deploy_prune.compensation import COMPENSATIONS
    from deploy_prune.demo import digits_vit
    from deploy_prune.methods import METHODS
    from deploy_prune.tasks import load_task

    result, failed = bench.begin(), []
    dense = digits_vit(epochs=2)
    task = load_task(
        "image-classification", model=dense, model_ref=REFERENCE, calibration="digits:train", evaluation=None
    )
    devices = dict.fromkeys(("cpu", bench.device))
    for name in METHODS:
        try:
            paths = [_path(dense.to(device), task, name) for device in devices]
            common = shared(paths[0], paths[-1])
            result[name] = {"units shared": common}
            if common < SHARED:
                failed.append(f"{name}: only {common:.1%} of the units are shared")
        except (DeployPruneError, RuntimeError) as error:
            result[name] = {"failed": repr(error)}
            failed.append(f"{name}: {error}")
    path = _path(dense.cpu(), task, "fisher")
    inputs = task.signature.random_inputs({"batch": 16}, seed=3)
    for how in COMPENSATIONS:
        outputs = []
        for device in devices:
            model = _corrected(dense.to(device), task, path, how).cpu()
            with torch.no_grad():
                outputs.append(task.signature.call(model, inputs).numpy())
        try:
            result[f"correction {how}"] = {"outputs off by": close(outputs[-1], outputs[0], "refit", how)}
        except DeployPruneError as error:
            failed.append(f"correction {how}: {error}")
    all_well(failed)
    return result


def _path(model: nn.Module, task: Task, method: str) -> SolutionPath:
    from deploy_prune.methods import search

    options = OPTIONS.get(method, {})
    return search(model, task, method, examples=64, batch_size=32, precision="fp32", **options)


def _corrected(model: nn.Module, task: Task, path: SolutionPath, how: Any) -> nn.Module:
    from converters.surgery import compact
    from deploy_prune.adapters import find_sites
    from deploy_prune.compensation import compensate
    from deploy_prune.refitting import collect_moments

    plan = path.plan(0.4)
    moments = collect_moments(model, find_sites(model), task.calibration(64, 128), task.signature)
    return compact(compensate(model, plan, moments, how, basis=path.basis), plan, check_weights=False)


def shared(a: SolutionPath, b: SolutionPath) -> float:
    """The share of units that two plans of 40 % both keep, of those that either keeps."""
    plans = [path.plan(0.4).keep for path in (a, b)]
    both = either = 0
    for site, kinds in plans[0].items():
        for kind, kept in kinds.items():
            one, other = set(kept), set(plans[1].get(site, {}).get(kind, ()))
            both, either = both + len(one & other), either + len(one | other)
    return both / max(1, either)
