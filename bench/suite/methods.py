"""The default search and refit, every search and every correction: on the device against the CPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bench.suite.base import Bench, all_well, close
from deploy_prune.errors import DeployPruneError, ParityError

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from deploy_prune.path import SolutionPath
    from deploy_prune.plan import PrunePlan
    from deploy_prune.tasks import Task

SHARED = 0.9  # of the units of either plan; importances that lie close change places by rounding
DEFAULT = 0.98  # the same of the default search, which is made from more examples
REFERENCE = "python:deploy_prune.demo:digits_vit"
# Searches that train: fewer steps keep rounding from growing into another path.
OPTIONS: dict[str, dict[str, Any]] = {"structural-diff": {"steps": 20}}


@dataclass
class Found:
    """What one device found: a path of each search, a model's outputs after each correction of `plan`, why others
    failed."""

    plan: PrunePlan
    paths: dict[str, SolutionPath] = field(default_factory=dict)
    outputs: dict[str, np.ndarray] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def default_ahead(bench: Bench) -> None:
    bench.jobs.start(("search",), default_on, "cpu", bench.small)


def search_and_refit(bench: Bench) -> dict[str, Any]:
    """The default search and the refit on the device give the plan and the model that they give on the CPU."""
    plan, own = default_on(bench.device, bench.small)
    expected_plan, expected = bench.jobs["search",]
    common = shared(plan, expected_plan)
    result = bench.begin()
    result |= {"device": bench.device, "units shared with the CPU's plan": common}
    if common < DEFAULT:
        raise ParityError(
            "the search on the device finds another path", expected=f"{DEFAULT:.0%} shared", got=f"{common:.1%}"
        )
    if plan.keep == expected_plan.keep:  # bases turn with rounding, so the functions are compared, not the weights
        result["refitted outputs off by"] = close(own, expected, "refit", "digits")
    return result


def default_on(device: str, small: bool) -> tuple[PrunePlan, np.ndarray]:
    """The plan of 40 %, and what the model refitted by it answers."""
    dense, task = digits(device, epochs=2 if small else 6)
    count = 64 if small else 128
    path = _path(dense, task, "fisher" if small else "spp", count)
    return path.plan(0.4), _answers(_corrected(dense, task, path, "ridge", count), task)


def methods_ahead(bench: Bench) -> None:
    bench.jobs.start(("methods",), all_on, "cpu")


def every_method(bench: Bench) -> dict[str, Any]:
    """Every search of the registry finds on the device the units that it finds on the CPU, and every correction of a
    plan makes the same model there."""
    own = all_on(bench.device)
    expected: Found = bench.jobs["methods",]
    result, failed = bench.begin(), []
    for where, found in (("cpu, in another process", expected), (bench.device, own)):
        for name, why in found.failures.items():
            result.setdefault(name, {})[f"failed on {where}"] = why
            failed.append(f"{name} on {where}: {why}")
    if own.plan.keep != expected.plan.keep:
        failed.append("the corrections are of different plans: the search on the CPU differs between processes")
    for name in own.paths.keys() & expected.paths.keys():
        common = shared(own.paths[name].plan(0.4), expected.paths[name].plan(0.4))
        result.setdefault(name, {})["units shared"] = common
        if common < SHARED:
            failed.append(f"{name}: only {common:.1%} of the units are shared")
    for how in own.outputs.keys() & expected.outputs.keys():
        try:
            off = close(own.outputs[how], expected.outputs[how], "refit", how)
            result[f"correction {how}"] = {"outputs off by": off}
        except DeployPruneError as error:
            failed.append(f"correction {how}: {error}")
    all_well(failed)
    return result


def all_on(device: str) -> Found:
    """Every search and every correction, the latter of the plan that the Fisher search finds on the CPU."""
    from deploy_prune.compensation import COMPENSATIONS
    from deploy_prune.methods import METHODS

    dense, task = digits("cpu", epochs=2)
    fisher = _path(dense, task, "fisher")
    found = Found(fisher.plan(0.4))
    dense = dense.to(device)
    for name in METHODS:
        try:
            found.paths[name] = _path(dense, task, name)
        except (DeployPruneError, RuntimeError, ValueError) as error:
            found.failures[name] = repr(error)
    for how in COMPENSATIONS:
        try:
            found.outputs[how] = _answers(_corrected(dense.to(device), task, fisher, how), task)
        except (DeployPruneError, RuntimeError, ValueError) as error:
            found.failures[f"correction {how}"] = repr(error)
    return found


def digits(device: str, epochs: int) -> tuple[nn.Module, Task]:
    """The digits ViT on a device and its task."""
    from deploy_prune.demo import digits_vit
    from deploy_prune.tasks import load_task

    dense = digits_vit(epochs=epochs).to(device)
    task = load_task(
        "image-classification", model=dense, model_ref=REFERENCE, calibration="digits:train", evaluation=None
    )
    return dense, task


def _path(model: nn.Module, task: Task, method: str, examples: int = 64) -> SolutionPath:
    from deploy_prune.methods import search

    options = OPTIONS.get(method, {})
    return search(
        model, task, method, examples=examples, batch_size=min(64, examples // 2), precision="fp32", **options
    )


def _corrected(model: nn.Module, task: Task, path: SolutionPath, how: Any, examples: int = 128) -> nn.Module:
    from converters.surgery import compact
    from deploy_prune.adapters import find_sites
    from deploy_prune.compensation import compensate
    from deploy_prune.refitting import collect_moments

    plan = path.plan(0.4)
    moments = collect_moments(model, find_sites(model), task.calibration(64, examples), task.signature)
    return compact(compensate(model, plan, moments, how, basis=path.basis), plan, check_weights=False)


def _answers(model: nn.Module, task: Task) -> np.ndarray:
    """Logits of 64 random images, computed on the CPU."""
    import torch

    inputs = task.signature.random_inputs({"batch": 64}, seed=3)
    with torch.no_grad():
        logits: np.ndarray = task.signature.call(model.cpu(), inputs).numpy()
    return logits


def shared(one: PrunePlan, other: PrunePlan) -> float:
    """The share of units that both plans keep, of those that either keeps."""
    both = either = 0
    for site, kinds in one.keep.items():
        for kind, kept in kinds.items():
            a, b = set(kept), set(other.keep.get(site, {}).get(kind, ()))
            both, either = both + len(a & b), either + len(a | b)
    return both / max(1, either)
