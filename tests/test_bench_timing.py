"""The measuring loop: what runs when and how often, with fake models and an injected clock; plumbing on a real file."""

from __future__ import annotations

import functools
import gc
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_models import save_mlp

from bench.report import LatencyReport, summarise
from bench.runtimes import Bound, Runtime, Session
from bench.samples import Samples
from bench.stats import ratio_of_medians
from bench.timing import MAX_WARM_UP_NS, WINDOW, Cell, measure, measure_cells, plan_schedule, warm_up
from deploy_prune.errors import ArtifactError, UnavailableError, UsageError

X = {"x": np.ones((2, 4), np.float32)}


class FakeRuntime(Runtime):
    """Models whose calls take a given time on a clock of their own; the file name says which model it is."""

    name = "fake"
    remedy = "none"

    def __init__(self, nanoseconds: Mapping[str, float], spread: float = 0.0, session_spread: float = 0.0) -> None:
        self.nanoseconds, self.spread, self.session_spread = nanoseconds, spread, session_spread
        self.now = 0
        self.log: list[tuple[str, int]] = []
        """(model, session number) of every call, in order."""
        self.loaded: list[str] = []
        self.threads: set[int | None] = set()
        self.gc_on: set[bool] = set()
        self.random = np.random.default_rng(5)

    def available(self) -> str | None:
        return None

    def load(self, onnx_path: Path | str, *, threads: int | None = None) -> Session:
        self.loaded.append(str(onnx_path))
        self.threads.add(threads)
        return FakeSession(self, str(onnx_path), len(self.loaded))

    def clock(self) -> int:
        return self.now


class FakeSession(Session):
    def __init__(self, runtime: FakeRuntime, name: str, number: int) -> None:
        self.runtime, self.name, self.number = runtime, name, number
        self.factor = float(np.exp(runtime.random.normal(0, runtime.session_spread)))

    @property
    def input_names(self) -> tuple[str, ...]:
        return ("x",)

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return []

    def bind(self, inputs: Mapping[str, np.ndarray]) -> Bound:
        self.check_names(inputs)
        return FakeBound(self)

    def describe(self) -> dict[str, Any]:
        return {"runtime": "fake", "device": "a clock"}


class FakeBound(Bound):
    def __init__(self, session: FakeSession) -> None:
        self.session = session

    def __call__(self) -> None:
        runtime, session = self.session.runtime, self.session
        noise = np.exp(runtime.random.normal(0, runtime.spread))
        runtime.now += round(runtime.nanoseconds[session.name] * session.factor * noise)
        runtime.log.append((session.name, session.number))
        runtime.gc_on.add(gc.isenabled())

    def outputs(self) -> list[np.ndarray]:
        return []


def measured(runtime: FakeRuntime, **options: Any) -> LatencyReport:
    return measure({name: name for name in runtime.nanoseconds}, X, runtime=runtime, clock=runtime.clock, **options)


@pytest.fixture
def three() -> FakeRuntime:
    return FakeRuntime({"dense": 2e6, "small": 1e6, "large": 3e6})


def test_baseline_is_timed_in_two_sessions_of_the_same_file(three: FakeRuntime) -> None:
    report = measured(three, sessions=1, rounds=4, calls=2)
    assert report.samples.names == ("dense", "dense (again)", "small", "large")
    assert sorted(three.loaded) == ["dense", "dense", "large", "small"]
    sessions_of_dense = {number for name, number in three.log if name == "dense"}
    assert len(sessions_of_dense) == 2


def test_every_model_has_equally_many_samples_and_runs_once_a_round(three: FakeRuntime) -> None:
    samples = measured(three, sessions=2, rounds=5, calls=3).samples
    assert samples.ns.shape == (10, 4, 3)
    assert (np.sort(samples.order, axis=1) == np.arange(4)).all()


def test_order_is_fresh_in_every_round_and_favours_no_place() -> None:
    runtime = FakeRuntime({"a": 1e3, "b": 1e3})
    order = measured(runtime, sessions=1, rounds=600, calls=1).samples.order
    assert len({tuple(row) for row in order.tolist()}) == 6
    places = np.stack([np.bincount(order[:, place], minlength=3) for place in range(3)])
    assert (abs(places - 200) < 60).all()  # six standard deviations of a binomial with n 600, p 1/3: 69


def test_recorded_order_is_the_order_the_models_ran_in(three: FakeRuntime) -> None:
    samples = measured(three, sessions=1, rounds=6, calls=2).samples
    played = three.log[-6 * 4 * 3 :]  # per model and round: one untimed and two timed calls
    blocks = [played[i][0] for i in range(0, len(played), 3)]
    recorded = [samples.names[i].removesuffix(" (again)") for i in samples.order.ravel()]
    assert blocks == recorded


def test_same_seed_repeats_the_order_and_another_does_not(three: FakeRuntime) -> None:
    first, again, other = (measured(three, sessions=2, rounds=8, calls=1, seed=s).samples.order for s in (1, 1, 2))
    assert (first == again).all()
    assert not (first == other).all()


def test_models_are_loaded_afresh_in_every_session_in_changing_order(three: FakeRuntime) -> None:
    measured(three, sessions=6, rounds=1, calls=1)
    assert len(three.loaded) == 24
    assert len({tuple(three.loaded[i : i + 4]) for i in range(0, 24, 4)}) > 1


def test_all_cells_of_a_session_are_timed_in_one_load_of_the_models(three: FakeRuntime) -> None:
    cells = [Cell({"x": np.ones((batch, 4), np.float32)}) for batch in (2, 8)]
    files = {name: name for name in three.nanoseconds}
    reports = measure_cells(files, cells, runtime=three, clock=three.clock, sessions=3, rounds=4, calls=2)
    assert [report.samples.sizes for report in reports] == [{"batch": 2}, {"batch": 8}]
    assert len(three.loaded) == 3 * 4
    for report in reports:
        assert report.samples.ns.shape == (12, 4, 2)
        assert report["small"].ratio.value == 0.5
    assert reports[1]["small"].throughput == 4 * reports[0]["small"].throughput
    assert not (reports[0].samples.order == reports[1].samples.order).all()


def test_a_runtime_that_builds_for_a_shape_loads_the_models_for_every_cell(three: FakeRuntime) -> None:
    three.one_shape = True  # type: ignore[misc]
    cells = [Cell({"x": np.ones((batch, 4), np.float32)}) for batch in (2, 8)]
    files = {name: name for name in three.nanoseconds}
    reports = measure_cells(files, cells, runtime=three, clock=three.clock, sessions=3, rounds=4, calls=2)
    assert len(three.loaded) == 2 * 3 * 4
    assert [report.samples.sizes["batch"] for report in reports] == [2, 8]


def test_every_cell_says_who_else_computed_while_it_was_timed(
    three: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.contention import Snapshot

    clock = iter(range(100))
    # Others use no core in the first cell's spans and one in the second's; each span takes a second.
    used = iter([0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 2.0])
    monkeypatch.setattr("bench.timing.snapshot", lambda: Snapshot(next(clock), next(used), 0.0, None))
    cells = [Cell({"x": np.ones((batch, 4), np.float32)}) for batch in (2, 8)]
    reports = measure_cells({"dense": "dense"}, cells, runtime=three, clock=three.clock, sessions=2, rounds=2, calls=1)
    assert [report.samples.environment["contention"]["others_cores"] for report in reports] == [0.0, 1.0]


def test_figures_follow_from_the_clock(three: FakeRuntime) -> None:
    report = measured(three, sessions=1, rounds=4, calls=2)
    small = report["small"]
    assert (small.p50_ms, small.p99_ms, small.mean_ms) == (1.0, 1.0, 1.0)
    assert small.throughput == 2000.0  # 2 examples per ms
    assert (small.ratio.value, small.speedup, small.verdict) == (0.5, 2.0, "faster")
    assert report["large"].verdict == "slower"
    assert report["dense (again)"].verdict == "no measurable change"
    assert report.trusted


def test_session_spread_that_would_fool_one_session_is_in_the_interval_of_several(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bench.report.ratio_of_medians", functools.partial(ratio_of_medians, resamples=400))
    held = []
    for seed in range(24):
        runtime = FakeRuntime({"dense": 1e6}, spread=0.05, session_spread=0.03)
        runtime.random = np.random.default_rng(seed)
        held.append([measured(runtime, sessions=s, rounds=60 // s, calls=2).self_check.holds_one for s in (1, 5)])
    one, five = np.sum(held, axis=0)
    assert five >= 18 > one  # 87.5 % of 24 by bench/notes.md: five sessions are few


def test_self_check_that_misses_one_marks_the_cell_as_untrusted() -> None:
    class Drifting(FakeRuntime):
        def load(self, onnx_path: Path | str, *, threads: int | None = None) -> Session:
            session = super().load(onnx_path, threads=threads)
            assert isinstance(session, FakeSession)
            session.factor = 1.0 + 0.1 * len(self.loaded)  # each session slower than the one before
            return session

    report = measured(Drifting({"dense": 1e6}), sessions=1, rounds=30, calls=1)
    assert not report.trusted
    assert report.to_json()["self_check"]["result"] == "failed"


def test_a_change_no_larger_than_the_self_check_is_no_measurable_change() -> None:
    steady = np.random.default_rng(0).normal(1e6, 1e3, (30, 1, 2))
    ns = np.concatenate([steady, 1.05 * steady, 0.97 * steady, 0.90 * steady], axis=1).astype(np.int64)
    names = ("dense", "dense (again)", "little", "much")
    report = summarise(Samples(names, ns, np.tile(np.arange(4), (30, 1)), {"batch": 1}, seed=0))
    assert (report["little"].verdict, report["much"].verdict) == ("no measurable change", "faster")
    assert report["little"].ratio.high < 1


def test_garbage_collection_is_off_while_timing_and_restored(three: FakeRuntime) -> None:
    assert gc.isenabled()
    measured(three, sessions=2, rounds=1, calls=1)
    assert three.gc_on == {False}
    assert gc.isenabled()


def test_threads_reach_the_runtime(three: FakeRuntime) -> None:
    measured(three, sessions=1, rounds=1, calls=1, threads=3)
    assert three.threads == {3}


def test_warm_up_ends_when_two_windows_agree() -> None:
    durations = iter([100] * WINDOW + [50] * WINDOW + [50] * WINDOW)
    now = [0]

    def model() -> None:
        now[0] += next(durations)

    found = warm_up(model, lambda: now[0])
    assert found.stable
    assert found.median_ns == 50
    assert 2 * WINDOW < found.calls <= 3 * WINDOW


def test_warm_up_that_never_settles_stops_and_says_so(three: FakeRuntime) -> None:
    now, step = [0], [MAX_WARM_UP_NS / 1000]

    def model() -> None:
        step[0] *= 1.1
        now[0] += round(step[0])

    assert not warm_up(model, lambda: now[0]).stable
    samples = measured(three, sessions=1, rounds=2, calls=1).samples
    unsettled = {**samples.warm_up, "small": {"calls": 9, "stable": False}}
    report = summarise(Samples(**{**vars(samples), "warm_up": unsettled}))
    assert [latency.name for latency in report.latencies if not latency.stable] == ["small"]


def test_schedule_times_each_model_for_about_the_asked_seconds() -> None:
    schedule = plan_schedule([1e6, 2e6], seconds=4.0, sessions=5)
    assert (schedule.calls, schedule.settle) == (5, True)
    assert schedule.sessions * schedule.rounds * schedule.calls * 2e6 == pytest.approx(4e9, rel=0.05)


def test_schedule_of_slow_models_keeps_enough_rounds_and_wastes_no_call() -> None:
    schedule = plan_schedule([8e8, 1e9], seconds=1.0, sessions=5)
    assert schedule.sessions * schedule.rounds == 30
    assert (schedule.calls, schedule.settle) == (1, False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"candidates": {}}, "no model to time"),
        ({"candidates": {"a (again)": "a"}}, "cannot name a model"),
        ({"inputs": {}}, "first dimension"),
        ({"inputs": {"x": np.zeros((0, 4))}}, "first dimension"),
        ({"seconds": 0.0}, "seconds must be positive"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"sessions": 0}, "sessions must be at least 1"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        measure(**{"candidates": {"dense": "dense"}, "inputs": X, **change})


def test_every_fault_of_a_request_is_named_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        measure({}, {}, seconds=-1.0)
    assert len(caught.value.problems) == 3


def test_unknown_runtime_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(UsageError, match="Did you mean 'ort-cpu'"):
        measure({"dense": "nowhere.onnx"}, X, runtime="ort-cpuu")


def test_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"nowhere\.onnx"):
        measure({"dense": tmp_path / "nowhere.onnx"}, X)


def test_raw_samples_are_saved_and_reloaded_exactly(three: FakeRuntime, tmp_path: Path) -> None:
    three.spread = 0.1
    report = measured(three, sessions=2, rounds=3, calls=2)
    report.save_raw(tmp_path / "raw.json")
    loaded = Samples.load(tmp_path / "raw.json")
    assert loaded.ns.dtype == np.int64
    assert (loaded.ns == report.samples.ns).all()
    assert (loaded.order == report.samples.order).all()
    again = summarise(loaded)
    assert again.latencies == report.latencies
    assert again.to_json() == json.loads(json.dumps(report.to_json()))
    again.save_raw(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "raw.json").read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"_version": 2},
        {"_type": "plan"},
        {"names": ["dense"]},
        {"ns": [[1], [2, 3]]},
        {"order": [[0, 1]]},
        {"sessions": 2},
        {"ns": None},
    ],
)
def test_damaged_samples_are_refused(three: FakeRuntime, tmp_path: Path, change: dict[str, Any]) -> None:
    report = measured(three, sessions=1, rounds=3, calls=2)
    (tmp_path / "raw.json").write_text(json.dumps({**report.samples.to_json(), **change}))
    with pytest.raises(ArtifactError, match=r"raw\.json"):
        Samples.load(tmp_path / "raw.json")


def test_real_models_are_timed_end_to_end(tmp_path: Path) -> None:
    dense, small = save_mlp(tmp_path / "dense.onnx", 64), save_mlp(tmp_path / "small.onnx", 8)
    report = measure({"dense": dense, "small": small}, X, runtime="ort-cpu", threads=1, sessions=2, rounds=3, calls=2)
    assert report.samples.ns.shape == (6, 3, 2)
    assert (report.samples.ns > 0).all()
    data = report.to_json()
    assert (data["runtime"], data["batch"]) == ("ort-cpu", 2)
    assert data["sessions"]["small"]["options"]["intra_op_num_threads"] == 1
    assert data["environment"]["packages"]["onnxruntime"]
    json.dumps(data, allow_nan=False)
