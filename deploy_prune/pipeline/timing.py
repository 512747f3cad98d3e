"""The latency table of a family: every runtime at every size that the recipe asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_prune.latency.place import DEFAULT_SEQUENCE
from deploy_prune.pipeline.setup import Setup
from deploy_prune.tasks.tokens import longest_text

if TYPE_CHECKING:
    from bench.report import LatencyReport
    from bench.timing import Cell
    from deploy_prune.recipe_parts import BenchPart


def time_family(
    setup: Setup,
    files: Mapping[str, Path],
    precisions: Mapping[str, str] | None = None,
    decoders: Mapping[str, Path] | None = None,
) -> list[LatencyReport]:
    """Every cell of the recipe's latency table, those of `decoders` with a cache too; the first of `files` is the
    baseline. Of those in another precision (`precisions`: name -> which) a runtime only gets what it computes in."""
    from bench.inputs import graph_inputs, has_sequence
    from bench.runtimes import get_runtime
    from bench.timing import Cell, measure_cells
    from converters.precision.formats import runs, steps_run

    how, seed = setup.recipe.bench, setup.recipe.seed
    specs = graph_inputs(next(iter(files.values())))
    usual = min(DEFAULT_SEQUENCE, longest_text(getattr(setup.model, "config", None)) or DEFAULT_SEQUENCE)
    lengths: Sequence[int | None] = how.seq or ([usual] if has_sequence(specs) else [None])
    cells = [Cell.made(specs, batch, length, seed) for batch in how.batch for length in lengths]
    reports = []
    for name in how.runtimes:
        runtime = get_runtime(name, trust_code=setup.recipe.model.startswith("python:"))
        timed = {member: file for member, file in files.items() if runs(name, (precisions or {}).get(member, "fp32"))}
        asked = [(timed, cells)]
        if how.past and decoders:
            timed = {m: file for m, file in decoders.items() if steps_run(name, (precisions or {}).get(m, "fp32"))}
            own = {member: graph_inputs(file) for member, file in timed.items()}
            asked.append((timed, list(_steps(own, how, usual, seed))))
        for timed, those in asked:
            reports += measure_cells(
                timed,
                those,
                runtime=runtime,
                seconds=how.seconds,
                threads=how.threads,
                seed=seed,
                progress=setup.progress,
            )
    return reports


def _steps(specs: Mapping[str, Any], how: BenchPart, usual: int, seed: int) -> Iterator[Cell]:
    """One new token on every cache asked for; a prompt, of every length or the `usual` one, where it is empty."""
    from bench.timing import Cell

    for batch in how.batch:
        for past in dict.fromkeys(how.past or ()):
            for length in (1,) if past else dict.fromkeys(how.seq or (usual,)):
                yield Cell.step(specs, batch, past, seed, sequence=length)
