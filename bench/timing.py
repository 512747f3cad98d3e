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
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.contention import Snapshot, between, snapshot
from bench.environment import environment
from bench.inputs import GraphInput, has_past, make_inputs
from bench.report import LatencyReport, summarise
from bench.runtimes import Bound, Runtime, Session, get_runtime
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


@dataclass(frozen=True)
class Cell:
    """The inputs that models are timed on, those of some candidates their `own`, by name; `sizes` names their dynamic
    dimensions for the report, by default the batch, from the first dimension of the inputs."""

    inputs: Mapping[str, np.ndarray]
    sizes: Mapping[str, int] | None = None
    own: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)

    @staticmethod
    def made(specs: Sequence[GraphInput], batch: int, sequence: int | None, seed: int = 0) -> Cell:
        """Random inputs of these sizes. Raises as `bench.inputs.make_inputs`."""
        inputs = make_inputs(specs, batch=batch, sequence=sequence, seed=seed)
        return Cell(inputs, {"batch": batch} | ({} if sequence is None else {"sequence": sequence}))

    @staticmethod
    def step(
        specs: Mapping[str, Sequence[GraphInput]], batch: int, past: int, seed: int = 0, *, sequence: int = 1
    ) -> Cell:
        """`sequence` new tokens per text on caches of `past` tokens, each decoder's of its own shape. Raises as
        `made`."""
        wrong = [name for name, each in specs.items() if not has_past(each)]
        if wrong:
            raise UsageError(
                "no decoders with a cache",
                problems=wrong,
                remedy="Give decoders/NAME/model.onnx of a bundle made with export.cache.",
            )
        own = {
            name: make_inputs(each, batch=batch, sequence=sequence, past=past, seed=seed)
            for name, each in specs.items()
        }
        more = {"sequence": sequence} if sequence > 1 or past == 0 else {}
        return Cell(next(iter(own.values())), {"batch": batch, **more, "past": past}, own)

    def of(self, candidate: str) -> Mapping[str, np.ndarray]:
        return self.own.get(candidate, self.inputs)

    def named(self) -> dict[str, int]:
        return dict(self.sizes) if self.sizes else {"batch": int(next(iter(self.inputs.values())).shape[0])}


def measure(
    candidates: Mapping[str, Path | str],
    inputs: Mapping[str, np.ndarray],
    *,
    sizes: Mapping[str, int] | None = None,
    **options: Any,
) -> LatencyReport:
    """Latency of every candidate on the same inputs: `measure_cells` of one cell, with its options and errors."""
    return measure_cells(candidates, [Cell(inputs, sizes)], **options)[0]


def measure_cells(
    candidates: Mapping[str, Path | str],
    cells: Sequence[Cell],
    *,
    runtime: str | Runtime = "ort-cpu",
    seconds: float = 3.0,
    sessions: int = SESSIONS,
    rounds: int | None = None,
    calls: int | None = None,
    settle: bool | None = None,
    min_rounds: int | None = None,
    threads: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    clock: Clock = time.perf_counter_ns,
) -> list[LatencyReport]:
    """Latency of every candidate in every cell, a report for each; the first candidate is the baseline.

    `seconds` is about the time spent timing each model in a cell. `sessions` is how often each is loaded, for all cells
    at once; `rounds` (in each session) and `calls` (timed calls of a model per round) override what follows from
    `seconds`. All are fixed before the first timed call, never stretched until the figures please. Fewer `min_rounds`
    will do where a median is wanted and no interval. `settle`: an untimed call comes first in every round, which brings
    the weights into the caches; None: where calls are short enough to feel it.
    Raises UsageError for an empty comparison or inputs that do not fit, UnavailableError when the runtime is not here.
    """
    import numpy as np

    counts = {"sessions": sessions, "rounds": rounds, "calls": calls}
    baseline = _check(candidates, cells, seconds, counts)
    names = (baseline, baseline + AGAIN, *(name for name in candidates if name != baseline))
    files = [candidates[name.removesuffix(AGAIN)] for name in names]
    if isinstance(runtime, str):
        runtime = get_runtime(runtime)
    generator = np.random.default_rng(seed)
    listener = progress or SILENT
    if runtime.one_shape and len(cells) > 1:
        given: dict[str, Any] = {
            **counts,
            "settle": settle,
            "seconds": seconds,
            "min_rounds": min_rounds,
            "threads": threads,
        }
        given |= {"runtime": runtime, "seed": seed, "progress": progress, "clock": clock}
        return [report for cell in cells for report in measure_cells(candidates, [cell], **given)]
    place = environment()  # before our own work becomes part of the load

    taken = [_Taken([[] for _ in names], [{} for _ in names]) for _ in cells]
    listener.start(sessions * len(names) * (1 + len(cells)), "time")
    with _no_garbage_collection(), _finished(listener):
        for _ in range(sessions):
            loaded: dict[int, Session] = {}
            order = generator.permutation(len(names)).tolist()
            for index in order:
                loaded[index] = runtime.load(files[index], threads=threads)
                listener.advance(1, names[index])
            for cell, found in zip(cells, taken, strict=True):
                before = snapshot()
                models: dict[int, Bound] = {}
                for index in order:
                    models[index] = loaded[index].bind(cell.of(names[index].removesuffix(AGAIN)))
                    found.facts[index] = loaded[index].describe()
                    found.warm[index].append(warm_up(models[index], clock))
                if found.schedule is None:
                    found.schedule = plan_schedule(
                        [each[0].median_ns for each in found.warm], seconds, sessions, rounds, calls, min_rounds, settle
                    )
                in_turn = [models[i] for i in range(len(names))]
                found.parts.append(run_rounds(in_turn, found.schedule, generator, clock))
                found.spans.append((before, snapshot()))
                in_turn.clear()
                models.clear()  # before the next cell takes its memory
                listener.advance(len(names), ", ".join(f"{name} {size}" for name, size in cell.named().items()))
            loaded.clear()  # before the next session takes its memory
    return [
        summarise(
            Samples(
                names=names,
                seed=seed,
                sessions=sessions,
                ns=np.concatenate([ns for ns, _ in found.parts]),
                order=np.concatenate([order for _, order in found.parts]),
                sizes=cell.named(),
                warm_up={
                    name: {"calls": sum(w.calls for w in each), "stable": all(w.stable for w in each)}
                    for name, each in zip(names, found.warm, strict=True)
                },
                runtime=dict(zip(names, found.facts, strict=True)),
                environment={**place, "contention": between(*found.spans)},
            )
        )
        for cell, found in zip(cells, taken, strict=True)
    ]


@dataclass
class _Taken:
    """Of one cell: each model's warm-ups and what its runtime says; timings, orders and when they were taken, of every
    session."""

    warm: list[list[WarmUp]]
    facts: list[dict[str, Any]]
    parts: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    spans: list[tuple[Snapshot, Snapshot]] = field(default_factory=list)
    schedule: Schedule | None = None


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
    settle: bool | None = None,
) -> Schedule:
    """Blocks of about `BLOCK_NS` of the fastest model, and as many rounds as the slowest fits into `seconds`."""
    fastest, slowest = max(1.0, min(medians_ns)), max(1.0, *medians_ns)
    calls = calls or min(MAX_CALLS, math.ceil(BLOCK_NS / fastest))
    if rounds is None:
        total = min(MAX_ROUNDS, max(min_rounds or MIN_ROUNDS, seconds * 1e9 / (calls * slowest)))
        rounds = math.ceil(total / sessions)
    return Schedule(sessions, rounds, calls, fastest < SETTLED_NS if settle is None else settle)


def run_rounds(
    models: Sequence[Callable[[], None]],
    schedule: Schedule,
    generator: np.random.Generator,
    clock: Clock,
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
    cells: Sequence[Cell],
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
    if not cells:
        problems.append("no inputs to time on")
    if any(not cell.inputs or not all(a.ndim and a.shape[0] for a in cell.inputs.values()) for cell in cells):
        problems.append("every input needs a first dimension of at least one example")
    if not (math.isfinite(seconds) and seconds > 0):
        problems.append(f"seconds must be positive, got {seconds}")
    problems += [f"{label} must be at least 1, got {n}" for label, n in counts.items() if n is not None and n < 1]
    if problems:
        raise UsageError("nothing can be measured", problems=problems)
    return next(iter(candidates))
