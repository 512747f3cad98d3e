"""`deploy-prune inspect`: what a model, a solution path, a task delta, a plan, a bundle or a recipe holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from deploy_prune.cli import console
from deploy_prune.errors import UsageError

TABLES = (
    "units",
    "not offered",
    "stays",
    "sites",
    "layers",
    "changes",
    "groups",
    "tensors",
    "members",
    "audit",
    "latency",
)
LAYERS_AT = (0.1, 0.3, 0.5)  # sparsities shown where --plot is given without --at


@click.command(short_help="Show what a model, path, task delta, plan or bundle holds.")
@click.argument("thing")
@click.option("--at", metavar="X,...", help="Of a path: what every layer keeps at these sparsities.")
@click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw it, or a history: FILE.png, .svg, .pdf"
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(thing: str, at: str | None, plot: Path | None, as_json: bool) -> None:
    """Show what THING holds: a model reference (timm:, hf:, gguf:, python:), a path or a task delta (.safetensors), a
    plan (.json), the history of a dynamic training (.history.json), a bundle (directory) or a recipe (.yaml, or a
    built-in name).

    A model reference is loaded; python: references run your code.
    """
    from deploy_prune.layer_table import text_rows
    from deploy_prune.recipe_text import shares

    describe = _describer(thing)
    if describe is describe_history and not at:
        report = describe_history(thing, plot)
    elif (at or plot) and describe is not describe_path:
        raise UsageError(
            "--at and --plot show the layers of a path, --plot also a history",
            got=thing,
            expected="FILE.safetensors or NAME.history.json",
        )
    else:
        report = describe_layers(thing, shares(at, "--at") or LAYERS_AT, plot) if at or plot else describe(thing)
    if as_json:
        console.emit_json(report)
        return
    if "layers" in report:
        report["layers"] = text_rows(report["layers"])
    tables = {name: report.pop(name) for name in TABLES if name in report}
    console.facts({name: value for name, value in report.items() if value is not None})
    for name, rows in tables.items():
        if rows:
            columns = list(dict.fromkeys(column for row in rows for column in row))
            print()
            console.table(columns, [[row.get(column) for column in columns] for row in rows], title=name)


def _describer(thing: str) -> Callable[[str], dict[str, Any]]:
    from deploy_prune.recipe import builtin_recipes
    from deploy_prune.references import MODEL_SCHEMES

    path = Path(thing)
    if thing.partition(":")[0] in MODEL_SCHEMES:  # before the suffixes: timm:NAME@FILE.safetensors is a model
        return describe_model
    if path.is_dir() and (path / "config.json").is_file() and not (path / "manifest.json").exists():
        raise UsageError("a directory of transformers is named as a model", got=thing, expected=f"hf:{thing}")
    if path.is_dir():
        return describe_bundle
    if path.suffix == ".safetensors":
        return describe_delta if _is_delta(path) else describe_path
    if path.name.endswith("history.json"):
        return describe_history
    if path.suffix == ".json":
        return describe_plan
    if path.suffix in (".yaml", ".yml") or thing in builtin_recipes():
        return describe_recipe
    raise UsageError(
        f"cannot tell what {thing!r} is",
        expected="a model reference, FILE.safetensors (path, delta), FILE.json (plan), FILE.yaml (recipe) or a bundle",
        remedy=f"Model references start with one of {', '.join(s + ':' for s in MODEL_SCHEMES)}",
    )


def _is_delta(file: Path) -> bool:
    """Whether a file says that it is a task delta; what is no safetensors file at all the path's reader refuses."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as stream:
            said = json.loads((stream.metadata() or {}).get("deploy_prune", "{}"))
    except (SafetensorError, OSError, ValueError):
        return False
    return isinstance(said, dict) and said.get("_type") == "TaskDelta"


def describe_model(reference: str) -> dict[str, Any]:
    """Sites, units and costs of a model, and what is not prunable with the reason."""
    from deploy_prune.architecture import weights_sha256
    from deploy_prune.inspection import offers
    from deploy_prune.sources import load_model

    model = load_model(reference)
    return {
        "type": "model",
        "model": reference,
        "class": type(model).__name__,
        "weights_sha256": weights_sha256(model),
        **offers(model),
    }


def describe_path(file: str) -> dict[str, Any]:
    """Where a path comes from, and when the units of each group leave."""
    import numpy as np

    from deploy_prune.path import SolutionPath

    path = SolutionPath.load(file)
    return {
        "type": "solution path",
        "model": path.model,
        "weights_sha256": path.weights_sha256,
        "method": path.method,
        "options": dict(path.options),
        "parameters": path.costs.params,
        "prunable parameters": path.costs.prunable(path.sites),
        "macs": path.costs.macs,
        "groups": [
            {
                "group": key,
                "units": len(scores),
                **{f"kept at s{share}": int((scores > share / 100).sum()) for share in (10, 30, 50, 70)},
                "median exit": round(float(np.median(scores)), 4),
            }
            for key, scores in path.scores.items()
        ],
    }


def describe_layers(file: str, sparsities: Sequence[float], plot: Path | None = None) -> dict[str, Any]:
    """What every layer keeps at the given sparsities of a path; drawn into the file `plot` too."""
    from deploy_prune.layer_table import layer_table, plot_layers
    from deploy_prune.path import SolutionPath

    path = SolutionPath.load(file)
    table = layer_table(path, sparsities)
    if plot is not None:
        plot_layers(table, plot, f"{path.method}, {path.model}")
    return {"type": "layers of a solution path", "model": path.model, "method": path.method, "layers": table}


def describe_delta(file: str) -> dict[str, Any]:
    """What a task delta changes, and how it was made."""
    from deploy_prune.cli.delta import described
    from deploy_prune.delta import TaskDelta

    return described(TaskDelta.load(file))


def describe_plan(file: str) -> dict[str, Any]:
    """What a plan keeps at each site, and what was asked and achieved."""
    from deploy_prune.plan import PrunePlan

    plan = PrunePlan.load(file)
    return {
        "type": "plan",
        "model": plan.model,
        "weights_sha256": plan.weights_sha256,
        "asked": plan.asked.model_dump(mode="json") if plan.asked else None,
        "achieved": plan.achieved.model_dump(mode="json") if plan.achieved else None,
        "sites": [
            {"site": site, **{f"{kind.value}s kept": len(indices) for kind, indices in kinds.items()}}
            for site, kinds in plan.keep.items()
        ],
    }


def describe_history(file: str, plot: Path | None = None) -> dict[str, Any]:
    """What left and came back in a dynamic training; drawn into the file `plot` too."""
    from deploy_prune.dynamic.history import History, plot_history, rows

    history = History.load(file)
    if plot is not None:
        plot_history(history, plot, Path(file).name.removesuffix(".history.json"))
    return {
        "type": "history of a dynamic training",
        "kept structure of step": history.best_step,
        "units back after they had left": history.returned(),
        "changes": rows(history),
    }


def describe_recipe(source: str) -> dict[str, Any]:
    """A recipe with its defaults spelled out."""
    from deploy_prune.recipe import load_recipe

    recipe = load_recipe(source)
    return {"type": "recipe", **recipe.resolved(), "members": [{"name": name} for name in recipe.family.member_names()]}


def audit_rows(member: Any) -> list[dict[str, Any]]:
    """What ONNX Runtime makes of a member: one row in all, and one for every layer whose fusion was lost."""
    audit = member.audit
    if audit is None:
        return []
    fused = sum(layer["heads"] is not None for layer in audit["layers"])
    whole = {
        "member": member.name,
        "variant": member.variant,
        "nodes": audit["nodes"],
        "fused attentions": fused,
        "nodes that move data": audit["moves"],
        "weight bytes": member.weight_bytes,
        "result": "passed" if audit["passed"] else "FAILED",
    }
    return [whole, *({"member": member.name, "result": problem} for problem in audit["problems"])]


def describe_bundle(directory: str) -> dict[str, Any]:
    """The members of a bundle, as its manifest tells; `verify` says whether it is true."""
    from deploy_prune.pipeline.summary import rows, summary
    from deploy_prune.release.manifest import MANIFEST, Manifest

    bundle = Path(directory)
    manifest = Manifest.load(bundle / MANIFEST)
    columns, table = rows(summary(bundle))
    return {
        "type": "bundle",
        "name": manifest.name,
        "model": manifest.base.reference,
        "parameters": manifest.base.parameters,
        "weights_sha256": manifest.base.weights_sha256,
        "licence": f"weights: {manifest.provenance.model.license or 'unknown'}, "
        f"data: {manifest.provenance.data.license or 'unknown'}",
        "task": manifest.task.get("name"),
        "inputs": "; ".join(f"{t.name} {t.dtype}{t.shape}" for t in manifest.inputs),
        "output": f"{manifest.output.name} {manifest.output.dtype}{manifest.output.shape}",
        "files": len(manifest.files) + 1,  # the manifest too
        "members": [dict(zip(columns, row, strict=True)) for row in table],
        "audit": [row for member in manifest.members for row in audit_rows(member)],
    }
