"""What the report shows, as plain data: figures of members, the path as a picture, widths per layer. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_prune.errors import ArtifactError, DeployPruneError
from deploy_prune.files import existing_file
from deploy_prune.plan import PrunePlan
from deploy_prune.release.gate import cell_name
from deploy_prune.release.scores import drop_from_dense
from deploy_prune.units import PER_HEAD, Site, UnitKind, site_from_json, unit_key

if TYPE_CHECKING:
    import numpy as np

    from deploy_prune.release.manifest import Manifest, Member

COLUMNS = 96  # of the path's picture: wider sites are shown by the mean of neighbours
PATH = "path.safetensors"


def figures(bundle: Path, manifest: Manifest) -> dict[str, Any]:
    """Everything on the page as JSON data. Clocks and the machine's load are left out: they are in the manifest."""
    dense = manifest.dense
    sites, scores = _path(bundle)
    environment = {k: v for k, v in manifest.environment.items() if k not in ("load_average", "packages")}
    return {
        "name": manifest.name,
        "model": manifest.base.reference,
        "task": manifest.task.get("name"),
        "evaluation": manifest.task.get("evaluation"),
        "parameters": manifest.base.parameters,
        "metric": dense.quality.metric if dense.quality else None,
        "higher_is_better": dense.quality.higher_is_better if dense.quality else True,
        "members": [_member(bundle, manifest, member) for member in manifest.members],
        "cells": list(dict.fromkeys(cell_name(e) for m in manifest.members for e in m.latency)),
        "path": _picture(sites, scores),
        "widths": _widths(bundle, manifest, sites),
        "inputs": [entry.model_dump(mode="json") for entry in manifest.inputs],
        "output": manifest.output.model_dump(mode="json"),
        "environment": dict(_flat(environment)),
        "versions": {name: version for name, version in sorted(manifest.versions.items()) if version},
    }


def _member(bundle: Path, manifest: Manifest, member: Member) -> dict[str, Any]:
    costs, dense, quality = member.achieved, manifest.dense.achieved, member.quality
    try:
        change = drop_from_dense(bundle, manifest, member)
    except DeployPruneError as error:
        raise ArtifactError("a member's scores cannot be read", where=member.name, got=str(error)) from error
    return {
        "name": member.name,
        "file": member.file,
        "sha256": member.sha256,
        "asked": f"{member.asked.budget} {member.asked.value:g}" if member.asked else None,
        "sparsity": costs.sparsity if costs else None,
        "params": costs.params if costs else None,
        "macs": costs.macs if costs else None,
        "params_share": costs.params / dense.params if costs and dense and dense.params else None,
        "macs_share": costs.macs / dense.macs if costs and dense and dense.macs else None,
        "bytes": member.bytes,
        "bytes_share": member.bytes / manifest.dense.bytes if manifest.dense.bytes else None,
        "quality": quality and {"value": quality.value, "low": quality.interval[0], "high": quality.interval[1],
                                "n": quality.n},
        "drop": change and {"value": change.value, "low": change.low, "high": change.high, "paired": change.paired},
        "before": member.recovery.quality_before.value
        if member.recovery and member.recovery.quality_before
        else None,
        "parity": [
            {key: pair.get(key) for key in ("reference", "candidate", "error", "tolerance", "agreement")}
            for pair in member.parity.get("pairs", [])
            if isinstance(pair, dict)
        ],
        "audit": member.audit,
        "latency": [
            {
                "cell": cell_name(entry),
                "device": entry.device,
                "p50": entry.p50_ms,
                "p90": entry.p90_ms,
                "p99": entry.p99_ms,
                "ratio": entry.ratio.value,
                "low": entry.ratio.low,
                "high": entry.ratio.high,
                "verdict": entry.verdict,
                "trusted": entry.trusted,
                "stable": entry.stable,
            }
            for entry in member.latency
        ],
    }  # fmt: skip


def _path(bundle: Path) -> tuple[list[Site], dict[str, np.ndarray]]:
    """Sites and the units' scores of the bundle's path; nothing where there is no path. Read without torch, so without
    the path's basis."""
    import json

    from safetensors import SafetensorError, safe_open

    if not (bundle / PATH).is_file():
        return [], {}
    path = existing_file(bundle / PATH)
    try:
        with safe_open(path, framework="np") as file:
            sites = [site_from_json(s) for s in json.loads((file.metadata() or {})["deploy_prune"])["sites"]]
            keys = [unit_key(s.name, k) for s in sites for k in s.counts]
            return sites, {key: file.get_tensor(key) for key in keys}
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError("not a whole solution path", where=str(path), got=str(error)[:200]) from error


def _picture(sites: list[Site], scores: dict[str, np.ndarray]) -> dict[str, Any]:
    """Kind -> a row per site: when its units leave, the last to leave first, 1 the very last."""
    import numpy as np

    found: dict[str, Any] = {}
    for site in sites:
        for kind in site.counts:
            values = np.sort(scores[unit_key(site.name, kind)])[::-1]
            parts = np.array_split(values, min(COLUMNS, len(values)))
            row = [round(float(part.mean()), 4) for part in parts]
            found.setdefault(kind.value, []).append({"site": site.name, "units": len(values), "values": row})
    return found


def _widths(bundle: Path, manifest: Manifest, sites: list[Site]) -> dict[str, Any]:
    """Kind -> sites, and per member the share of each site's units that stays."""
    plans = {m.name: PrunePlan.load(bundle / m.plan) for m in manifest.members if m.plan is not None}
    found: dict[str, Any] = {}
    for site in sites:
        for kind in site.counts:
            entry = found.setdefault(kind.value, {"sites": [], "total": [], "kept": {name: [] for name in plans}})
            entry["sites"].append(site.name)
            entry["total"].append(site.counts[kind])
            for name, plan in plans.items():
                entry["kept"][name].append(_width(plan, site, kind))
    return found


def _width(plan: PrunePlan, site: Site, kind: UnitKind) -> int | None:
    """Units that stay at a site, in every kept head where heads have units of their own; None for a foreign plan."""
    if site.name not in plan.keep or kind not in plan.keep[site.name]:
        return None
    kept = len(plan.kept(site, kind))
    if kind not in PER_HEAD or UnitKind.HEAD not in site.counts:
        return kept
    heads = len(plan.kept(site, UnitKind.HEAD))
    return kept // heads if heads else 0


def _flat(data: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Nested facts as lines: ("cpu model", "AMD EPYC")."""
    if isinstance(data, dict):
        for key, inner in data.items():
            yield from _flat(inner, f"{name} {key}".strip())
    elif isinstance(data, list):
        for i, inner in enumerate(data):
            yield from _flat(inner, f"{name} {i}" if len(data) > 1 else name)
    elif data is not None:
        yield name, str(data)
