"""The last step of a run: what the stages left, put in its places in a bundle, with a manifest that says it all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_prune.errors import ArtifactError
from deploy_prune.files import read_json
from deploy_prune.pipeline.choosing import FITS, LOSSES, TABLE
from deploy_prune.pipeline.decoders import place_decoder
from deploy_prune.pipeline.dynamics import APART, HISTORY
from deploy_prune.pipeline.learning import DELTA, LEARNED
from deploy_prune.pipeline.making import CHECKPOINT, DENSE, PLAN, SAMPLES, SCORES
from deploy_prune.pipeline.setup import Setup
from deploy_prune.pipeline.uniform import STOCK
from deploy_prune.pipeline.variant import CHOICE
from deploy_prune.pipeline.workspace import Stage

if TYPE_CHECKING:
    from deploy_prune.path import SolutionPath
    from deploy_prune.plan import Costs
    from deploy_prune.release.manifest import Member, ProvenanceEntry

# Names of the files that stages leave for each other.
FACTS = "facts.json"
PATH = "path.safetensors"
MOMENTS = "moments"


def is_bundle(directory: Path) -> bool:
    """Whether a directory is a bundle of ours, whole or damaged: its manifest says so."""
    file = directory / "manifest.json"
    if not file.is_file():
        return False
    try:
        data = read_json(file)
    except ArtifactError:
        return False
    return isinstance(data, dict) and data.get("_type") == "Bundle"


def made_by(out: Path, run: str) -> bool:
    """Whether `out` is a bundle that the run with this fingerprint left. Raises ArtifactError for a damaged one."""
    from deploy_prune.release.manifest import MANIFEST, Manifest

    return is_bundle(out) and Manifest.load(out / MANIFEST).run == run


def assemble(
    bundle: Path,
    setup: Setup,
    run: str,
    searched: Stage,
    models: Mapping[str, Stage],
    timed: Stage | None,
    seconds: Mapping[str, float],
    chosen: Stage | None = None,
    learned: Stage | None = None,
    formed: Stage | None = None,
    lowered: Mapping[str, tuple[Stage, str]] | None = None,
) -> None:
    """Fill the empty directory `bundle`; `models` holds the dense stage first, then every member's; `learned` is the
    stage of the task delta, where one made the dense model, `formed` that which chose the graph's form, `lowered` the
    stages of members in other precisions with the names of their twins."""
    from bench.environment import environment, package_versions
    from deploy_prune.budget import count_params
    from deploy_prune.path import SolutionPath
    from deploy_prune.pipeline.precisions import place_precision
    from deploy_prune.release.bundle import finish, latency_entries
    from deploy_prune.release.manifest import BaseModelEntry, DeltaEntry, Manifest, TensorEntry

    portable = setup.recipe.portable()
    _link(bundle, PATH, searched.directory / PATH)
    if learned is not None:
        _link(bundle, DELTA, learned.directory / DELTA)
    cells = _place_bench(bundle, timed)
    latency = latency_entries(cells)
    path = SolutionPath.load(searched.directory / PATH)
    fits = _place_choice(bundle, chosen)
    members = [
        _member(bundle, setup, name, stage, path, latency.get(name, []), fits.get(name))
        for name, stage in models.items()
    ]
    twins = {member.name: member for member in members}
    members += [
        place_precision(bundle, name, stage, twins[twin], latency.get(name, []), name.removeprefix(f"{twin}."))
        for name, (stage, twin) in (lowered or {}).items()
    ]
    signature = setup.task.signature.describe()
    data = {"calibration": portable["task"]["calibration"], "evaluation": portable["task"]["evaluation"]}
    finish(
        bundle,
        Manifest(
            name=setup.recipe.name,
            run=run,
            base=BaseModelEntry(
                reference=portable["model"], weights_sha256=setup.weights_sha256, parameters=count_params(setup.model)
            ),
            provenance=_provenance(setup),
            task={**setup.task.describe(), **data},
            recipe=portable,
            versions=package_versions(),
            environment=environment(),
            inputs=[TensorEntry.model_validate(entry) for entry in signature["inputs"]],
            output=TensorEntry.model_validate(signature["output"]),
            delta=None if learned is None else DeltaEntry.of(DELTA, read_json(learned.directory / LEARNED)),
            members=members,
            bench=cells,
            variant=read_json(formed.directory / CHOICE) if formed is not None else None,
            seconds=dict(seconds),
        ),
    )


def _provenance(setup: Setup) -> ProvenanceEntry:
    from deploy_prune.provenance import data_origin, model_origin
    from deploy_prune.release.manifest import OriginEntry, ProvenanceEntry

    said, recipe = setup.recipe.provenance, setup.recipe
    model = model_origin(recipe.model, said.model_license, said.model_source)
    data = data_origin(recipe.task.calibration, said.data_license, said.data_source)
    return ProvenanceEntry(model=OriginEntry(**vars(model)), data=OriginEntry(**vars(data)))


def _member(
    bundle: Path, setup: Setup, name: str, stage: Stage, path: SolutionPath, latency: list[Any], fit: Any
) -> Member:
    from deploy_prune.plan import PrunePlan
    from deploy_prune.release.bundle import member_from
    from deploy_prune.release.manifest import SamplesEntry

    facts = read_json(stage.directory / FACTS)
    exported = facts["export"]
    _link(bundle, f"models/{name}.onnx", stage.directory / f"{name}.onnx")
    if exported["external"]:
        _link(bundle, f"models/{exported['external']}", stage.directory / exported["external"])
    samples = _link(bundle, f"samples/{name}.safetensors", stage.directory / SAMPLES)
    checkpoint, adapters, history, stock = (stage.directory / part for part in (CHECKPOINT, APART, HISTORY, STOCK))
    scores = stage.directory / SCORES
    plan = None if name == DENSE else PrunePlan.load(stage.directory / PLAN)
    return member_from(
        name,
        exported,
        plan=None if plan is None else _link(bundle, f"plans/{name}.json", stage.directory / PLAN),
        checkpoint=_link(bundle, f"checkpoints/{name}", checkpoint) if checkpoint.is_dir() else None,
        stock=_link(bundle, f"stock/{name}", stock) if stock.is_dir() else None,
        adapters=_link(bundle, f"adapters/{name}", adapters) if adapters.is_dir() else None,
        history=_link(bundle, f"plans/{name}.history.json", history) if history.is_file() else None,
        asked=plan.asked if plan else None,
        achieved=plan.achieved if plan else _dense_costs(path),
        quality=facts["quality"],
        scores=_link(bundle, f"scores/{name}.safetensors", scores) if scores.is_file() else None,
        recovery=facts.get("recovery"),
        decoder=place_decoder(bundle, name, stage.directory, facts["decoder"], setup.recipe.parity.tolerance),
        parity=facts["parity"],
        audit=facts["audit"],
        samples=SamplesEntry(file=samples, tolerance=setup.recipe.parity.tolerance),
        latency=latency,
        latency_fit=fit,
        seconds=facts["seconds"],
    )


def _link(bundle: Path, name: str, source: Path) -> str:
    """Put a stage's file into the bundle without a second copy: the stage is deleted when the bundle is in place."""
    from deploy_prune.release.bundle import place

    return place(bundle, name, source, link=True)


def _place_bench(bundle: Path, timed: Stage | None) -> list[dict[str, Any]]:
    """Put raw samples into the bundle; returns the figures of every cell."""
    if timed is None:
        return []
    cells = []
    for file in sorted(timed.directory.glob("*.cell.json")):
        cells.append(read_json(file))
        raw = file.name.replace(".cell.json", ".samples.json")
        _link(bundle, f"bench/{raw}", timed.directory / raw)
    return cells


def _place_choice(bundle: Path, chosen: Stage | None) -> dict[str, Any]:
    """Put the latency table and the losses into the bundle; returns every member's fit."""
    if chosen is None:
        return {}
    for file in (TABLE, LOSSES):
        _link(bundle, f"bench/latency-{file}", chosen.directory / file)
    fits: dict[str, Any] = read_json(chosen.directory / FITS)
    return fits


def _dense_costs(path: SolutionPath) -> Costs:
    from deploy_prune.budget import BYTES_PER_PARAMETER
    from deploy_prune.plan import Costs
    from deploy_prune.units import groups

    units: dict[str, int] = {}
    for site, kind in groups(path.sites):
        units[kind.value] = units.get(kind.value, 0) + site.counts[kind]
    costs = path.costs
    return Costs(
        sparsity=0.0, params=costs.params, macs=costs.macs, bytes=BYTES_PER_PARAMETER * costs.params, units=units
    )
