"""What the best of a race get on top: the same short recovery, and latency on the CPU runtime."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bench.studies.contestants import Form, contestants
from bench.studies.race_analysis import FORMS, lost, sound
from bench.studies.race_result import DENSE, key_of

if TYPE_CHECKING:
    from bench.studies.race import Race

RECOVERED = "recovered"


def best_rows(race: Race, count: int, asked: float) -> list[dict[str, Any]]:
    """Our row at a size, and the best form of the `count` others that lose least there."""
    rows = [row for row in sound(race.result, FORMS) if row["asked"] == asked]
    known = contestants()
    ours = [row for row in rows if row["contestant"] in known and known[row["contestant"]].ours]
    others = sorted((row for row in rows if row not in ours), key=lambda row: lost(race.result, row))
    chosen: dict[str, dict[str, Any]] = {}
    for row in others:
        if row["contestant"] != DENSE:
            chosen.setdefault(row["contestant"], row)
    return [*ours, *list(chosen.values())[:count]]


def recover_best(race: Race, count: int, steps: int, training: dict[str, Any]) -> None:
    """Train ours and the best others at every size for `steps` steps, all with the same data, seed and options, which
    are `recover`'s defaults where `training` says nothing else."""
    import deploy_prune as dp

    facts = {"steps": steps} | ({"training": training} if training else {})
    for asked in race.sparsities:
        for row in best_rows(race, count, asked):
            known = race.result.rows.get(key_of({**row, "form": RECOVERED}), {})
            if {key: known[key] for key in ("steps", "training") if key in known} == facts:
                continue
            made = race.member(contestants()[row["contestant"]], _form(row), asked)
            assert isinstance(made, tuple)
            found = dp.recover(
                made[0],
                race.setup.task,
                teacher=race.setup.model,
                seed=race.setup.recipe.seed,
                steps=steps,
                **training,
            )
            own = {"from_form": row["form"], "best_step": found.best_step, "macs": row["macs"]}
            race.judge(
                found.model, {"contestant": row["contestant"], "form": RECOVERED, "asked": asked, **facts, **own}
            )


def time_best(race: Race, count: int, seconds: float = 3.0) -> None:
    """Latency of ours and the best others on onnxruntime's CPU provider, batch 1, dense interleaved in every cell.

    One cell for each size: its ONNX files are made, timed together and deleted.
    """
    from bench.inputs import graph_inputs, has_sequence, make_inputs
    from bench.timing import measure
    from converters.onnx_export import export_onnx

    signature = race.setup.task.signature
    for asked in race.sparsities:
        rows = best_rows(race, count, asked)
        if all("latency" in row for row in rows):
            continue
        with tempfile.TemporaryDirectory(prefix="race-") as place:
            files = {DENSE: Path(place) / "dense.onnx"}
            export_onnx(copy.deepcopy(race.setup.model).cpu(), files[DENSE], signature)
            for row in rows:
                made = race.member(contestants()[row["contestant"]], _form(row), asked)
                assert isinstance(made, tuple)
                files[row["contestant"]] = Path(place) / f"{row['contestant']}.onnx"
                export_onnx(copy.deepcopy(made[0]).cpu(), files[row["contestant"]], signature)
            specs = graph_inputs(files[DENSE])
            length = 128 if has_sequence(specs) else None
            sizes = {"batch": 1} | ({} if length is None else {"sequence": length})
            report = measure(
                files,
                make_inputs(specs, batch=1, sequence=length, seed=race.setup.recipe.seed),
                runtime="ort-cpu",
                sizes=sizes,
                seconds=seconds,
                seed=race.setup.recipe.seed,
            )
        for row in rows:
            found = report[row["contestant"]].to_json()
            row["latency"] = {k: found[k] for k in ("p50_ms", "ratio", "verdict")} | {
                "sizes": sizes,
                "dense_p50_ms": report[DENSE].p50_ms,
                "trusted": report.trusted,
            }
            click.echo(
                f"{row['contestant']:12} {asked:4.0%}  {found['p50_ms']:.2f} ms, {found['ratio']['value']:.2f} of dense"
            )
        race.result.save()


def _form(row: dict[str, Any]) -> Form:
    return "refit" if row["form"] == "refit" else "own"
