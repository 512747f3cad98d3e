"""A cell of the latency table: what each model took, against the baseline, and whether to believe it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.samples import Samples
from bench.stats import Ratio, Verdict, percentiles, ratio_of_medians, sound, verdict


@dataclass(frozen=True)
class Latency:
    """One model in one cell. Times are milliseconds per call; `throughput` is examples per second over all its calls,
    at the mean latency; `ratio` is to the baseline's median, below 1 is faster."""

    name: str
    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    throughput: float
    ratio: Ratio
    verdict: Verdict
    stable: bool
    """False when the warm-up ended before the model's latency had settled."""

    @property
    def speedup(self) -> float:
        return 1.0 / self.ratio.value

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "speedup": self.speedup}


@dataclass(frozen=True)
class LatencyReport:
    """All models of one cell; `latencies[0]` is the baseline, `latencies[1]` the same file in a second session."""

    samples: Samples
    latencies: tuple[Latency, ...]

    @property
    def self_check(self) -> Ratio:
        """The second session of the baseline against the first: 1 where the measurement is sound."""
        return self.latencies[1].ratio

    @property
    def trusted(self) -> bool:
        """Whether the self-check speaks for the cell (`sound`). Chance alone makes a 95 % interval miss 1 in one cell
        of twenty; where the estimate misses it widely, the cell is measured again rather than believed."""
        return sound(self.self_check)

    def __getitem__(self, name: str) -> Latency:
        return next(latency for latency in self.latencies if latency.name == name)

    def to_json(self) -> dict[str, Any]:
        """Figures without the raw samples."""
        rounds, _, calls = self.samples.ns.shape
        first = self.samples.runtime.get(self.samples.names[0], {})
        return {
            "runtime": first.get("runtime"),
            "device": first.get("device"),
            "baseline": self.samples.names[0],
            **self.samples.sizes,
            "rounds": rounds,
            "calls_per_round": calls,
            "sessions_per_model": self.samples.sessions,
            "seed": self.samples.seed,
            "self_check": {"result": "passed" if self.trusted else "failed", **asdict(self.self_check)},
            "latencies": [latency.to_json() for latency in self.latencies],
            "sessions": {name: dict(facts) for name, facts in self.samples.runtime.items()},
            "warm_up": {name: dict(facts) for name, facts in self.samples.warm_up.items()},
            "environment": dict(self.samples.environment),
        }

    def save_raw(self, path: Path | str) -> None:
        """Keep the samples; `summarise(Samples.load(path))` is this report again."""
        self.samples.save(path)


def summarise(samples: Samples) -> LatencyReport:
    """All figures of a cell. The same samples give the same report: the bootstrap is seeded with the samples' seed."""
    baseline = samples.of(samples.names[0])
    ratios = {samples.names[0]: Ratio(1.0, 1.0, 1.0)}
    for name in samples.names[1:]:
        ratios[name] = ratio_of_medians(samples.of(name), baseline, sessions=samples.sessions, seed=samples.seed)
    self_check = ratios[samples.names[1]]
    latencies = []
    for name in samples.names:
        timings = samples.of(name)
        p50, p90, p99 = (ns / 1e6 for ns in percentiles(timings))
        mean = float(timings.mean()) / 1e6
        stable = bool(samples.warm_up.get(name, {}).get("stable", True))
        latencies.append(
            Latency(
                name,
                p50,
                p90,
                p99,
                mean,
                samples.sizes["batch"] * 1e3 / mean,
                ratios[name],
                verdict(ratios[name], self_check),
                stable,
            )
        )
    return LatencyReport(samples, tuple(latencies))
