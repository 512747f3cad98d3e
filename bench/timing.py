"""Time models against each other in one process, so that what disturbs one disturbs all.

Each round runs every model once, in a fresh random order: a block of one untimed and a few timed calls. Several times
on the way all models are loaded afresh, in random order, because where a session's weights happen to lie in memory
alone moves its latency by a few percent. The baseline takes part twice, in two sessions; what lies between these two
is the error of the measurement itself.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.contention import between, snapshot
from bench.environment import environment
from bench.report import LatencyReport, summarise
from bench.runtimes import Bound, Runtime, get_runtime
from bench.samples import Samples
from deploy_prune.errors import UsageError
from deploy_prune.progress import SILENT, Progress

if TYPE_CHECKING:
    import numpy as np

AGAIN = " (again)"
SESSIONS = 5
MIN_ROUNDS, MAX_ROUNDS = 30, 1500  # fewer than 30 make bootstrap intervals too narrow
BLOCK_NS = 5_000_000  # timed part of a block; longer blocks pair worse, shorter ones spend their time on untimed calls
MAX_CALLS = 20
SETTLED_NS = 50_000_000  # cold caches cost microseconds: a call this long needs no untimed one before it
WINDOW = 5
TOLERANCE = 0.05
MAX_WARM_UP_NS = 5_000_000_000
Clock = Callable[[], int]


@dataclass(frozen=True)
class WarmUp:
    """`stable`: the medians of the last two windows of `WINDOW` calls differ by at most `TOLERANCE`."""

    calls: int
    stable: bool
    median_ns: float


@dataclass(frozen=True)
class Schedule:
    """How much is timed: in each of `sessions` runs, `rounds` rounds of `calls` timed calls of every model, after an
    untimed one if `settle`."""

    sessions: int
    rounds: int
    calls: int
    settle: bool


def measure(
    candidates: Mapping[str, Path | str],
    inputs: Mapping[str, np.ndarray],
    *,
    runtime: str | Runtime = "ort-cpu",
    sizes: Mapping[str, int] | None = None,
    seconds: float = 3.0,
    sessions: int = SESSIONS,
    rounds: int | None = None,
    calls: int | None = None,
    min_rounds: int | None = None,
    threads: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    clock: Clock = time.perf_counter_ns,
) -> LatencyReport:
    """Latency of every candidate on the same inputs; the first candidate is the baseline.

    `seconds` is about the time spent timing each model. `sessions` is how often each is loaded; `rounds` (in each
    session) and `calls` (timed calls of a model per round) override what follows from `seconds`. All are fixed before
    the first timed call, never stretched until the figures please. Fewer `min_rounds` will do where a median is wanted
    and no interval. `sizes` names the dynamic dimensions for the
    report; by default the batch, from the first dimension of the inputs.
    Raises UsageError for an empty comparison or inputs that do not fit, UnavailableError when the runtime is not here.
    """
    import numpy as np

    baseline = _check(candidates, inputs, seconds, {"sessions": sessions, "rounds": rounds, "calls": calls})
    names = (baseline, baseline + AGAIN, *(name for name in candidates if name != baseline))
    files = [candidates[name.removesuffix(AGAIN)] for name in names]
    if isinstance(runtime, str):
        runtime = get_runtime(runtime)
    generator = np.random.default_rng(seed)
    listener = progress or SILENT
    place = environment()  # before our own work becomes part of the load
    before = snapshot()

    warm: list[list[WarmUp]] = [[] for _ in names]
    facts: list[dict[str, Any]] = [{} for _ in names]
    taken: list[tuple[np.ndarray, np.ndarray]] = []
    schedule: Schedule | None = None
    listener.start(len(names), "load and warm up")
    with _no_garbage_collection(), _finished(listener):
        for turn in range(sessions):
            models: dict[int, Bound] = {}
            for index in generator.permutation(len(names)).tolist():
                models[index], facts[index] = _load(runtime, files[index], inputs, threads)
                warm[index].append(warm_up(models[index], clock))
                if turn == 0:
                    listener.advance(1, names[index])
            if schedule is None:
                schedule = plan_schedule(
                    [each[0].median_ns for each in warm], seconds, sessions, rounds, calls, min_rounds
                )
                listener.finish()
                listener.start(schedule.sessions * schedule.rounds, "measure")
            taken.append(run_rounds([models[i] for i in range(len(names))], schedule, generator, clock, listener))
            models.clear()  # before the next session takes its memory
    return summarise(
        Samples(
            names=names,
            seed=seed,
            sessions=sessions,
            ns=np.concatenate([ns for ns, _ in taken]),
            order=np.concatenate([order for _, order in taken]),
            sizes=dict(sizes) if sizes else {"batch": int(next(iter(inputs.values())).shape[0])},
            warm_up={
                name: {"calls": sum(w.calls for w in each), "stable": all(w.stable for w in each)}
                for name, each in zip(names, warm, strict=True)
            },
            runtime=dict(zip(names, facts, strict=True)),
            environment={**place, "contention": between(before, snapshot())},
        )
    )


def _load(
    runtime: Runtime, file: Path | str, inputs: Mapping[str, np.ndarray], threads: int | None
) -> tuple[Bound, dict[str, Any]]:
    session = runtime.load(file, threads=threads)
    bound = session.bind(inputs)
    return bound, session.describe()


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
            before, after = statistics.median(times[-2 * WINDOW : -WINDOW]), statistics.median(times[-WINDOW:])
            if abs(after - before) <= TOLERANCE * before:
                return WarmUp(len(times), True, after)
        if stop - began >= MAX_WARM_UP_NS:
            return WarmUp(len(times), False, statistics.median(times[-WINDOW:]))


def plan_schedule(
    medians_ns: Sequence[float],
    seconds: float,
    sessions: int,
    rounds: int | None = None,
    calls: int | None = None,
    min_rounds: int | None = None,
) -> Schedule:
    """Blocks of about `BLOCK_NS` of the fastest model, and as many rounds as the slowest fits into `seconds`."""
    fastest, slowest = max(1.0, min(medians_ns)), max(1.0, *medians_ns)
    calls = calls or min(MAX_CALLS, math.ceil(BLOCK_NS / fastest))
    if rounds is None:
        total = min(MAX_ROUNDS, max(min_rounds or MIN_ROUNDS, seconds * 1e9 / (calls * slowest)))
        rounds = math.ceil(total / sessions)
    return Schedule(sessions, rounds, calls, settle=fastest < SETTLED_NS)


def run_rounds(
    models: Sequence[Callable[[], None]],
    schedule: Schedule,
    generator: np.random.Generator,
    clock: Clock,
    progress: Progress = SILENT,
) -> tuple[np.ndarray, np.ndarray]:
    """Timings (rounds, models, calls) in nanoseconds and the order (rounds, models) the models ran in."""
    import numpy as np

    ns = np.empty((schedule.rounds, len(models), schedule.calls), np.int64)
    order = np.stack([generator.permutation(len(models)) for _ in range(schedule.rounds)])
    for turn in range(schedule.rounds):
        for index in order[turn].tolist():
            model, row = models[index], ns[turn, index]
            if schedule.settle:
                model()  # brings the weights back into the caches, as in a server that runs one model
            for call in range(schedule.calls):
                start = clock()
                model()
                row[call] = clock() - start
        progress.advance()
    return ns, order


@contextmanager
def _finished(progress: Progress) -> Iterator[None]:
    try:
        yield
    finally:
        progress.finish()


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
    candidates: Mapping[str, Path | str],
    inputs: Mapping[str, np.ndarray],
    seconds: float,
    counts: Mapping[str, int | None],
) -> str:
    """The baseline's name. Raises UsageError with every problem at once."""
    problems = []
    if not candidates:
        problems.append("no model to time")
    problems += [
        f"{name!r} cannot name a model: {AGAIN.strip()!r} marks the baseline's second session"
        for name in candidates
        if name.endswith(AGAIN)
    ]
    if not inputs or not all(array.ndim and array.shape[0] for array in inputs.values()):
        problems.append("every input needs a first dimension of at least one example")
    if not (math.isfinite(seconds) and seconds > 0):
        problems.append(f"seconds must be positive, got {seconds}")
    problems += [f"{label} must be at least 1, got {n}" for label, n in counts.items() if n is not None and n < 1]
    if problems:
        raise UsageError("nothing can be measured", problems=problems)
    return next(iter(candidates))
