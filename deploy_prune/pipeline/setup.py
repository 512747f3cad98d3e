"""What a run needs before its first stage: names checked, model and task loaded, and an identity for the cache."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_prune import distributed
from deploy_prune.errors import UsageError, did_you_mean
from deploy_prune.progress import SILENT, Progress
from deploy_prune.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from torch import nn

    from deploy_prune.tasks import Task
    from deploy_prune.units import Site

# Packages whose version can change the bytes of a path, plan or ONNX file.
_VERSIONED = ("deploy-prune", "torch", "transformers", "timm", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "numpy")


@dataclass(frozen=True)
class Setup:
    """A recipe with everything it names, loaded. `identity` is what every stage's fingerprint starts from; `delta` the
    file, in the bundle, of the task delta that made the model of the recipe's."""

    recipe: Recipe
    model: nn.Module
    task: Task
    sites: tuple[Site, ...]
    weights_sha256: str
    device: torch.device
    identity: dict[str, Any]
    progress: Progress = field(default=SILENT)
    delta: str | None = None


def prepare(recipe: Recipe, progress: Progress = SILENT) -> Setup:
    """Load model and task. Raises what their loaders raise; unknown names are refused before anything is loaded."""
    import torch

    from deploy_prune.adapters import find_sites
    from deploy_prune.architecture import weights_sha256
    from deploy_prune.sources import load_model
    from deploy_prune.tasks import load_task

    check_names(recipe)
    device = choose_device(recipe.device)
    torch.manual_seed(recipe.seed)
    model = load_model(recipe.model)
    sites = find_sites(model)
    task = load_task(
        recipe.task.name,
        model=model,
        model_ref=recipe.model,
        calibration=recipe.task.calibration,
        evaluation=recipe.task.evaluation,
        **recipe.task.options,
    )
    sha256 = weights_sha256(model)
    identity = {
        "model": recipe.model,
        "weights_sha256": sha256,
        "task": recipe.task.model_dump(mode="json"),
        "data": [data_identity(ref) for ref in (recipe.task.calibration, recipe.task.evaluation) if ref],
        "versions": versions(),
        "device": device.type,
        "seed": recipe.seed,
    }
    return Setup(recipe, model, task, sites, sha256, device, identity, progress)


def check_names(recipe: Recipe) -> None:
    """Raise UsageError for an unknown task, method or runtime and for unknown options, all at once."""
    from pydantic import ValidationError

    from bench.runtimes import RUNTIMES
    from deploy_prune.methods import METHODS
    from deploy_prune.plan_path import GIVEN
    from deploy_prune.recipe_text import explain
    from deploy_prune.recovery.options import check_fits
    from deploy_prune.tasks import TASKS, task_class

    problems = []
    remedy = None
    if recipe.task.name not in TASKS:
        problems.append(f"task.name: unknown task {recipe.task.name!r}. {did_you_mean(recipe.task.name, list(TASKS))}")
    else:
        known = _task_options(recipe.task.name)
        problems += [
            f"task.options.{name}: unknown option. {did_you_mean(name, known)}"
            for name in recipe.task.options
            if name not in known
        ]
    if recipe.search.method == GIVEN:
        pass  # nothing is searched
    elif recipe.search.method not in METHODS:
        known = list(METHODS)
        problems.append(
            f"search.method: unknown method {recipe.search.method!r}. {did_you_mean(recipe.search.method, known)}"
        )
    else:
        options = METHODS[recipe.search.method].options
        try:
            options.model_validate(recipe.search.options)
        except ValidationError as error:
            problems += [f"search.options.{problem}" for problem in explain(error, options)]
            remedy = (
                f"Options belong to one method. To run {recipe.search.method} with its own defaults: "
                "--set search.options={}"
            )
    for part in ("recover", "dynamic"):
        training = getattr(recipe, part)
        if training.enabled and recipe.task.name in TASKS:
            try:
                check_fits(training, task_class(recipe.task.name))
            except UsageError as error:
                problems += [f"{part}.{problem}" for problem in error.problems]
    asked = [(f"bench.runtimes[{index}]", runtime) for index, runtime in enumerate(recipe.bench.runtimes)]
    for key, runtime in [*asked, ("family.latency.runtime", recipe.family.latency.runtime)]:
        if runtime not in RUNTIMES:
            problems.append(f"{key}: unknown runtime {runtime!r}. {did_you_mean(runtime, list(RUNTIMES))}")
    if problems:
        noun = "unknown name" if len(problems) == 1 else "unknown names"
        raise UsageError(f"{len(problems)} {noun}", where=f"recipe {recipe.name}", problems=problems, remedy=remedy)


def _task_options(name: str) -> list[str]:
    import inspect

    from deploy_prune.tasks import task_class

    parameters = inspect.signature(task_class(name).create).parameters.values()
    return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]


def choose_device(asked: str) -> torch.device:
    """Where search and refit run: "auto" takes the GPU when there is one. Raises UnavailableError for an absent GPU."""
    import torch

    from deploy_prune.errors import UnavailableError

    if asked == "cuda" and not torch.cuda.is_available():
        raise UnavailableError(
            "no CUDA device for torch",
            where="recipe key device",
            expected="cuda",
            got="cpu only",
            remedy="Use device: auto or cpu, or install a torch build that matches the driver.",
        )
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    own = distributed.device()
    return own if own is not None and own.type == asked else torch.device(asked)


def tokenizer_of(setup: Setup) -> Any:
    """The tokenizer that a text model's checkpoint needs to be used; None for images."""
    from deploy_prune.sources import load_tokenizer

    if not any(spec.role == "ids" for spec in setup.task.signature.inputs):
        return None
    return load_tokenizer(str(setup.recipe.task.options.get("tokenizer") or setup.recipe.model))


def versions() -> dict[str, str]:
    """Installed versions that bear on the bytes of the results."""
    from bench.environment import package_versions

    found = package_versions()
    return {"python": platform.python_version(), **{n: v for n in _VERSIONED if (v := found.get(n))}}


def data_identity(reference: str) -> dict[str, Any]:
    """What tells one state of the data from another without reading it: sizes and times of its files."""
    from deploy_prune.references import data_reference, local_path

    parsed = data_reference(reference)
    known: dict[str, Any] = {"reference": reference}
    if parsed.scheme in ("digits", "hf"):
        return known
    path = local_path(parsed.location)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    known["files"] = len(files)
    known["bytes"] = sum(file.stat().st_size for file in files)
    known["newest"] = max((file.stat().st_mtime_ns for file in files), default=0)
    return known


def local_data(reference: str) -> tuple[str, bool | None]:
    """Where data lies, and whether it is there; None when only loading would tell (hub data)."""
    from deploy_prune.references import data_reference, local_path

    parsed = data_reference(reference)
    if parsed.scheme == "digits":
        return "scikit-learn", True
    if parsed.scheme == "hf":
        if Path(parsed.location).expanduser().is_dir():
            return parsed.location, True
        return f"hub:{parsed.location}", None
    path = local_path(parsed.location)
    return str(path), path.exists()
