"""What every layer keeps along a path, as data, as rows for people and as a plot; for paths of any search."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_prune.errors import UnavailableError, UsageError
from deploy_prune.files import atomic_file

if TYPE_CHECKING:
    from deploy_prune.path import SolutionPath


def layer_table(path: SolutionPath, sparsities: Sequence[float]) -> list[dict[str, Any]]:
    """One entry per layer (site), in model order:
    {"site", "units": {"head": 3, "qk": 64}, "importance" (where the search measured one),
     "at": [{"sparsity": 0.3, "kept": {"head": 2, "qk": 40}, "gone": 0.41}]}

    qk and vo are counted per head; "gone" is the share of the layer's prunable parameters. Raises UsageError or
    BudgetError for a sparsity that the path does not reach.
    """
    measured = dict(path.options.get("found", {})).get("layers", {})
    counts = {sparsity: path.plan(sparsity).counts(path.sites) for sparsity in sparsities}
    rows = []
    for site in path.sites:
        dense = path.costs.params_of([site], {site.name: site.counts})
        prunable = path.costs.prunable([site])
        rows.append(
            {
                "site": site.name,
                "units": {kind.value: n for kind, n in site.counts.items()},
                **({"importance": measured[site.name]["importance"]} if site.name in measured else {}),
                "at": [
                    {
                        "sparsity": sparsity,
                        "kept": {kind.value: n for kind, n in own[site.name].items()},
                        "gone": (dense - path.costs.params_of([site], own)) / prunable,
                    }
                    for sparsity, own in counts.items()
                ],
            }
        )
    return rows


def text_rows(table: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """`layer_table` for a terminal: what every layer has, and keeps at each sparsity."""
    return [
        {
            "site": row["site"],
            **({"importance": f"{row['importance']:.3f}"} if "importance" in row else {}),
            "dense": _widths(row["units"]),
            **{f"kept at {at['sparsity']:g}": _widths(at["kept"]) for at in row["at"]},
            **{f"gone at {at['sparsity']:g}": f"{at['gone']:.0%}" for at in row["at"]},
        }
        for row in table
    ]


def plot_layers(table: Sequence[dict[str, Any]], file: Path, title: str) -> None:
    """Draw the share of its parameters that every layer has lost at each sparsity. Raises UnavailableError."""
    pyplot = drawing()
    names = [row["site"] for row in table]
    figure, axis = pyplot.subplots(figsize=(max(6.0, 0.35 * len(names)), 4.5))
    for i, at in enumerate(table[0]["at"]):
        gone = [row["at"][i]["gone"] for row in table]
        axis.plot(range(len(names)), gone, marker="o", label=f"{at['sparsity']:g} of all")
    if "importance" in table[0]:
        axis.bar(range(len(names)), [row["importance"] for row in table], color="0.88", label="importance", zorder=0)
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axis.set_ylabel("share of the layer's parameters removed")
    axis.set_ylim(-0.02, 1.02)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    axis.set_title(title)
    save_figure(figure, file)


def drawing() -> Any:
    """matplotlib's pyplot, drawing into files. Raises UnavailableError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UnavailableError(
            "plots need the package matplotlib", where="--plot", remedy="pip install 'deploy-prune[report]'"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure: Any, file: Path) -> None:
    """Write a figure in the format that its suffix names, atomically, and close it."""
    if file.suffix.lstrip(".") not in figure.canvas.get_supported_filetypes():
        raise UsageError("not a format for plots", got=str(file), expected="FILE.png, .svg or .pdf")
    figure.tight_layout()
    with atomic_file(file) as temporary:
        figure.savefig(temporary, dpi=110, metadata={"Software": None} if file.suffix == ".png" else None)
    drawing().close(figure)


def _widths(counts: dict[str, int]) -> str:
    return " ".join(f"{kind} {n}" for kind, n in counts.items())
