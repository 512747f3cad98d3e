"""The checks. Each returns what it measured as JSON and raises when something is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.suite.base import Bench, all_well, close
from bench.suite.decoders import decoders, export_ahead
from bench.suite.files import FORMS, OPSET
from bench.suite.methods import default_ahead, digits, every_method, methods_ahead, search_and_refit
from bench.suite.models import subjects
from deploy_prune.errors import DeployPruneError, ParityError

if TYPE_CHECKING:
    from bench.report import LatencyReport

SESSIONS = 2


def recovery(bench: Bench) -> dict[str, Any]:
    """Training a cut model on the device, all weights, by adapters and by a sparse delta, makes it better."""
    from converters.surgery import compact
    from deploy_prune.methods import search
    from deploy_prune.recovery import recover

    dense, task = digits(bench.device, epochs=2 if bench.small else 6)
    path = search(dense, task, "magnitude", examples=64, batch_size=64, precision="fp32")
    cut = compact(dense, path.plan(0.6), check_weights=False)
    result = bench.begin()
    for method in ("full", "lora", "diff"):
        if method == "lora" and find_spec("peft") is None:
            result[method] = {"absent": "peft is not installed (extra lora)"}
            continue
        found = recover(cut, task, teacher=dense, method=method, steps=20 if bench.small else 200)
        result[method] = {key: value for key, value in found.to_json().items() if key != "marks"}
        if not found.after > found.before:
            raise ParityError(
                "recovery does not improve the model",
                where=method,
                expected=f"above {found.before:.3f}",
                got=f"{found.after:.3f}",
            )
    return result


def parity(bench: Bench) -> dict[str, Any]:
    """Compact torch on the device, and the ONNX file on the runtime, answer as compact torch on the CPU does."""
    import torch

    from bench.runtimes import get_runtime

    result = bench.begin()
    for subject in subjects(bench.small):
        _, _, half = bench.subject(subject.name)
        inputs = subject.signature.random_inputs({"batch": 3, "sequence": 13}, seed=1)
        with torch.no_grad():
            expected = subject.signature.call(half.model, inputs).numpy()
            there = half.model.to(bench.device)
            own = subject.signature.call(there, {n: t.to(bench.device) for n, t in inputs.items()}).cpu().numpy()
            half.model.cpu()
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        result[subject.name] = {f"torch on {bench.device}": close(own, expected, "fp32", subject.name)}
        for runtime in dict.fromkeys((bench.runtime, bench.graphs)):
            session = get_runtime(runtime).load(bench.files[subject.name, "half", "fp32"])
            result[subject.name] |= {
                runtime: close(session.run(arrays)[0], expected, "tf32", subject.name),
                f"{runtime} again": close(session.bind(arrays).outputs()[0], expected, "tf32", subject.name),
                f"{runtime} placement": session.describe().get("placement"),
            }
    return result


def half_precision(bench: Bench) -> dict[str, Any]:
    """The ONNX files in fp16 and bf16 answer as in fp32 on the device, and how fast they are beside it."""
    from bench.inputs import graph_inputs, make_inputs
    from bench.runtimes import get_runtime
    from bench.timing import measure

    runtime = get_runtime(bench.runtime)
    result, failed = bench.begin(), []
    for subject in subjects(bench.small):
        file = bench.files[subject.name, "half", "fp32"]
        batch, sequence = subject.cells[1]
        inputs = make_inputs(graph_inputs(file), batch=batch, sequence=sequence)
        expected = runtime.load(file).run(inputs)[0]
        files: dict[str, Path] = {"fp32": file}
        errors: dict[str, Any] = {}
        for precision in ("fp16",) if bench.small else ("fp16", "bf16"):
            lower = bench.files[subject.name, "half", precision]
            try:
                answer = runtime.load(lower).run(inputs)[0]
                errors[precision] = close(answer, expected, precision, subject.name)
                files[precision] = lower
            except DeployPruneError as failure:
                errors[precision] = str(failure)
                failed.append(f"{subject.name} in {precision}")
        report = measure(files, inputs, runtime=runtime, seconds=bench.seconds, sessions=SESSIONS)
        result[subject.name] = {"errors": errors, "cell": report.to_json()}
    all_well(failed)
    return result


def variants(bench: Bench) -> dict[str, Any]:
    """The forms of one dense graph against each other in fp16: which is the fastest on this device."""
    cells = []
    for subject in subjects(bench.small):
        files = {form: bench.files[subject.name, form, "fp16"] for form in FORMS}
        shapes = bench.cells(subject)[:2]
        reports = _timed(bench, files, shapes, bench.runtime)
        cells += [{"model": subject.name, "precision": "fp16", **report.to_json()} for report in reports]
    return {"cells": cells}


def runtimes(bench: Bench) -> dict[str, Any]:
    """Every runtime that works here runs the same member and gives the CPU's answer; the others say why not."""
    from bench.inputs import graph_inputs, make_inputs
    from bench.runtimes import RUNTIMES

    name = "vit-b"
    subject, _, _ = bench.subject(name)
    file = bench.files[name, "half", "fp32"]
    batch, sequence = subject.cells[1]
    inputs = make_inputs(graph_inputs(file), batch=batch, sequence=sequence)
    expected = RUNTIMES["ort-cpu"].load(file).run(inputs)[0]
    result, failed = bench.begin(), []
    for runtime in RUNTIMES.values():
        if reason := runtime.available():
            result[runtime.name] = {"absent": reason}
            continue
        if bench.small and runtime.name == "torch-compile":
            result[runtime.name] = {"left out": "compiling takes longer than the small suite may"}
            continue
        try:
            session = runtime.load(file)
            bound = session.bind(inputs)
            bound()
            error = close(bound.outputs()[0], expected, "tf32", runtime.name)
            result[runtime.name] = {"error": error, "session": session.describe()}
        except DeployPruneError as failure:
            result[runtime.name] = {"failed": str(failure)}
            failed.append(runtime.name)
    all_well(failed)
    return result


def table(bench: Bench) -> dict[str, Any]:
    """A latency table of the neurons, and how well it predicts a plan that was not in it."""
    from converters.onnx_export import export_onnx
    from converters.surgery import compact
    from deploy_prune.latency.measure import latency_table
    from deploy_prune.latency.place import Place

    subject, dense, half = bench.subject("vit-b")
    batch, sequence = subject.cells[1]
    place = Place(bench.runtime, batch, sequence, seconds=bench.seconds)
    found = latency_table(
        dense,
        half.sites,
        half.path.costs,
        place,
        lambda model, file: export_onnx(model, file, subject.signature, opset=OPSET, variant="ort"),
        kinds=half.path.kinds(["neuron"]),
        align=bench.align,
    )
    plan = half.path.plan(budget="macs", value=0.8, kinds=["neuron"], align=bench.align)
    dense_file = bench.files["vit-b", "ort", "fp32"]
    own = dense_file.with_name("predicted.onnx")
    export_onnx(compact(dense, plan, check_weights=False), own, subject.signature, opset=OPSET, variant="ort")
    predicted = found.plan_ms(plan.counts(half.sites)) / found.dense_ms
    measured = place.time({"dense": dense_file, "predicted": own})["predicted"].ratio
    return {
        "table": found.to_json(),
        "predicted": predicted,
        "measured": {"value": measured.value, "low": measured.low, "high": measured.high},
        "off": predicted / measured.value - 1,
    }


def family(bench: Bench) -> dict[str, Any]:
    """Dense and half of every model in every cell in fp32, and the ceilings of the device."""
    from bench.roofline import measure_ceilings

    length = 1 << 16 if bench.small else 1 << 26
    side = 128 if bench.small else 4096
    ceilings = measure_ceilings(bench.runtime, side=side, length=length)
    return {"ceilings": ceilings.to_json(), "cells": _cells(bench, "fp32", bench.runtime, counted=True)}


def family_fp16(bench: Bench) -> dict[str, Any]:
    """The same in fp16, which is what GPUs are bought for."""
    return {"cells": _cells(bench, "fp16", bench.runtime)}


def family_graphs(bench: Bench) -> dict[str, Any]:
    """The same in fp16 with CUDA graphs, in the cells small enough to be bound by launches."""
    return {"cells": _cells(bench, "fp16", bench.graphs, largest=8)}


def _cells(
    bench: Bench, precision: str, runtime: str, *, counted: bool = False, largest: int | None = None
) -> list[dict[str, Any]]:
    from bench.inputs import graph_inputs, make_inputs
    from bench.work import work_of

    cells = []
    for subject in subjects(bench.small):
        files = bench.files.members(subject.name, precision)
        shapes = [
            (batch, sequence)
            for batch, sequence in bench.cells(subject)
            if largest is None or batch * max(1, (sequence or 0) // 128) <= largest
        ]
        for (batch, sequence), report in zip(shapes, _timed(bench, files, shapes, runtime), strict=True):
            cell = {"model": subject.name, "precision": precision, **report.to_json()}
            if counted and batch <= 8 and (sequence or 0) <= 128:  # counting runs the model on the CPU
                inputs = make_inputs(graph_inputs(files["dense"]), batch=batch, sequence=sequence)
                works = {name: work_of(file, inputs) for name, file in files.items()}
                cell["work"] = {
                    name: {"flops": work.flops, "bytes": work.bytes, "nodes": work.nodes}
                    for name, work in works.items()
                }
            cells.append(cell)
    return cells


def _timed(
    bench: Bench, files: Mapping[str, Path], shapes: Sequence[tuple[int, int | None]], runtime: str
) -> list[LatencyReport]:
    """The files against the first in every shape (batch, sequence)."""
    from bench.inputs import graph_inputs
    from bench.timing import Cell, measure_cells

    specs = graph_inputs(next(iter(files.values())))
    cells = [Cell.made(specs, batch, sequence) for batch, sequence in shapes]
    return measure_cells(files, cells, runtime=runtime, seconds=bench.seconds, sessions=SESSIONS)


def large_search(bench: Bench) -> dict[str, Any]:
    """The iterated search on a 7B model of random weights: seconds and memory of all its steps, none computed."""
    from bench.studies.scale import search_7b

    return search_7b(bench.device, small=bench.small)


def files_ahead(bench: Bench) -> None:
    _ = bench.files


# In this order: what needs the device alone, while other processes work; then what waits for them.
CHECKS: Mapping[str, Callable[[Bench], dict[str, Any]]] = {
    "large": large_search,
    "recovery": recovery,
    "search": search_and_refit,
    "parity": parity,
    "runtimes": runtimes,
    "family": family,
    "family-fp16": family_fp16,
    "family-graphs": family_graphs,
    "fp16": half_precision,
    "variants": variants,
    "methods": every_method,
    "decoders": decoders,
    "table": table,
}
TIMED = ("family", "family-fp16", "family-graphs", "fp16", "variants", "table")  # nothing may run beside them
# What other processes begin before the first check begins.
AHEAD: Mapping[str, Callable[[Bench], None]] = {
    "search": default_ahead,
    **dict.fromkeys(("parity", "runtimes", "family", "family-fp16", "family-graphs", "fp16", "variants"), files_ahead),
    "methods": methods_ahead,
    "decoders": export_ahead,
    "table": files_ahead,
}
