"""How long an export takes, against torch's own exporter and against decomposing every program first.

    python -m bench.studies.export_time vit-tiny-imagenet --out FILE.json

`ours` is `export_onnx` whole: trace, graph passes, check and file. `decomposed` is the same where every program is
decomposed, as torch.onnx.export does, with our translations. `torch` is torch.onnx.export with dynamo and its
optimisation, to a file. Each is done once unmeasured and then `--repeats` times, in turn; the figures are medians of
CPU seconds of the process.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from torch import nn

    from deploy_prune.signature import Signature

OPSET = 20


@click.command(help=__doc__)
@click.argument("recipes", nargs=-1, required=True)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures here as JSON.")
def main(recipes: tuple[str, ...], repeats: int, out: Path | None) -> None:
    from bench.environment import environment
    from deploy_prune.files import write_json
    from deploy_prune.pipeline.setup import prepare
    from deploy_prune.recipe import load_recipe

    rows = {}
    for name in recipes:
        setup = prepare(load_recipe(name))
        rows[name] = row = measure(setup.model.eval(), setup.task.signature, repeats)
        click.echo(f"{name}: " + "  ".join(f"{way} {found['median']:.1f} s" for way, found in row.items()))
    if out:
        write_json(out, {"rows": rows, "repeats": repeats, "opset": OPSET, "environment": environment()})


def measure(model: nn.Module, signature: Signature, repeats: int) -> dict[str, Any]:
    """CPU seconds of each way, all of them and the median."""
    with tempfile.TemporaryDirectory() as room:
        file = Path(room) / "model.onnx"
        ways: dict[str, Callable[[], None]] = {
            "ours": lambda: _ours(model, signature, file),
            "decomposed": lambda: _decomposed(model, signature, file),
            "torch": lambda: _torch(model, signature, file),
        }
        for way in ways.values():
            way()
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeats):
            for name, way in ways.items():
                began = time.process_time()
                way()
                seconds[name].append(round(time.process_time() - began, 2))
    return {name: {"median": median(found), "seconds": found} for name, found in seconds.items()}


def _ours(model: nn.Module, signature: Signature, file: Path) -> None:
    from converters.onnx_export import export_onnx

    export_onnx(model, file, signature, opset=OPSET, variant="standard")


def _decomposed(model: nn.Module, signature: Signature, file: Path) -> None:
    from converters import tracing

    real = tracing._decomposes
    tracing._decomposes = lambda *_: True
    try:
        _ours(model, signature, file)
    finally:
        tracing._decomposes = real


def _torch(model: nn.Module, signature: Signature, file: Path) -> None:
    import torch

    from converters.onnx_export import EXAMPLE_SIZES
    from converters.tracing import as_module, dynamic_shapes

    inputs = signature.random_inputs(EXAMPLE_SIZES, seed=0)
    torch.onnx.export(
        as_module(model, signature),
        tuple(inputs[spec.name] for spec in signature.inputs),
        file,
        dynamo=True,
        opset_version=OPSET,
        dynamic_shapes=dynamic_shapes(signature),
        external_data=False,
        verbose=False,
    )


if __name__ == "__main__":
    main()
