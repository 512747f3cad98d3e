"""Time models against each other in one process, so that what disturbs one disturbs all.

Each round runs every model once, in a fresh random order: a block of one untimed and a few timed calls. The baseline
takes part twice, in two sessions; what lies between these two is the error of the measurement itself.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.environment import environment
from bench.report import LatencyReport, summarise
from bench.runtimes import Bound, Runtime, Session, get_runtime
from bench.samples import Samples
from deploy_prune.errors import UsageError
from deploy_prune.progress import SILENT, Progress

if TYPE_CHECKING:
    import numpy as np

AGAIN = " (again)"
MIN_ROUNDS, MAX_ROUNDS = 30, 1000  # fewer rounds than 30 make bootstrap intervals too narrow
BLOCK_NS = 20_000_000  # timed part of a block: long against what a switch of models costs, short against load changes
MIN_CALLS, MAX_CALLS = 2, 20
WINDOW = 5
TOLERANCE = 0.05
MAX_WARM_UP_NS = 5_000_000_000
Clock = Callable[[], int]


@dataclass(frozen=True)
class WarmUp:
    """`stable`: the medians of the last two windows of `WINDOW` calls differ by less than `TOLERANCE`."""

    calls: int
    stable: bool
    median_ns: float


def measure(
    candidates: Mapping[str, Path | str],
    inputs: Mapping[str, np.ndarray],
    *,
    runtime: str | Runtime = "ort-cpu",
    sizes: Mapping[str, int] | None = None,
    seconds: float = 3.0,
    rounds: int | None = None,
    calls: int | None = None,
    threads: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    clock: Clock = time.perf_counter_ns,
) -> LatencyReport:
    """Latency of every candidate on the same inputs; the first candidate is the baseline.

    `seconds` is the time spent timing each model; `rounds` and `calls` (timed calls of a model per round) override
    what follows from it. Both are fixed before the first timed call, never stretched until the figures please.
    `sizes` names the dynamic dimensions for the report; by default the batch, from the first dimension of the inputs.
    Raises UsageError for an empty comparison or inputs that do not fit, UnavailableError when the runtime is not here.
    """
    baseline = _check(candidates, inputs, seconds, rounds, calls)
    names = (baseline, baseline + AGAIN, *(name for name in candidates if name != baseline))
    if isinstance(runtime, str):
        runtime = get_runtime(runtime)
    listener = progress or SILENT
    place = environment()  # before our own work becomes part of the load

    files = {**candidates, baseline + AGAIN: candidates[baseline]}
    sessions: dict[str, Session] = {}
    models: dict[str, Bound] = {}
    warm: dict[str, WarmUp] = {}
    listener.start(len(names), "load and warm up")
    try:
        for name in names:
            sessions[name] = runtime.load(files[name], threads=threads)
            models[name] = sessions[name].bind(inputs)
            warm[name] = warm_up(models[name], clock)
            listener.advance(1, name)
    finally:
        listener.finish()

    fastest = min(warm[name].median_ns for name in names)
    calls = calls or min(MAX_CALLS, max(MIN_CALLS, math.ceil(BLOCK_NS / max(fastest, 1.0))))
    slowest = max(warm[name].median_ns for name in names)
    rounds = rounds or min(MAX_ROUNDS, max(MIN_ROUNDS, round(seconds * 1e9 / (calls * max(slowest, 1.0)))))
    ns, order = run_rounds([models[name] for name in names], rounds, calls, seed, clock, listener)
    return summarise(Samples(
        names=names, ns=ns, order=order, seed=seed,
        sizes=dict(sizes) if sizes else {"batch": int(next(iter(inputs.values())).shape[0])},
        warm_up={name: {"calls": warm[name].calls, "stable": warm[name].stable} for name in names},
        runtime={name: sessions[name].describe() for name in names},
        environment=place,
    ))


def warm_up(model: Callable[[], None], clock: Clock = time.perf_counter_ns) -> WarmUp:
    """Call `model` until two consecutive windows agree, or for `MAX_WARM_UP_NS`."""
    times: list[int] = []
    began = clock()
    while True:
        start = clock()
        model()
        stop = clock()
        times.append(stop - start)
        if len(times) >= 2 * WINDOW:
            before, after = statistics.median(times[-2 * WINDOW:-WINDOW]), statistics.median(times[-WINDOW:])
            if abs(after - before) <= TOLERANCE * before:
                return WarmUp(len(times), True, after)
        if stop - began >= MAX_WARM_UP_NS:
            return WarmUp(len(times), False, statistics.median(times[-WINDOW:]))


def run_rounds(
    models: list[Bound], rounds: int, calls: int, seed: int, clock: Clock, progress: Progress = SILENT
) -> tuple[np.ndarray, np.ndarray]:
    """Timings (rounds, models, calls) in nanoseconds and the order (rounds, models) the models ran in."""
    import numpy as np

    generator = np.random.default_rng(seed)
    ns = np.empty((rounds, len(models), calls), np.int64)
    order = np.stack([generator.permutation(len(models)) for _ in range(rounds)])
    progress.start(rounds, "measure")
    try:
        with _no_garbage_collection():
            for turn in range(rounds):
                for index in order[turn].tolist():
                    model, row = models[index], ns[turn, index]
                    model()  # untimed: brings the weights back into the caches, as in a server that runs one model
                    for call in range(calls):
                        start = clock()
                        model()
                        row[call] = clock() - start
                progress.advance()
    finally:
        progress.finish()
    return ns, order


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _check(
    candidates: Mapping[str, Path | str], inputs: Mapping[str, np.ndarray], seconds: float,
    rounds: int | None, calls: int | None,
) -> str:
    """The baseline's name. Raises UsageError with every problem at once."""
    problems = []
    if not candidates:
        problems.append("no model to time")
    problems += [f"{name!r} cannot name a model: {AGAIN.strip()!r} marks the baseline's second session"
                 for name in candidates if name.endswith(AGAIN)]
    if not inputs or not all(array.ndim and array.shape[0] for array in inputs.values()):
        problems.append("every input needs a first dimension of at least one example")
    if not (math.isfinite(seconds) and seconds > 0):
        problems.append(f"seconds must be positive, got {seconds}")
    problems += [f"{label} must be at least {least}, got {value}"
                 for label, value, least in (("rounds", rounds, 2), ("calls", calls, 1)) if value is not None and value < least]
    if problems:
        raise UsageError("nothing can be measured", problems=problems)
    return next(iter(candidates))
