"""Masks of 1 (keep) and 0 (remove): by unit key, or one for all heads and one for all neurons by layer (Kwon et al.,
arXiv 2204.09656, whose code saves `head_mask.pt` and `neuron_mask.pt`)."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploy_prune.errors import ArtifactError, PlanError
from deploy_prune.foreign.removed import Removed
from deploy_prune.plan import PrunePlan
from deploy_prune.units import PER_HEAD, Site, SiteKind, UnitKind, groups, unit_key

BY_LAYER = {
    "head_mask": (UnitKind.HEAD, SiteKind.ATTENTION),
    "neuron_mask": (UnitKind.NEURON, SiteKind.FEED_FORWARD),
}


def read_masks(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz or .pt file. A lone tensor in a .pt file has the file's name (head_mask.pt), and the other
    of the two beside it is read too. Raises ArtifactError for other files, and for pickles that hold code."""
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as data:
                return {name: data[name] for name in data.files}
        except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
            raise ArtifactError(
                "not an .npz of plain arrays",
                where=str(path),
                got=str(error)[:200],
                remedy="Write it with numpy.savez; object arrays are not read.",
            ) from error
    if path.suffix in (".pt", ".pth"):
        found = _tensors(path)
        for other in BY_LAYER:
            beside = path.with_name(other + path.suffix)
            if path.stem in BY_LAYER and other != path.stem and beside.is_file():
                found |= _tensors(beside)
        return found
    raise ArtifactError(
        "not a file of pruning decisions",
        where=str(path),
        expected=".json, .npz or .pt",
        got=path.suffix or "no suffix",
    )


def removed_by_masks(masks: Mapping[str, np.ndarray], sites: Sequence[Site], where: str) -> Removed:
    """Raises PlanError for masks of other names or shapes, and for values other than 0 and 1."""
    removed, problems = Removed(), []
    known = {unit_key(site.name, kind): (site, kind) for site, kind in groups(sites)}
    for name, mask in masks.items():
        if mask.dtype.kind not in "biuf" or not np.isin(mask, (0, 1)).all():
            problems.append(
                f"{name}: has values other than 0 and 1; scaled masks hold a correction of the weights, which is no "
                "part of a plan: give (mask != 0), and let the refit correct"
            )
        elif name in BY_LAYER:
            problems += _by_layer(name, mask, sites, removed)
        elif name not in known:
            problems.append(f"{name}: expected {', '.join(BY_LAYER)}, or unit keys such as {next(iter(known))}")
        else:
            site, kind = known[name]
            if mask.shape != (site.units(kind),):
                problems.append(f"{name}: has shape {mask.shape}, the site has {site.units(kind)} {kind.value} units")
            else:
                removed.add(site, kind, np.flatnonzero(mask == 0))
    if problems:
        raise PlanError("the masks do not fit the model", where=where, problems=problems[:20])
    return removed


def masks_of(plan: PrunePlan, sites: Sequence[Site]) -> dict[str, np.ndarray]:
    """One mask (units,) by unit key."""
    made = {}
    for site, kind in groups(sites):
        mask = np.zeros(site.units(kind), np.uint8)
        mask[plan.kept(site, kind)] = 1
        made[unit_key(site.name, kind)] = mask
    return made


def per_layer_masks_of(plan: PrunePlan, sites: Sequence[Site]) -> dict[str, np.ndarray]:
    """`head_mask` (layers, query heads) and `neuron_mask` (layers, neurons). Raises PlanError for layers of unlike size
    and for dimensions of heads that left."""
    problems = [
        f"{site.name}: {kind.value} units left"
        for site, kind in groups(sites)
        if kind in PER_HEAD and len(plan.kept(site, kind)) < len(plan.kept(site, UnitKind.HEAD)) * site.counts[kind]
    ]
    made = {}
    for name, (kind, _) in BY_LAYER.items():
        own = [site for site in sites if kind in site.counts]
        sizes = {site.heads if kind is UnitKind.HEAD else site.counts[kind] for site in own}
        if len(sizes) != 1:
            problems.append(f"{name}: layers have {sorted(sizes)} {kind.value}s")
            continue
        mask = np.zeros((len(own), *sizes), np.float32)
        for row, site in enumerate(own):
            mask[row, plan.keep[site.name][kind]] = 1
        made[name] = mask
    if problems:
        raise PlanError(
            "one mask by layer cannot say this plan", problems=problems[:20], remedy="Write masks by unit key."
        )
    return made


def _by_layer(name: str, mask: np.ndarray, sites: Sequence[Site], removed: Removed) -> list[str]:
    kind, _ = BY_LAYER[name]
    own = [site for site in sites if kind in site.counts]
    wanted = [site.heads if kind is UnitKind.HEAD else site.counts[kind] for site in own]
    if mask.ndim != 2 or len(mask) != len(own) or any(mask.shape[1] != width for width in wanted):
        return [f"{name}: has shape {mask.shape}, the model has {len(own)} layers of {sorted(set(wanted))}"]
    problems = []
    for site, row in zip(own, mask, strict=True):
        per = site.query_heads_per_unit if kind is UnitKind.HEAD else 1
        grouped = row.reshape(-1, per)
        if per > 1 and (grouped != grouped[:, :1]).any():
            problems.append(f"{name}, {site.name}: removes a part of the {per} query heads of a key/value head")
        removed.add(site, kind, np.flatnonzero(grouped[:, 0] == 0))
    return problems


def _tensors(path: Path) -> dict[str, np.ndarray]:
    """What a .pt file holds, read without running anything in it."""
    import torch

    try:
        data: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise  # not readable, which is no damage
    except Exception as error:  # of a damaged file torch's reader raises whatever it stumbles on: KeyError, IndexError
        raise ArtifactError(
            "not a file of plain tensors",
            where=str(path),
            got=f"{type(error).__name__}: {error}".strip().splitlines()[0][:200],
            expected="tensors, or a dictionary of tensors",
            remedy="Pickles that hold other objects can run code and are never opened; save the masks as .npz.",
        ) from error
    named = data if isinstance(data, dict) else {path.stem: data}
    found = {}
    for name, value in named.items():
        if not isinstance(value, torch.Tensor):
            raise ArtifactError("not a tensor", where=f"{path}, {name}", got=type(value).__name__)
        found[str(name)] = value.float().numpy()
    return found
