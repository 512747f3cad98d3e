"""What each precision costs and gains: quality, bytes, and CPU time against fp32, of the dense model and cut members.

    python -m bench.studies.precision distilbert-sst2 path.safetensors --sparsity .3 --out FILE.json

Makes a bundle with every precision (so all that a run proves is proved), then times the formats that ONNX Runtime's CPU
provider computes in, interleaved with the dense fp32 file. The clock is the CPU time of the process, on one thread: the
machine may do other work. Half precisions are not timed; their quality is that of the rounded graph (emulate.py).
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from deploy_prune.release.manifest import Manifest

PRECISIONS = "fp16,bf16,int8-dynamic,int8-static,int8-weight-only,int4-weight-only"


def described(bundle: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """Per member: file bytes, quality, its drop from the dense fp32 model with interval, parity and agreement."""
    from deploy_prune.release.scores import drop_from_dense

    rows = []
    for member in manifest.members:
        change = drop_from_dense(bundle, manifest, member)
        rows.append(
            {
                "name": member.name,
                "precision": member.precision,
                "bytes": member.bytes,
                "weight_bytes": member.weight_bytes,
                "quality": member.quality.model_dump(mode="json") if member.quality else None,
                "drop": None if change is None else [change.value, change.low, change.high],
                "parity": {k: v for k, v in member.parity.items() if k not in ("pairs", "quantized", "kept")},
                "kept": len(member.parity.get("kept", {})),
                "audit": member.audit["passed"] if member.audit else None,
                "seconds": member.seconds,
            }
        )
    return rows


def timed(bundle: Path, manifest: Manifest, batch: int, sequence: int, seconds: float) -> dict[str, Any]:
    """One cell: every file that ort-cpu computes in, against the dense fp32 file."""
    from bench.inputs import graph_inputs, has_sequence, make_inputs
    from bench.timing import measure
    from converters.precision.formats import runs

    files = {m.name: bundle / m.file for m in manifest.members if runs("ort-cpu", m.precision)}
    specs = graph_inputs(next(iter(files.values())))
    length = sequence if has_sequence(specs) else None
    sizes = {"batch": batch} | ({"sequence": length} if length else {})
    inputs = make_inputs(specs, batch=batch, sequence=length)
    clock = time.process_time_ns
    return measure(files, inputs, sizes=sizes, seconds=seconds, threads=1, clock=clock).to_json()


@click.command(help=__doc__)
@click.argument("recipe")
@click.argument("path", type=click.Path(path_type=Path, exists=True))
@click.option("--sparsity", default=".3", show_default=True)
@click.option("--batch", default="1,8", show_default=True)
@click.option("--sequence", type=int, default=128, show_default=True, help="Of text models.")
@click.option("--seconds", type=float, default=3.0, show_default=True)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A key of the recipe.")
@click.option("--keep-bundle", type=click.Path(path_type=Path), help="Leave the bundle there.")
@click.option("--out", type=click.Path(path_type=Path))
def main(
    recipe: str,
    path: Path,
    sparsity: str,
    batch: str,
    sequence: int,
    seconds: float,
    settings: tuple[str, ...],
    keep_bundle: Path | None,
    out: Path | None,
) -> None:
    from bench.environment import environment, package_versions
    from deploy_prune.files import write_json
    from deploy_prune.path import SolutionPath
    from deploy_prune.pipeline import run_recipe
    from deploy_prune.recipe import load_recipe
    from deploy_prune.release.manifest import MANIFEST, Manifest

    own = (f"family.sparsities=[{sparsity}]", f"precision.also=[{PRECISIONS}]", "bench.enabled=false")
    asked = load_recipe(recipe, [*own, "export.checkpoints=false", *settings])
    with tempfile.TemporaryDirectory(prefix="deploy-prune-precision-") as folder:
        bundle = keep_bundle or Path(folder) / "bundle"
        run_recipe(asked, bundle, mode="resume", path=SolutionPath.load(path), note=click.echo)
        manifest = Manifest.load(bundle / MANIFEST)
        result: dict[str, Any] = {
            "recipe": asked.portable(),
            "settings": list(settings),
            "clock": "cpu",
            "threads": 1,
            "members": described(bundle, manifest),
            "cells": [],
            "environment": environment(),
            "versions": package_versions(),
        }
        for size in map(int, batch.split(",")):
            result["cells"].append(timed(bundle, manifest, size, sequence, seconds))
            if out is not None:
                write_json(out, result)  # after every cell: a long study may be stopped
    for row in result["members"]:
        click.echo(f"{row['name']:22} {row['bytes']:>12,} {row['quality'] and row['quality']['value']} {row['drop']}")
    for cell in result["cells"]:
        for line in cell["latencies"]:
            ratio = line["ratio"]
            click.echo(
                f"{cell['batch']} {line['name']:22} {ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
            )


if __name__ == "__main__":
    main()
