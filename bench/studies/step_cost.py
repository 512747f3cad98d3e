"""What a step of the SPP search costs against a plain forward and backward pass with frozen weights.

    python -m bench.studies.step_cost --out bench/results/step_cost.json

Random weights serve: the time of a step does not depend on them. Both kinds of step run interleaved in one process on
the same batches; the figure is the ratio of medians with a bootstrap interval.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import numpy as np

MODELS = ("vit-tiny", "distilbert", "smollm2")


@click.command(help=__doc__)
@click.option("--model", "models", type=click.Choice(MODELS), multiple=True, default=MODELS, show_default=True)
@click.option("--steps", default=20, show_default=True, help="Timed steps of each kind.")
@click.option("--precision", type=click.Choice(["bf16", "fp32"]), default="bf16", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures here as JSON.")
def main(models: tuple[str, ...], steps: int, precision: str, out: Path | None) -> None:
    from bench.environment import environment
    from deploy_prune.files import write_json

    rows = [measure(name, steps, precision) for name in models]
    for row in rows:
        click.echo(f"{row['model']:12} plain {row['plain_ms']:8.1f} ms   spp {row['spp_ms']:8.1f} ms   "
                   f"ratio {row['ratio']:.3f} [{row['interval'][0]:.3f}, {row['interval'][1]:.3f}]   "
                   f"gate state {row['state_bytes'] / 1e6:.2f} MB, weights {row['weight_bytes'] / 1e6:.1f} MB")
    if out:
        write_json(out, {"rows": rows, "environment": environment()})


def measure(name: str, steps: int, precision: str) -> dict[str, Any]:
    """Milliseconds of a plain and of an SPP step on one model, and the ratio of their medians."""
    import torch

    from bench.stats import ratio_of_medians
    from deploy_prune.adapters import find_sites
    from deploy_prune.budget import CostModel
    from deploy_prune.methods.base import Context
    from deploy_prune.methods.spp import SppOptions, SppSearch

    model, task = _build(name)
    model.requires_grad_(False)
    sites = find_sites(model)
    inputs = next(iter(task.calibration(1))).inputs
    costs = CostModel.measure(model, sites, task.signature, inputs)
    context = Context(model, sites, costs, task, task.calibration_size, task.batch, precision, 0)  # type: ignore[arg-type]
    search = SppSearch(context, SppOptions(steps=10 * steps))
    first = model.get_submodule(sites[0].slices[next(iter(sites[0].counts))][0].module)
    times: dict[str, list[float]] = {"plain": [], "spp": []}
    generator = np.random.default_rng(0)
    for round_ in range(steps + 3):
        for kind in generator.permutation(["plain", "spp"]):
            index = round_ % len(search.batches)
            start = time.perf_counter()
            if kind == "spp":
                search.step(index)
            else:
                _plain_step(context, search, index, first)
            if round_ >= 3:
                times[str(kind)].append(1e3 * (time.perf_counter() - start))
    ratio, low, high = ratio_of_medians(np.array(times["spp"]), np.array(times["plain"]), seed=0)
    return {"model": name, "precision": precision, "batch": task.batch, "steps": steps,
            "plain_ms": float(np.median(times["plain"])), "spp_ms": float(np.median(times["spp"])),
            "ratio": ratio, "interval": [low, high], "raw_ms": times, "state_bytes": search.state_bytes(),
            "weight_bytes": sum(4 * p.numel() for p in model.parameters())}
