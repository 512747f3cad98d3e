"""What `deploy-prune bench` found, for people: tables on stdout, and why a model is not faster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.report import LatencyReport
    from bench.runtimes import Runtime
    from bench.timing import Cell

COLUMNS = ("model", "p50 ms", "p90 ms", "p99 ms", "examples/s", "time / dense [95 %]", "speed-up", "verdict")


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
    console.table(COLUMNS, rows, title=f"{head['runtime']} on {head['device']}, {sizes_text(report.samples.sizes)}")
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


def sizes_text(sizes: Any) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())
