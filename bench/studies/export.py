"""Our graphs against those of other exporters and optimisers, of the same dense model, timed in one run.

    python -m bench.studies.export vit-tiny-imagenet --batch 1,8 --threads 1 --clock cpu --macs .5 --out FILE.json

Ours: `standard`, `ort` and `plain` (converters/variants.py), and with --macs .5 members of align 8 at that share of the
dense model's multiplications, cut by weight magnitude (which units leave does not matter for time). Theirs: torch.onnx
with dynamo at opset 18 and 23, the exporter before it at opset 17, ONNX Runtime's transformers optimizer, onnxslim and
onnxsim on top. Each file's largest error against torch is noted beside its time; a file that does not run at a batch
other than the traced one, or is further off than `WRONG`, is not timed but listed with what is wrong. `not_needed` is
the share of our faster form's time, by ONNX Runtime's profile, in nodes that only move data or make shapes and masks:
what a better graph could still save.
`--clock cpu` counts the CPU time of the process instead of the time on the wall, which on a machine that does other
work is far steadier; it makes sense with one thread only. `--keep` leaves the files for another run, which does not
make them again: for other cells of the same model by the same code.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from torch import nn

    from bench.report import LatencyReport
    from deploy_prune.pipeline.setup import Setup
    from deploy_prune.signature import Signature

OURS = ("standard", "ort", "plain")
WRONG = 1e-2  # of the largest output: no rounding
# What no form of the graph can leave out. All else moves data, or makes shapes and masks.
NEEDED = (
    *("Gemm", "MatMul", "FusedMatMul", "FusedGemm", "Conv", "Attention", "MultiHeadAttention", "Softmax", "Add", "Mul"),
    *("Gelu", "QuickGelu", "LayerNormalization", "SimplifiedLayerNormalization", "RotaryEmbedding"),
)


class Work:
    """One model with its folder of files; what could not be made is kept with the reason."""

    def __init__(self, model: nn.Module, signature: Signature, folder: Path, skipped: Collection[str] = ()) -> None:
        self.model, self.signature, self.folder, self.skipped = model, signature, folder, skipped
        self.files: dict[str, Path] = {}
        self.failed: dict[str, str] = {}

    def make(self, name: str, write: Callable[[Path], None]) -> None:
        if name in self.skipped:
            return
        file = self.folder / f"{name}.onnx"
        if file.exists():
            self.files[name] = file
            return
        try:
            write(file)
        except Exception as error:  # of other tools; what they raise is theirs to choose
            self.failed[name] = f"{type(error).__name__}: {str(error).strip()[:300]}"
        else:
            self.files[name] = file

    def sizes(self) -> dict[str, int]:
        return {"batch": 2, "sequence": 11}


def ours(work: Work) -> None:
    for variant in OURS:
        work.make(variant, partial(_write, work.model, work.signature, variant))


def _write(model: nn.Module, signature: Signature, variant: str, file: Path) -> None:
    from converters.onnx_export import export_onnx

    export_onnx(model, file, signature, opset=20, variant=variant)  # type: ignore[arg-type]


def torch_exporters(work: Work) -> None:
    """torch.onnx.export as its documentation says."""
    import torch

    from converters.tracing import as_module, dynamic_shapes

    function = as_module(work.model, work.signature)
    inputs = work.signature.random_inputs(work.sizes(), seed=0)
    names, out = list(inputs), work.signature.output
    axes = {s.name: {i: d for i, d in enumerate(s.shape) if isinstance(d, str)} for s in work.signature.inputs}

    def dynamo(opset: int, file: Path) -> None:
        made = torch.onnx.export(
            function,
            tuple(inputs.values()),
            dynamo=True,
            opset_version=opset,
            input_names=names,
            output_names=[out.name],
            dynamic_shapes=dynamic_shapes(work.signature),
            verbose=False,
        )
        assert made is not None
        made.save(str(file))

    def before(file: Path) -> None:
        torch.onnx.export(
            function,
            tuple(inputs.values()),
            str(file),
            dynamo=False,
            opset_version=17,
            input_names=names,
            output_names=[out.name],
            dynamic_axes={**axes, out.name: {i: d for i, d in enumerate(out.shape) if isinstance(d, str)}},
        )

    with torch.no_grad():
        work.make("torchscript-17", before)
        for opset in (18, 23):
            work.make(f"dynamo-{opset}", partial(dynamo, opset))


def optimisers(work: Work) -> None:
    """Each on the files of the exporters that it was made for."""
    from deploy_prune.adapters import find_sites
    from deploy_prune.units import UnitKind

    heads = next(site.counts[UnitKind.HEAD] for site in find_sites(work.model) if UnitKind.HEAD in site.counts)
    config: Any = getattr(work.model, "config", None)
    hidden = config.hidden_size if config is not None else work.model.embed_dim
    kind = "vit" if config is None else {"llama": "gpt2"}.get(config.model_type, "bert")

    def ort_optimizer(source: Path, file: Path) -> None:
        from onnxruntime.transformers import optimizer

        made = optimizer.optimize_model(str(source), model_type=kind, num_heads=heads, hidden_size=hidden)
        made.save_model_to_file(str(file))

    def slim(source: Path, file: Path) -> None:
        import onnxslim

        onnxslim.slim(str(source), str(file))

    def simplify(source: Path, file: Path) -> None:
        import onnx
        import onnxsim

        onnx.save(onnxsim.simplify(str(source))[0], str(file))

    for name in ("torchscript-17", "dynamo-18"):
        if name in work.files:
            work.make(f"ort-optimizer on {name}", partial(ort_optimizer, work.files[name]))
    if "dynamo-18" in work.files:
        work.make("onnxslim on dynamo-18", partial(slim, work.files["dynamo-18"]))
        work.make("onnxsim on dynamo-18", partial(simplify, work.files["dynamo-18"]))


def members(work: Work, setup: Setup, share: float) -> None:
    """Members at `share` of the dense multiplications, widths at multiples of 8, in our two forms."""
    from converters.surgery import compact
    from deploy_prune.methods import search

    path = search(setup.model, setup.task, "magnitude", basis="own")
    plan = path.plan(budget="macs", value=share, align=8)
    small = compact(setup.model, plan, check_weights=False)
    for variant in ("standard", "ort"):
        work.make(f"{variant} at {share:g} MACs", partial(_write, small, work.signature, variant))


def errors(work: Work) -> dict[str, float]:
    """Largest error against torch of every file of the dense model, relative to the largest output, at a batch of 3;
    a file that is wrong there, or does not run, is no longer one of the study's."""
    import torch

    from converters.comparison import compare
    from converters.onnx_session import OnnxSession
    from deploy_prune.errors import ArtifactError

    inputs = work.signature.random_inputs({"batch": 3, "sequence": 17}, seed=1)
    with torch.no_grad():
        expected = work.signature.call(work.model, inputs).numpy()
    arrays = {name: value.numpy() for name, value in inputs.items()}
    found: dict[str, float] = {}
    for name, file in list(work.files.items()):
        if name.endswith("MACs"):
            continue
        try:
            found[name] = compare(expected, OnnxSession(file).run(arrays), tolerance=WRONG).error
        except ArtifactError as error:
            work.failed[name] = f"does not run: {str(error.got)[:300]}"
        else:
            if found[name] <= WRONG:
                continue
            work.failed[name] = f"wrong: error {found[name]:.1e}"
        del work.files[name]
    return found


def verdict(report: LatencyReport, rivals: list[str]) -> dict[str, Any]:
    """How much faster our best form is than the fastest file of others, and members than our best dense form."""
    times = {latency.name: latency.p50_ms for latency in report.latencies}
    best = min(("standard", "ort"), key=lambda name: times.get(name, float("inf")))
    rival = min(rivals, key=lambda name: times[name])
    small = {name: round(times[best] / t, 3) for name, t in times.items() if name.endswith("MACs")}
    return {"ours": best, "rival": rival, "speedup": round(times[rival] / times[best], 3), "members": small}


@click.command(help=__doc__)
@click.argument("recipe")
@click.option("--batch", default="1,8", show_default=True)
@click.option("--sequence", type=int, default=128, show_default=True, help="Of text models.")
@click.option("--seconds", type=float, default=3.0, show_default=True)
@click.option("--threads", type=int)
@click.option("--clock", type=click.Choice(["wall", "cpu"]), default="wall", show_default=True)
@click.option("--sessions", type=int, default=5, show_default=True, help="How often every file is loaded.")
@click.option("--rounds", type=int, help="Rounds a session, for models whose calls take seconds.")
@click.option("--keep", type=click.Path(path_type=Path, file_okay=False), help="Leave the files in this directory.")
@click.option("--skip", multiple=True, metavar="NAME", help="A file not to make, for want of memory or time.")
@click.option("--macs", type=float, help="Also time members at this share of the multiplications.")
@click.option("--out", type=click.Path(path_type=Path))
def main(
    recipe: str,
    batch: str,
    sequence: int,
    seconds: float,
    threads: int | None,
    clock: str,
    sessions: int,
    rounds: int | None,
    keep: Path | None,
    skip: tuple[str, ...],
    macs: float | None,
    out: Path | None,
) -> None:
    from bench.environment import environment, package_versions
    from bench.inputs import graph_inputs, has_sequence, make_inputs
    from bench.stats import written
    from bench.timing import measure
    from bench.work import time_by_operator
    from deploy_prune.files import write_json
    from deploy_prune.pipeline.setup import prepare
    from deploy_prune.recipe import load_recipe

    if clock == "cpu" and threads != 1:
        raise click.UsageError("--clock cpu adds up the time of all threads: give --threads 1")
    setup = prepare(load_recipe(recipe))
    with tempfile.TemporaryDirectory(prefix="deploy-prune-export-") as folder:
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
        work = Work(setup.model.eval(), setup.task.signature, keep or Path(folder), skip)
        for make in (ours, torch_exporters, optimisers):
            make(work)
            click.echo(f"{make.__name__}: {', '.join(work.files)}; failed: {work.failed or 'none'}")
        wrong = errors(work)
        click.echo(f"errors: {wrong}; failed: {work.failed or 'none'}")
        rivals = [name for name in work.files if name not in OURS]
        if macs is not None:
            members(work, setup, macs)
        specs = graph_inputs(work.files["standard"])
        cells = []
        for size in map(int, batch.split(",")):
            length = sequence if has_sequence(specs) else None
            sizes = {"batch": size} | ({"sequence": length} if length else {})
            inputs = make_inputs(specs, batch=size, sequence=length)
            report = measure(
                work.files,
                inputs,
                sizes=sizes,
                seconds=seconds,
                sessions=sessions,
                rounds=rounds,
                threads=threads,
                clock=time.process_time_ns if clock == "cpu" else time.perf_counter_ns,
            )
            found = verdict(report, rivals)
            spent = time_by_operator(work.files[found["ours"]], inputs)
            found["not_needed"] = round(1 - sum(spent.get(op, 0.0) for op in NEEDED) / sum(spent.values()), 4)
            for latency in report.latencies:
                click.echo(f"  {sizes} {latency.name:32} {latency.p50_ms:9.2f} ms  {written(latency.ratio)}")
            click.echo(f"  {found}")
            cells.append({**report.to_json(), "verdict": found, "time_by_operator_ms": spent})
            result: Mapping[str, Any] = {
                "recipe": recipe,
                "clock": clock,
                "threads": threads,
                "errors": wrong,
                "skipped": list(skip),
                "failed": work.failed,
                "cells": cells,
                "environment": environment(),
                "versions": package_versions(),
            }
            if out is not None:
                write_json(out, result)  # after every cell: a long study may be stopped


if __name__ == "__main__":
    main()
