"""`deploy-prune bench`: time the models of a bundle, or loose ONNX files, against each other."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deploy_prune.errors import ArtifactError, UnavailableError, UsageError

if TYPE_CHECKING:
    from bench.report import LatencyReport
    from bench.runtimes import Runtime
    from bench.timing import Cell

DEFAULT_SEQUENCE = 128
BASELINE = "dense"
COLUMNS = ("model", "p50 ms", "p90 ms", "p99 ms", "examples/s", "time / dense [95 %]", "speed-up", "verdict")


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
    help=f"Tokens per example, for models that take a sequence.  [default: {DEFAULT_SEQUENCE}]",
)
@click.option(
    "--past",
    "pasts",
    metavar="N,...",
    help="Decoders with a cache: time one new token per text on caches of N tokens.",
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
    from bench.inputs import graph_inputs, has_sequence
    from bench.timing import Cell, measure_cells
    from converters.precision.formats import check_steps
    from deploy_prune.cli import console

    if threads is not None and threads < 1:
        raise UsageError("--threads must be at least 1", got=str(threads))
    if not 0 < seconds < float("inf"):
        raise UsageError("--seconds must be positive", got=str(seconds))
    batch_sizes = counts("--batch", batches)
    if pasts is not None and sequences is not None:
        raise UsageError("--past times one new token, --seq a whole text", remedy="Give one of them.")
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
    elif has_sequence(specs[baseline]):
        lengths = [DEFAULT_SEQUENCE]
    # Made and tried with the baseline before anything is timed: a bad size must not show after minutes of work.
    if pasts is not None:
        cells = [Cell.step(specs, batch, past, seed) for batch in batch_sizes for past in counts("--past", pasts)]
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
        console.note(f"{runtime.name}: {len(timed)} models, {' and '.join(_sizes(cell.named()) for cell in cells)}")
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


def find_models(arguments: Sequence[str], *, decoders: bool = False) -> dict[str, Path]:
    """Name -> ONNX file, the baseline first; of a bundle its models, or its `decoders` with a cache. Raises UsageError,
    UnavailableError or ArtifactError."""
    from deploy_prune.files import existing

    paths = [existing(argument, "bundle or ONNX file") for argument in arguments]
    directories = [path for path in paths if path.is_dir()]
    if not directories:
        return _name(paths)
    if len(paths) > 1:
        raise UsageError(
            "a bundle is timed alone",
            got=", ".join(arguments),
            remedy="Give one bundle, or the ONNX files themselves: BUNDLE/models/*.onnx.",
        )
    files = _bundle_models(directories[0], decoders)
    if BASELINE not in files:
        raise UsageError(
            f"the bundle has no dense {'decoder with a cache' if decoders else 'model'} to compare with",
            where=arguments[0],
            expected=f"decoders/{BASELINE}/model.onnx" if decoders else f"models/{BASELINE}.onnx",
            got=", ".join(files) or "no models",
            remedy="Make it again with --set export.cache=true."
            if decoders and not files
            else "Give the ONNX files themselves; the first one is the baseline.",
        )
    return {BASELINE: files.pop(BASELINE), **files}


def uncomputed(files: Mapping[str, Path], runtimes: Sequence[str], *, steps: bool = False) -> dict[str, dict[str, str]]:
    """Runtime -> model -> its precision, of those that the runtime does not compute in: their time would say nothing.
    `steps`: of decoders, whose caches are made up.

    Raises UsageError when that is the baseline, the first of `files`; ArtifactError for a file that is not ONNX.
    """
    from converters.precision.formats import RUNS, runs, steps_run
    from converters.precision.given import precision_of

    computes = steps_run if steps else runs
    precisions = {name: precision_of(file) for name, file in files.items()}
    found = {}
    for runtime in runtimes:
        others = {name: precision for name, precision in precisions.items() if not computes(runtime, precision)}
        if (baseline := next(iter(files))) in others:
            able = [other for other in RUNS if computes(other, others[baseline])]
            raise UsageError(
                "the baseline is in a precision that the runtime does not compute in",
                where=baseline,
                got=f"{others[baseline]} for {runtime}",
                remedy=f"Give an fp32 file first, or choose a runtime that does: {', '.join(able) or 'none here'}.",
            )
        if others:
            found[runtime] = others
    return found


def counts(option: str, text: str) -> list[int]:
    """`"1,8"` -> [1, 8]. Raises UsageError unless every part is a whole number of at least 1, given once."""
    parts = [part.strip() for part in text.split(",")]
    wrong = [part or "nothing" for part in parts if not (part.isascii() and part.isdigit() and int(part) > 0)]
    if wrong or len(set(map(int, parts))) < len(parts):
        raise UsageError(
            f"{option} takes different whole numbers of at least 1, separated by commas", expected="1,8,32", got=text
        )
    return [int(part) for part in parts]


def show(report: LatencyReport) -> None:
    """One cell of the table on stdout."""
    from bench.stats import written
    from deploy_prune.cli import console

    head = report.to_json()
    rows = []
    for latency in report.latencies:
        first = latency is report.latencies[0]
        rows.append(
            [
                latency.name,
                *(f"{ms:.3f}" for ms in (latency.p50_ms, latency.p90_ms, latency.p99_ms)),
                f"{latency.throughput:.1f}",
                *(
                    ("", "", "baseline")
                    if first
                    else (
                        written(latency.ratio),
                        f"{latency.speedup:.2f}x",
                        latency.verdict + ("" if report.trusted else " (untrusted)"),
                    )
                ),
            ]
        )
    console.table(COLUMNS, rows, title=f"{head['runtime']} on {head['device']}, {_sizes(report.samples.sizes)}")
    check = written(report.self_check)
    if report.trusted:
        print(f"Self-check passed: the baseline against itself is {check}.")
    else:
        print(
            f"Self-check FAILED: the baseline against itself is {check}. Do not trust this cell: measure again, "
            "longer (--seconds) or on a quieter machine."
        )
    others = report.samples.environment.get("contention", {}).get("others_cores")
    if others is not None:
        print(f"Other processes used {others:g} cores meanwhile.")
    if unsettled := [latency.name for latency in report.latencies if not latency.stable]:
        print(f"Not settled after warm-up: {', '.join(unsettled)}.")
    print()


def explain(
    report: LatencyReport, files: dict[str, Path], cell: Cell, runtime: Runtime, threads: int | None
) -> dict[str, Any]:
    """Ceilings of the runtime, what every model does in a call and which share of its time that takes at them, and why
    those that are not faster are not. Raises UnavailableError for runtimes that run no ONNX files."""
    from bench.roofline import measure_ceilings, reasons
    from bench.work import work_of

    ceilings = measure_ceilings(runtime, threads=threads)
    works = {name: work_of(file, cell.of(name)) for name, file in files.items()}
    dense = works[report.latencies[0].name]
    models = {}
    for name, work in works.items():
        seconds = report[name].p50_ms / 1e3
        flat = report[name].verdict != "faster" and name != report.latencies[0].name
        models[name] = {
            **{"flops": work.flops, "bytes": work.bytes, "nodes": work.nodes, "seconds": seconds},
            "shares": ceilings.shares(work, seconds),
            "reasons": reasons(work, dense, seconds, ceilings) if flat else [],
        }
    return {"ceilings": ceilings.to_json(), "sizes": dict(report.samples.sizes), "models": models}


def show_reasons(found: dict[str, Any]) -> None:
    """The ceilings and, of models that are not faster, why."""
    top = found["ceilings"]
    print(
        f"Ceilings measured: {top['flops'] / 1e9:.1f} GFLOP/s, {top['bytes'] / 1e9:.1f} GB/s, "
        f"{top['dispatch'] * 1e6:.2f} us a node."
    )
    for name, model in found["models"].items():
        shares = ", ".join(f"{what} {share:.0%}" for what, share in model["shares"].items())
        print(f"{name}: at the ceilings its time would be {shares} of what it takes.")
        for reason in model["reasons"]:
            print(f"  not faster: {reason}")
    print()


def _bundle_models(bundle: Path, decoders: bool) -> dict[str, Path]:
    """The models a manifest lists, or their decoders; without one, the ONNX files in `models/` or in the directory
    itself, or those of `decoders/`."""
    from deploy_prune.files import read_json

    manifest = bundle / "manifest.json"
    if not manifest.exists() and decoders:
        return {file.parent.name: file for file in sorted(bundle.glob("decoders/*/model.onnx"))}
    if not manifest.exists():
        folder = bundle / "models" if (bundle / "models").is_dir() else bundle
        return _name(sorted(folder.glob("*.onnx"))) if any(folder.glob("*.onnx")) else {}
    data = read_json(manifest)
    try:
        files = {
            str(member["name"]): bundle / str((member["decoder"] if decoders else member)["file"])
            for member in data["members"]
            if not decoders or member["decoder"]
        }
    except (KeyError, TypeError) as error:
        raise ArtifactError(
            "the manifest does not list its models",
            where=str(manifest),
            got=repr(error),
            remedy="Run `deploy-prune verify` on the bundle.",
        ) from error
    for name, file in files.items():
        if not file.resolve().is_relative_to(bundle.resolve()):
            raise ArtifactError(
                "the manifest names a file outside the bundle", where=str(manifest), got=f"{name}: {file}"
            )
        if not file.exists():
            raise ArtifactError(
                "a model of the bundle is missing", where=str(file), remedy="Run `deploy-prune verify` on the bundle."
            )
    return files


def _name(paths: Sequence[Path]) -> dict[str, Path]:
    """Short distinct names: the file's own, with its directory's where two files share one."""
    stems = [path.stem for path in paths]
    names = [f"{path.resolve().parent.name}/{path.stem}" if stems.count(path.stem) > 1 else path.stem for path in paths]
    if len(set(names)) < len(names):
        raise UsageError(
            "two models have the same name",
            got=", ".join(map(str, paths)),
            remedy="Give each file once; the baseline is timed twice anyway.",
        )
    return dict(zip(names, paths, strict=True))


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


def _sizes(sizes: Any) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())
