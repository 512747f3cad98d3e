"""Which form of the graph a run exports: named by the recipe, or the one that ran fastest on the dense model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_prune import distributed
from deploy_prune.files import read_json, write_json
from deploy_prune.pipeline import making
from deploy_prune.pipeline.setup import Setup
from deploy_prune.pipeline.timing import time_family
from deploy_prune.pipeline.workspace import Stage, Workspace

if TYPE_CHECKING:
    from bench.report import LatencyReport

CHOICE = "variant.json"
DEFAULT = "standard"  # kept unless another is measurably faster
OTHERS = ("ort", "plain")
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

    `{"chosen": "ort", "why": ..., "cells": [...]}`. The form `ort` is no candidate where a runtime of the recipe does
    not know its operators; where nothing is timed the standard form stays.
    """
    how = setup.recipe.bench
    if not how.enabled:
        return {"chosen": DEFAULT, "why": "nothing is timed (bench.enabled)", "cells": []}
    strange = [name for name in how.runtimes if name not in ORT]
    others = [form for form in OTHERS if form != "ort" or not strange]
    files = {}
    for variant in (DEFAULT, *others):
        files[variant] = directory / f"{variant}.onnx"
        making.export(setup, setup.model, files[variant], variant, variant=variant)
    reports = time_family(setup, files)
    for file in directory.glob("*.onnx*"):
        file.unlink()
    chosen, why = verdict_of(reports, others)
    if strange:
        why += f"; {', '.join(strange)} knows standard operators alone"
    return {"chosen": chosen, "why": why, "cells": [report.to_json() for report in reports]}


def verdict_of(reports: Sequence[LatencyReport], others: Sequence[str]) -> tuple[str, str]:
    """The chosen form and why: of those measurably faster than the standard one in most cells, and slower in fewer,
    the one whose ratios have the least geometric mean."""
    ratios = {form: [report[form].ratio.value for report in reports] for form in others}
    told, able = [], []
    for form in others:
        faster = sum(report[form].verdict == "faster" for report in reports)
        slower = sum(report[form].verdict == "slower" for report in reports)
        told.append(
            f"time of {form} over {DEFAULT} by cell: {', '.join(f'{ratio:.3f}' for ratio in ratios[form])}; "
            f"measurably faster in {faster}, slower in {slower}"
        )
        if faster > slower and 2 * faster > len(reports):
            able.append(form)
    chosen = min(able, key=lambda form: math.prod(ratios[form]), default=DEFAULT)
    return chosen, "; ".join(told)
