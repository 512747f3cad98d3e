"""What a further member of a family costs, as a share of the one search it shares.

    deploy-prune run vit-tiny-imagenet --out runs/vit --set export.checkpoints=false
    python -m bench.studies.family_cost runs/vit --out bench/results/family_cost_vit_tiny.json

A member's cost is its plan, refit, surgery, export and parity, as the run that made the bundle timed them; judging its
quality on the evaluation data is listed apart. The search is the path alone; moments for the refit are listed apart.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import click

COUNTED = ("plan", "refit", "surgery", "export", "parity")


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures here as JSON.")
def main(bundle: Path, out: Path | None) -> None:
    from deploy_prune.files import write_json
    from deploy_prune.release.manifest import Manifest

    figures = costs(Manifest.load(bundle / "manifest.json"))
    for row in figures["members"]:
        click.echo(f"{row['name']:8} {row['counted']:6.2f} s   {row['share']:.1%} of the search")
    click.echo(
        f"search {figures['search']:.1f} s, moments {figures['moments']:.1f} s; "
        f"a member costs {figures['median_share']:.1%} (median), {figures['largest_share']:.1%} (largest)"
    )
    if out:
        write_json(out, figures)


def costs(manifest: Any) -> dict[str, Any]:
    """Seconds by step for every member but dense, and their share of the search's seconds."""
    search = manifest.seconds["path"]
    rows = []
    for member in manifest.members:
        if member.name == "dense":
            continue
        counted = sum(member.seconds.get(step, 0.0) for step in COUNTED)
        rows.append({"name": member.name, "seconds": member.seconds, "counted": counted, "share": counted / search})
    shares = [row["share"] for row in rows]
    return {
        "recipe": manifest.recipe,
        "search": search,
        "moments": manifest.seconds.get("moments", 0.0),
        "members": rows,
        "median_share": median(shares),
        "largest_share": max(shares),
        "environment": manifest.environment,
        "versions": manifest.versions,
    }


if __name__ == "__main__":
    main()
