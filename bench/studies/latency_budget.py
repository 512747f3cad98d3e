"""Does choosing by measured latency keep more quality than choosing by MACs, at equal measured latency?

    python -m bench.studies.latency_budget vit-tiny-imagenet --batch 8 --out bench/results/latency_budget_vit_tiny.json

For every speed-up: the plan that the latency budget chooses, and the plan of a MAC budget along the same path, whose
target is moved until it is measured as fast; of the last few, the one whose time is nearest. Both are refitted, nothing
is trained; both are judged on the recipe's evaluation data by metric, by the task's loss and by the distance to the
dense model's outputs, with paired intervals.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from deploy_prune.precision_options import Precision

if TYPE_CHECKING:
    from torch import nn

    from bench.latency_table import LatencyTable
    from bench.report import LatencyReport
    from deploy_prune.latency.place import Place
    from deploy_prune.path import SolutionPath
    from deploy_prune.pipeline.setup import Setup
    from deploy_prune.plan import PrunePlan

SPEEDUPS = (1.25, 1.5, 2.0)
ROUNDS = 60  # of the last measurement, on which the comparison rests
CORRECTIONS = 2  # of the MAC target, towards equal measured latency
AROUND = (0.98, 1.0, 1.02)  # of the last target: so many MAC plans are timed at the end


@click.command(help=__doc__)
@click.argument("recipe")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe key.")
@click.option("--path", "file", type=click.Path(path_type=Path), help="A path searched before, of the same weights.")
@click.option("--speedup", "speedups", type=float, multiple=True, default=SPEEDUPS, show_default=True)
@click.option("--runtime", default="ort-cpu", show_default=True)
@click.option("--batch", type=int, default=8, show_default=True)
@click.option("--seq", type=int)
@click.option("--past", type=int, help="Time decoders with a cache of so many tokens.")
@click.option("--precision", type=click.Choice(["fp32", *get_args(Precision)]), default="fp32", show_default=True)
@click.option("--threads", type=int)
@click.option("--align", type=int, default=8, show_default=True, help="Of both budgets.")
@click.option("--limit", type=int, help="Rows of evaluation data.  [default: all]")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Write the figures here as JSON.")
def main(
    recipe: str,
    overrides: tuple[str, ...],
    file: Path | None,
    speedups: tuple[float, ...],
    runtime: str,
    batch: int,
    seq: int | None,
    past: int | None,
    precision: Any,
    threads: int | None,
    align: int,
    limit: int | None,
    out: Path,
) -> None:
    from bench.environment import environment
    from bench.studies.judging import judge_all
    from converters.precision.formats import check_timed
    from deploy_prune.cli import console
    from deploy_prune.files import write_json
    from deploy_prune.latency.fitting import fit_plans
    from deploy_prune.latency.place import Place
    from deploy_prune.path import SolutionPath
    from deploy_prune.pipeline.choosing import search_of, timed_graph
    from deploy_prune.pipeline.losses import calibrated, calibrates
    from deploy_prune.pipeline.searching import find_path, moments_of
    from deploy_prune.pipeline.setup import prepare
    from deploy_prune.recipe import load_recipe

    setup = prepare(load_recipe(recipe, list(overrides)), progress=console.progress())
    moments = moments_of(setup)
    path = SolutionPath.load(file) if file else find_path(setup)
    if not file and calibrates(setup.recipe):
        path = calibrated(setup, path, moments)
    place = Place(runtime, batch, seq, threads, past=past)
    check_timed(runtime, precision, past is not None)
    export = replace(timed_graph(setup), cache=past is not None, precision=precision)
    search = search_of(setup, path, moments, place, export, align)
    plans, fits = fit_plans(
        search, {f"{x:g}x": ("speedup", x) for x in speedups}, setup.model, export, progress=setup.progress
    )
    with tempfile.TemporaryDirectory(prefix="deploy-prune-") as scratch:
        rivals, report = rivals_of(setup, path, search.table, search.place, plans, export, align, Path(scratch))
    judged = judge_all(setup, path, moments, {**by_latency(plans), **by_macs(rivals)}, limit)
    result = {
        "recipe": setup.recipe.name,
        "model": setup.recipe.portable()["model"],
        "path": {"method": path.method, "options": dict(path.options)},
        "table": search.table.to_json(),
        "losses": search.losses.to_json(),
        "fits": {name: fit.to_json() for name, fit in fits.items()},
        "timed": report.to_json(),
        "quality": judged["figures"],
        "pairs": [pair(report, judged, name, plans[name], rivals[name]) for name in plans],
        "align": align,
        "precision": precision,
        "environment": environment(),
    }
    write_json(out, result)
    for row in result["pairs"]:
        quality = {which: judged["figures"][f"{row['target']} {which}"]["value"] for which in ("latency", "macs")}
        metric, loss = (
            f"{row[what]['difference']:+.4f} [{row[what]['low']:+.4f}, {row[what]['high']:+.4f}]"
            for what in ("metric", "loss")
        )
        click.echo(
            f"{row['target']:6} MACs {row['macs']['latency']:,} and {row['macs']['macs']:,}; "
            f"time of the MAC plan over ours {row['time']['value']:.3f}; metric {quality['latency']:.4f} and "
            f"{quality['macs']:.4f} (difference in {row['metric'].get('unit', 'itself')} {metric}); "
            f"loss {row['loss']['latency']:.4f} and {row['loss']['macs']:.4f} (difference {loss})"
        )


def by_latency(plans: Mapping[str, PrunePlan]) -> dict[str, PrunePlan]:
    return {f"{name} latency": plan for name, plan in plans.items()}


def by_macs(rivals: Mapping[str, tuple[str, PrunePlan]]) -> dict[str, PrunePlan]:
    return {f"{name} macs": plan for name, (_, plan) in rivals.items()}


def rivals_of(
    setup: Setup,
    path: SolutionPath,
    table: LatencyTable,
    place: Place,
    plans: Mapping[str, PrunePlan],
    export: Callable[[nn.Module, Path], Any],
    align: int,
    directory: Path,
) -> tuple[dict[str, tuple[str, PrunePlan]], LatencyReport]:
    """MAC-budget plans measured as fast as `plans`, by their names in the report of them all beside the dense model."""
    from converters.surgery import compact

    def write(name: str, model: nn.Module) -> Path:
        export(model, directory / f"{name}.onnx")
        return directory / f"{name}.onnx"

    dense = {"dense": write("dense", setup.model)}
    for name, plan in by_latency(plans).items():
        dense[name] = write(name, compact(setup.model, plan, check_weights=False))
    wanted = {name: table.plan_ms(plan.counts(path.sites)) for name, plan in plans.items()}
    for correction in range(CORRECTIONS + 1):
        last = correction == CORRECTIONS
        tried = {
            f"{name} macs{number}": (name, mac_plan(path, table, factor * wanted[name], align))
            for name in plans
            for number, factor in enumerate(AROUND if last else (1.0,))
        }
        files = dense | {key: write(key, compact(setup.model, p, check_weights=False)) for key, (_, p) in tried.items()}
        report = place.time(files, seed=correction, min_rounds=ROUNDS if last else 30, progress=setup.progress)
        off = {key: report[key].ratio.value / report[f"{name} latency"].ratio.value for key, (name, _) in tried.items()}
        if not last:
            wanted = {name: ms / off[f"{name} macs0"] for name, ms in wanted.items()}
    nearest: dict[str, tuple[str, PrunePlan]] = {}
    for key in sorted(tried, key=lambda key: abs(math.log(off[key]))):
        name, plan = tried[key]
        nearest.setdefault(name, (key, plan))
    return nearest, report


def mac_plan(path: SolutionPath, table: LatencyTable, ms: float, align: int) -> PrunePlan:
    """The largest plan of a MAC budget whose predicted latency is at most `ms`."""
    low, high = 0.02, 1.0
    for _ in range(14):
        middle = (low + high) / 2
        plan = path.plan(budget="macs", value=middle, align=align)
        low, high = (middle, high) if table.plan_ms(plan.counts(path.sites)) <= ms else (low, middle)
    return path.plan(budget="macs", value=low, align=align)


def pair(
    report: LatencyReport,
    judged: Mapping[str, Any],
    name: str,
    ours: PrunePlan,
    rival: tuple[str, PrunePlan],
) -> dict[str, Any]:
    """Both plans of one speed-up beside each other; differences are latency budget minus MAC budget."""
    from dataclasses import asdict

    from bench.stats import ratio_of_medians
    from bench.studies.judging import difference, metric_difference

    timed, plan = rival
    assert ours.achieved is not None and plan.achieved is not None
    samples = report.samples
    a, b = f"{name} latency", f"{name} macs"
    time = ratio_of_medians(samples.of(timed), samples.of(a), sessions=samples.sessions)
    plans = {"latency": ours.achieved, "macs": plan.achieved}
    found: dict[str, Any] = {
        "target": name,
        "speedup": {"latency": report[a].speedup, "macs": report[timed].speedup},
        "time": asdict(time),
        "macs": {which: plan.macs for which, plan in plans.items()},
        "params": {which: plan.params for which, plan in plans.items()},
    }
    mine, theirs = judged["rows"][a], judged["rows"][b]
    names = ("latency", "macs")
    found["metric"] = metric_difference(judged["metric"], mine["metric"], theirs["metric"], names)
    for figure in ("loss", "distance"):
        found[figure] = difference(mine[figure], theirs[figure], names)
    return found


if __name__ == "__main__":
    main()
