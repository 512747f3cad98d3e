"""Where latency counts: a runtime, its threads, a batch and a sequence size; and how to time graphs there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_prune.progress import SILENT, Progress

if TYPE_CHECKING:
    import numpy as np

    from bench.report import LatencyReport

DEFAULT_SEQUENCE = 128  # tokens per example where none are asked for
# A median is wanted, not an interval, and of many graphs: fewer rounds than a reported figure gets, but several loads.
SESSIONS, ROUNDS = 3, 15


@dataclass(frozen=True)
class Place:
    """`Place("ort-cpu", batch=8, sequence=128, threads=2)`. `threads` None: every physical core; `seconds` is about
    how long each graph is timed."""

    runtime: str = "ort-cpu"
    batch: int = 1
    sequence: int | None = None
    threads: int | None = None
    seconds: float = 1.0

    def sizes(self) -> dict[str, int]:
        return {"batch": self.batch} | ({} if self.sequence is None else {"sequence": self.sequence})

    def settled(self, onnx: Path) -> Place:
        """The same with the sequence size that a graph needs. Raises UsageError when it can take none."""
        from dataclasses import replace

        from bench.inputs import graph_inputs, has_sequence

        takes = has_sequence(graph_inputs(onnx))
        place = replace(self, sequence=DEFAULT_SEQUENCE) if takes and self.sequence is None else self
        place.inputs(onnx)
        return place

    def inputs(self, onnx: Path, seed: int = 0) -> dict[str, np.ndarray]:
        from bench.inputs import graph_inputs, make_inputs

        return make_inputs(graph_inputs(onnx), batch=self.batch, sequence=self.sequence, seed=seed)

    def time(
        self, files: Mapping[str, Path], *, seed: int = 0, min_rounds: int = ROUNDS, progress: Progress = SILENT
    ) -> LatencyReport:
        """All graphs against the first, interleaved; raises as `bench.timing.measure`."""
        from bench.timing import measure

        return measure(
            files,
            self.inputs(next(iter(files.values())), seed),
            runtime=self.runtime,
            sizes=self.sizes(),
            seconds=self.seconds,
            sessions=SESSIONS,
            min_rounds=min_rounds,
            threads=self.threads,
            seed=seed,
            progress=progress,
        )

    def facts(self, onnx: Path) -> dict[str, Any]:
        """What a figure taken here depends on, as the runtime tells it of a graph; without placements, which are the
        graph's own."""
        from bench.runtimes import get_runtime

        session = get_runtime(self.runtime).load(onnx, threads=self.threads)
        told = {key: value for key, value in session.describe().items() if key not in ("placement", "build", "memory")}
        return {**told, **self.sizes()}
