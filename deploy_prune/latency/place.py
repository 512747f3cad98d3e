"""Where latency counts: a runtime, its threads and the sizes of a call; and how to time graphs there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_prune.progress import SILENT, Progress

if TYPE_CHECKING:
    from bench.latency_table import LatencyTable
    from bench.report import LatencyReport
    from bench.timing import Cell

DEFAULT_SEQUENCE = 128  # tokens per example where none are asked for
# A median is wanted, not an interval, and of many graphs: fewer rounds than a reported figure gets, but several loads.
SESSIONS, ROUNDS = 3, 15


@dataclass(frozen=True)
class Place:
    """`Place("ort-cpu", batch=8, sequence=128, threads=2)`. `threads` None: every physical core; `seconds` is about
    how long each graph is timed. `past`: the graphs are decoders with a cache that holds so many tokens. `cold`: every
    call is timed after those of other graphs, so that it reads its weights from memory."""

    runtime: str = "ort-cpu"
    batch: int = 1
    sequence: int | None = None
    threads: int | None = None
    seconds: float = 1.0
    past: int | None = None
    cold: bool = False

    def sizes(self) -> dict[str, int]:
        given = {"batch": self.batch, "sequence": self.sequence, "past": self.past}
        return {name: size for name, size in given.items() if size is not None}

    def settled(self, onnx: Path) -> Place:
        """The same with the sequence size that a dense graph needs (of a decoder that has a past, one new token), and
        cold where a CPU reads it from memory in every call: its weights and inputs do not fit into the caches. A probe
        of few sites would lie in them, and be taken for faster than these sites are in the model. Raises UsageError
        when the graph can take no such size."""
        from dataclasses import replace

        from bench.inputs import graph_inputs, has_sequence
        from bench.runtimes import get_runtime

        takes = has_sequence(graph_inputs(onnx))
        place = replace(self, sequence=self._usual) if takes and self.sequence is None else self
        inputs, size = place.cell({"": onnx}).inputs, last_level_cache()
        if size is None or not get_runtime(self.runtime).on_cpu:
            return place
        return replace(place, cold=onnx.stat().st_size + sum(array.nbytes for array in inputs.values()) > size)

    def of(self, table: LatencyTable) -> Place:
        """The same with the sequence size that a table was measured at."""
        from dataclasses import replace

        return replace(self, sequence=table.facts.get("sequence", self.sequence))

    def cell(self, files: Mapping[str, Path], seed: int = 0) -> Cell:
        """The made-up inputs of graphs: of decoders each its own, since their caches differ."""
        from bench.inputs import graph_inputs
        from bench.timing import Cell

        if self.past is None:
            return Cell.made(graph_inputs(next(iter(files.values()))), self.batch, self.sequence, seed)
        specs = {name: graph_inputs(file) for name, file in files.items()}
        return Cell.step(specs, self.batch, self.past, seed, sequence=self.sequence or self._usual)

    @property
    def _usual(self) -> int:
        """New tokens where none are asked for."""
        return 1 if self.past else DEFAULT_SEQUENCE

    def time(
        self, files: Mapping[str, Path], *, seed: int = 0, min_rounds: int = ROUNDS, progress: Progress = SILENT
    ) -> LatencyReport:
        """All graphs against the first, interleaved; raises as `bench.timing.measure_cells`."""
        from bench.timing import measure_cells

        return measure_cells(
            files,
            [self.cell(files, seed)],
            runtime=self.runtime,
            seconds=self.seconds,
            sessions=SESSIONS,
            min_rounds=min_rounds,
            threads=self.threads,
            calls=1 if self.cold else None,
            settle=False if self.cold else None,
            seed=seed,
            progress=progress,
        )[0]

    def facts(self, onnx: Path) -> dict[str, Any]:
        """What a figure taken here depends on, as the runtime tells it of a graph; without placements, which are the
        graph's own."""
        from bench.runtimes import get_runtime

        session = get_runtime(self.runtime).load(onnx, threads=self.threads)
        told = {key: value for key, value in session.describe().items() if key not in ("placement", "build", "memory")}
        return {**told, **self.sizes(), "cold": self.cold}


def last_level_cache() -> int | None:
    """Bytes of the CPU's largest cache, as Linux tells it; None where it does not."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text.rstrip("KM")) * {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1))
    return max(sizes, default=None)
