"""Refitted plans of one path judged on a recipe's evaluation data, with values per row for paired comparisons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from deploy_prune.path import SolutionPath
    from deploy_prune.pipeline.setup import Setup
    from deploy_prune.plan import PrunePlan


def judge_all(
    setup: Setup, path: SolutionPath, moments: Any, plans: Mapping[str, PrunePlan], limit: int | None
) -> dict[str, Any]:
    """Metric, loss and distance to dense of every refitted plan on the evaluation data, and their values per row;
    `metric` is its name."""
    import numpy as np
    import torch

    from converters.surgery import compact
    from deploy_prune.pipeline import making

    task = setup.task
    batches = list(task.evaluation(16, limit))

    def outputs(model: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            return [task.signature.call(model.eval(), batch.inputs).float() for batch in batches]

    dense = outputs(setup.model)
    figures: dict[str, Any] = {}
    rows: dict[str, dict[str, np.ndarray]] = {}
    for name, plan in {"dense": None, **plans}.items():
        found = dense
        if plan is not None:
            weights = making.planned_weights(setup, plan, moments, path.basis)
            found = outputs(compact(weights, plan, inplace=True, check_weights=False))
        replay = iter(found)
        quality = task.evaluate(lambda _, replay=replay: next(replay), batches=batches)  # type: ignore[misc]
        rows[name] = {
            "metric": np.asarray(quality.per_example, np.float64),
            "loss": _rows(task.loss(o, b) for o, b in zip(found, batches, strict=True)),
            "distance": _rows(task.distance(o, d, b) for o, d, b in zip(found, dense, batches, strict=True)),
        }
        figures[name] = {
            **quality.to_json(),
            "loss": float(rows[name]["loss"].mean()),
            "distance": float(rows[name]["distance"].mean()),
        }
        click.echo(f"{name}: {quality.metric} {quality.value:.4f}, loss {figures[name]['loss']:.4f}", err=True)
    return {"metric": quality.metric, "figures": figures, "rows": rows}


def difference(ours: np.ndarray, rival: np.ndarray, names: tuple[str, str] = ("ours", "rival")) -> dict[str, float]:
    """Means under their names, their difference and its 95 % interval, a bootstrap over rows."""
    import numpy as np

    each = ours - rival
    generator = np.random.default_rng(0)
    means = each[generator.integers(0, len(each), (2000, len(each)))].mean(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return {
        names[0]: float(ours.mean()),
        names[1]: float(rival.mean()),
        "difference": float(each.mean()),
        "low": float(low),
        "high": float(high),
    }


def metric_difference(
    metric: str, ours: np.ndarray, rival: np.ndarray, names: tuple[str, str] = ("ours", "rival")
) -> dict[str, Any]:
    """As `difference`, of a metric that races know: in points, of perplexity in nats, higher is better."""
    from bench.studies.race_analysis import SCORES, paired_rows

    if metric not in SCORES:
        if ours.ndim > 1:  # so many of so many, of every text
            ours, rival = (rows[:, 0] / rows[:, 1] for rows in (ours, rival))
        return difference(ours, rival, names)
    score, unit = SCORES[metric]
    apart = paired_rows(metric, rival, ours)
    return {
        "unit": unit,
        names[0]: score(ours),
        names[1]: score(rival),
        "difference": apart.value,
        "low": apart.low,
        "high": apart.high,
    }


def _rows(parts: Any) -> np.ndarray:
    import torch

    return torch.cat([part.detach().flatten() for part in parts]).double().numpy()
