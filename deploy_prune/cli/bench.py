"""`deploy-prune bench`: time the models of a bundle, or loose ONNX files, against each other."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deploy_prune.cli.latency_tables import explain, show, show_reasons, sizes_text
from deploy_prune.cli.timed_models import find_models, uncomputed
from deploy_prune.errors import UnavailableError, UsageError
from deploy_prune.latency.place import DEFAULT_SEQUENCE

if TYPE_CHECKING:
    from bench.report import LatencyReport
    from bench.runtimes import Runtime


@click.command("bench")
@click.argument("models", nargs=-1, required=True, metavar="BUNDLE|MODEL.onnx...")
@click.option(
    "--runtime",
    "runtimes",
    default="ort-cpu",
    show_default=True,
    metavar="NAME,...",
    help="Where to run: ort-cpu, ort-cuda, ort-cuda-graph, ort-tensorrt, openvino, torch-cpu, torch-cuda, "
    "torch-compile. `deploy-prune doctor` says which work here.",
)
@click.option("--batch", "batches", default="1", show_default=True, metavar="N,...", help="Examples per call.")
@click.option(
    "--seq",
    "sequences",
    metavar="N,...",
    help=f"Tokens per example, for models that take a sequence.  [default: {DEFAULT_SEQUENCE}; with --past: 1]",
)
@click.option(
    "--past",
    "pasts",
    metavar="N,...",
    help="Decoders with a cache: time new tokens, one per text unless --seq says how many, on caches of N tokens; "
    "0 times a prompt.",
)
@click.option("--threads", type=int, metavar="N", help="CPU threads per model.  [default: every physical core]")
@click.option(
    "--seconds",
    type=float,
    default=3.0,
    show_default=True,
    metavar="S",
    help="About how long each model is timed in each cell of the table.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of inputs and order.")
@click.option("--trust-code", is_flag=True, help="Torch runtimes may load python: models, which runs their code.")
@click.option("--why", is_flag=True, help="Measure the device's ceilings and say why a model is slower or no faster.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON on stdout.")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Also write the report with every raw timing to FILE, as JSON.",
)
def command(
    models: tuple[str, ...],
    runtimes: str,
    batches: str,
    sequences: str | None,
    pasts: str | None,
    threads: int | None,
    seconds: float,
    seed: int,
    trust_code: bool,
    why: bool,
    as_json: bool,
    output: Path | None,
) -> None:
    """Time ONNX models against each other in one process, interleaved in random order.

    The first file (in a bundle: its dense model) is the baseline. It is timed in two sessions; where these differ
    measurably and by more than 2 %, or too little is known to tell, the machine was too restless and the cell is marked
    as untrusted. Models in a precision that a runtime
    does not compute in are left out there.
    """
    from bench.environment import environment
    from bench.inputs import check_positions, graph_inputs, has_sequence
    from bench.timing import Cell, measure_cells
    from converters.precision.formats import check_steps
    from deploy_prune.cli import console

    if threads is not None and threads < 1:
        raise UsageError("--threads must be at least 1", got=str(threads))
    if not 0 < seconds < float("inf"):
        raise UsageError("--seconds must be positive", got=str(seconds))
    batch_sizes = counts("--batch", batches)
    files = find_models(models, decoders=pasts is not None)
    baseline = next(iter(files))
    chosen = _runtimes(runtimes, trust_code)
    if pasts is not None:
        check_steps(runtime.name for runtime in chosen)
    left_out = uncomputed(files, [runtime.name for runtime in chosen], steps=pasts is not None)
    if output is not None:
        _refuse_unwritable(output)

    wanted = {baseline}
    if pasts is not None:
        wanted |= {name for name in files for runtime in chosen if name not in left_out.get(runtime.name, {})}
    specs = {name: graph_inputs(files[name]) for name in files if name in wanted}
    lengths: Sequence[int | None] = [None]
    if sequences is not None:
        lengths = counts("--seq", sequences)
    elif pasts is None and has_sequence(specs[baseline]):
        lengths = [DEFAULT_SEQUENCE]
    # Made and tried with the baseline before anything is timed: a bad size must not show after minutes of work.
    if pasts is not None:
        held = counts("--past", pasts, least=0)
        check_positions(files[baseline], max(held) + max(length or 1 for length in lengths))
        cells = [
            Cell.step(specs, batch, past, seed, sequence=length or 1)
            for batch in batch_sizes
            for length in lengths
            for past in held
        ]
    else:
        cells = [Cell.made(specs[baseline], batch, length, seed) for batch in batch_sizes for length in lengths]
    for runtime in chosen:
        session = runtime.load(files[baseline], threads=threads)
        for cell in cells:
            session.bind(cell.of(baseline))
    del session

    reports, explained = [], []
    for runtime in chosen:
        out = left_out.get(runtime.name, {})
        timed = {name: file for name, file in files.items() if name not in out}
        if out:
            (console.note if as_json else print)(_left_out_line(runtime.name, out))
        console.note(f"{runtime.name}: {len(timed)} models, {' and '.join(sizes_text(cell.named()) for cell in cells)}")
        found = measure_cells(
            timed,
            cells,
            runtime=runtime,
            seconds=seconds,
            threads=threads,
            seed=seed,
            progress=console.progress(),
        )
        reports += found
        for cell, report in zip(cells, found, strict=True):
            if not as_json:
                show(report)
            if why:
                reasons = explain(report, timed, cell, runtime, threads)
                explained.append(reasons)
                if not as_json:
                    show_reasons(reasons)
    if output is not None:
        _write(output, reports)
    if as_json:
        console.emit_json(
            {
                "_type": "bench",
                "_version": 1,
                "environment": environment(),
                "cells": [report.to_json() for report in reports],
                "left_out": left_out,
                **({"rooflines": explained} if why else {}),
            }
        )


def counts(option: str, text: str, *, least: int = 1) -> list[int]:
    """`"1,8"` -> [1, 8]. Raises UsageError unless every part is a whole number of at least `least`, given once."""
    parts = [part.strip() for part in text.split(",")]
    wrong = [part or "nothing" for part in parts if not (part.isascii() and part.isdigit() and int(part) >= least)]
    if wrong or len(set(map(int, parts))) < len(parts):
        raise UsageError(
            f"{option} takes different whole numbers of at least {least}, separated by commas",
            expected="1,8,32",
            got=text,
        )
    return [int(part) for part in parts]


def _runtimes(text: str, trust_code: bool) -> list[Runtime]:
    from bench.runtimes import get_runtime

    names = list(dict.fromkeys(part.strip() for part in text.split(",")))
    return [get_runtime(name, trust_code=trust_code) for name in names]


def _left_out_line(runtime: str, models: Mapping[str, str]) -> str:
    """`ort-cpu does not compute in bf16: dense.bf16, s50.bf16 left out.`"""
    precisions = ", ".join(dict.fromkeys(models.values()))
    return f"{runtime} does not compute in {precisions}: {', '.join(models)} left out."


def _refuse_unwritable(output: Path) -> None:
    folder = output.parent
    while not folder.exists():
        folder = folder.parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise UnavailableError(
            "cannot write there",
            where=str(output),
            got=f"{folder} is not a writable directory",
            remedy="Choose another file for -o.",
        )


def _write(output: Path, reports: Sequence[LatencyReport]) -> None:
    from bench.samples import compact
    from deploy_prune.files import atomic_file

    cells: list[dict[str, Any]] = [{**report.to_json(), "samples": report.samples.to_json()} for report in reports]
    with atomic_file(output) as temporary:
        temporary.write_text(compact({"_type": "bench", "_version": 1, "cells": cells}), encoding="utf-8")
