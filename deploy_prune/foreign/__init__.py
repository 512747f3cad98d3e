"""Pruning decisions of other tools as plans, and plans in their forms.

heads     JSON, heads to remove by layer: {"0": [2, 5], "3": [1]}, as transformers' `prune_heads` took them
masks     npz, JSON or .pt, 1 keeps and 0 removes: `head_mask` and `neuron_mask` (layers, units), as Kwon's code writes
          them, or one mask by unit key ("layers.0.attn/head")
history   JSON, Torch-Pruning's `pruner.pruning_history()`: [["blocks.0.mlp.fc1", true, [3, 17]], ...]

What a form cannot say is refused, never dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploy_prune.errors import ArtifactError, PlanError, UsageError, did_you_mean
from deploy_prune.files import atomic_file, existing_file, read_json, write_json
from deploy_prune.foreign.heads import heads_of, removed_by_heads
from deploy_prune.foreign.history import history_of, removed_by_history
from deploy_prune.foreign.masks import masks_of, per_layer_masks_of, read_masks, removed_by_masks
from deploy_prune.foreign.removed import Removed
from deploy_prune.plan import PrunePlan, plan_from_units
from deploy_prune.units import PER_HEAD, Site, UnitKind, groups

FORMS = ("heads", "masks", "layer-masks", "history")


def import_plan(file: Path | str, sites: Sequence[Site], *, model: str, weights_sha256: str) -> PrunePlan:
    """The plan that a foreign file describes, for the model that `sites` are of.

    The form is told by the content. Raises UnavailableError (no file), ArtifactError (not one of the forms, or a
    pickle), PlanError with every place that does not fit the model or that no plan can say.
    """
    path = existing_file(file, "plan file")
    removed = _removed(path, sites)
    kept: dict[tuple[str, UnitKind], list[int]] = {}
    for site, kind in groups(sites):
        gone = removed.units(site, kind)
        kept[site.name, kind] = [unit for unit in range(site.units(kind)) if unit not in gone]
    for site in sites:  # what belongs to a removed head leaves with it, and with all heads or neurons the whole site
        vanished = not kept[site.name, site.vanishing_kind]
        heads = set(kept.get((site.name, UnitKind.HEAD), ()))
        for kind in site.counts:
            if vanished:
                kept[site.name, kind] = []
            elif kind in PER_HEAD:
                kept[site.name, kind] = [u for u in kept[site.name, kind] if u // site.counts[kind] in heads]
    plan = plan_from_units(model, weights_sha256, sites, kept)
    plan.validate_for(sites, where=str(path))
    return plan


def export_plan(plan: PrunePlan, sites: Sequence[Site], file: Path | str, form: str) -> None:
    """Write `plan` in a foreign form. Raises UsageError for an unknown form, PlanError for what it cannot say."""
    plan.validate_for(sites)
    if plan.basis is not None and form != "heads":
        cut = [s.name for s, k in groups(sites) if k in PER_HEAD and _partly(plan, s, k)]
        if cut:
            raise PlanError(
                "the plan's qk and vo units are directions of its path's basis, which no other tool knows",
                problems=cut[:20],
                remedy="Search with basis: own, or cut kinds head and neuron only.",
            )
    if form == "heads":
        write_json(file, heads_of(plan, sites))
    elif form == "history":
        write_json(file, history_of(plan, sites))
    elif form in ("masks", "layer-masks"):
        masks = masks_of(plan, sites) if form == "masks" else per_layer_masks_of(plan, sites)
        _write_masks(Path(file), masks)
    else:
        raise UsageError(f"unknown form {form!r}", remedy=did_you_mean(form, FORMS))


def _partly(plan: PrunePlan, site: Site, kind: UnitKind) -> bool:
    heads = len(plan.kept(site, UnitKind.HEAD))
    return len(plan.kept(site, kind)) < heads * site.counts[kind]


def _removed(path: Path, sites: Sequence[Site]) -> Removed:
    if path.suffix == ".json":
        data = read_json(path)
        if isinstance(data, list):
            return removed_by_history(data, sites, str(path))
        if isinstance(data, dict) and data.get("_type") == "PrunePlan":
            raise UsageError("this is a plan already", where=str(path))
        if isinstance(data, dict) and data and all(_is_layer(key, sites) for key in data):
            return removed_by_heads(data, sites, str(path))
        if isinstance(data, dict) and data:
            return removed_by_masks({str(k): _array(v, str(k), path) for k, v in data.items()}, sites, str(path))
        raise ArtifactError(
            "not a form of pruning decisions",
            where=str(path),
            expected="heads by layer, masks, or a pruning history",
            got=type(data).__name__,
        )
    return removed_by_masks(read_masks(path), sites, str(path))


def _is_layer(key: str, sites: Sequence[Site]) -> bool:
    return key.isdigit() or any(key == site.name for site in sites)


def _array(value: Any, name: str, path: Path) -> np.ndarray:
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ArtifactError("not a mask", where=f"{path}, {name}", got=repr(value)[:80]) from error


def _write_masks(file: Path, masks: Mapping[str, np.ndarray]) -> None:
    if file.suffix != ".npz":
        raise UsageError("masks are written as .npz", got=file.name)
    with atomic_file(file) as temporary, open(temporary, "wb") as stream:
        np.savez(stream, **dict(sorted(masks.items())))  # type: ignore[arg-type]
