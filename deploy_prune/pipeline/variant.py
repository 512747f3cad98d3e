"""Which form of the graph a run exports: named by the recipe, or the one that ran faster on the dense model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_prune import distributed
from deploy_prune.files import read_json, write_json
from deploy_prune.pipeline import stages
from deploy_prune.pipeline.setup import Setup
from deploy_prune.pipeline.workspace import Stage, Workspace

if TYPE_CHECKING:
    from bench.report import LatencyReport

CHOICE = "variant.json"
CANDIDATES = ("standard", "ort")  # the first is kept unless the second is measurably faster
ORT = ("ort-cpu", "ort-cuda", "ort-cuda-graph")  # runtimes that know the operators of `ort`


def variant_stage(workspace: Workspace, setup: Setup) -> tuple[Setup, Stage | None]:
    """The setup with `export.variant: auto` replaced by what was measured, and the stage that did; as it was, and
    None, for a recipe that names its variant."""
    recipe = setup.recipe
    if recipe.export.variant != "auto":
        return setup, None
    inputs = {**setup.identity, **{part: getattr(recipe, part).model_dump(mode="json") for part in ("export", "bench")}}

    def work(directory: Path) -> None:
        write_json(directory / CHOICE, choose(setup, directory))

    stage = workspace.stage("variant", inputs, work)
    chosen = distributed.from_main(lambda: read_json(stage.directory / CHOICE))["chosen"]
    export = recipe.export.model_copy(update={"variant": chosen})
    return dataclasses.replace(setup, recipe=recipe.model_copy(update={"export": export})), stage


def choose(setup: Setup, directory: Path) -> dict[str, Any]:
    """Export the dense model in every candidate form and time them against each other in the recipe's cells.

    `{"chosen": "ort", "why": ..., "cells": [...]}`. The standard form stays where a runtime of the recipe does not know
    the other's operators, where nothing is timed, or where the other is not faster beyond the measurement's error in
    most cells.
    """
    how = setup.recipe.bench
    others = [name for name in how.runtimes if name not in ORT]
    if others or not how.enabled:
        why = f"{', '.join(others)} knows standard operators alone" if others else "nothing is timed (bench.enabled)"
        return {"chosen": CANDIDATES[0], "why": why, "cells": []}
    files = {}
    for variant in CANDIDATES:
        files[variant] = directory / f"{variant}.onnx"
        stages.export(setup, setup.model, files[variant], variant, variant=variant)
    reports = stages.time_family(setup, files)
    for file in directory.glob("*.onnx*"):
        file.unlink()
    chosen, why = verdict_of(reports)
    return {"chosen": chosen, "why": why, "cells": [report.to_json() for report in reports]}


def verdict_of(reports: list[LatencyReport]) -> tuple[str, str]:
    """The chosen form and why: in how many cells the second was measurably faster than the first."""
    standard, ort = CANDIDATES
    faster = sum(report[ort].verdict == "faster" for report in reports)
    slower = sum(report[ort].verdict == "slower" for report in reports)
    ratios = ", ".join(f"{report[ort].ratio.value:.3f}" for report in reports)
    told = f"time of {ort} over {standard} by cell: {ratios}; measurably faster in {faster}, slower in {slower}"
    return (ort if faster > slower and 2 * faster > len(reports) else standard), told
