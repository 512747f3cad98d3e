"""A finished bundle in one table: what was asked of each member, what came out, and how fast it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deploy_prune.release.manifest import Manifest, Member


def summary(bundle: Path) -> dict[str, Any]:
    """The manifest's figures as JSON data: one entry per member, sizes and latency relative to the dense model."""
    from deploy_prune.release.manifest import MANIFEST, Manifest

    manifest = Manifest.load(bundle / MANIFEST)
    return {
        "bundle": str(bundle),
        "name": manifest.name,
        "model": manifest.base.reference,
        "task": manifest.task.get("name"),
        "members": [_member(member, manifest) for member in manifest.members],
        "seconds": manifest.seconds,
    }


def rows(found: dict[str, Any]) -> tuple[Sequence[str], list[list[str]]]:
    """Columns and rows of the table for people."""
    first = found["members"][0]
    metric = first["quality"]["metric"] if first["quality"] else None
    trained = bool(metric) and any(member["quality_before"] for member in found["members"])
    cells = [f"{c['runtime']} {c['sizes']}" for c in first["latency"]]
    columns = [
        "member",
        "asked",
        "sparsity",
        "params",
        "MACs",
        "bytes",
        *([f"{metric} before recovery"] if trained else []),
        *([metric] if metric else []),
        "parity",
        *(f"time/dense {cell}" for cell in cells),
    ]
    table = []
    for member in found["members"]:
        quality = member["quality"]
        times = {
            f"{c['runtime']} {c['sizes']}": f"{c['ratio']:.2f} [{c['low']:.2f}, {c['high']:.2f}]"
            + ("" if c["trusted"] else " (untrusted)")
            for c in member["latency"]
        }
        table.append(
            [
                member["name"],
                member["asked"] or "",
                f"{member['sparsity']:.3f}",
                f"{member['params_share']:.1%}",
                f"{member['macs_share']:.1%}",
                f"{member['bytes']:,}",
                *([_quality(member["quality_before"])] if trained else []),
                *([_quality(quality)] if metric else []),
                f"{member['parity']:.0e}",
                *(times.get(cell, "not timed") for cell in cells),
            ]
        )
    return columns, table


def _member(member: Member, manifest: Manifest) -> dict[str, Any]:
    from deploy_prune.release.gate import sizes_name

    costs, dense = member.achieved, manifest.dense.achieved
    assert costs is not None and dense is not None
    return {
        "name": member.name,
        "file": member.file,
        "asked": f"{member.asked.budget} {member.asked.value:g}" if member.asked else None,
        "sparsity": costs.sparsity,
        "params": costs.params,
        "params_share": costs.params / dense.params,
        "macs": costs.macs,
        "macs_share": costs.macs / dense.macs,
        "bytes": member.bytes,
        "quality": member.quality.model_dump(mode="json") if member.quality else None,
        "quality_before": _before(member),
        "recovery": member.recovery.model_dump(mode="json") if member.recovery else None,
        "parity": member.parity["error"],
        "latency": [
            {
                "runtime": entry.runtime,
                "sizes": sizes_name(entry),
                "p50_ms": entry.p50_ms,
                "ratio": entry.ratio.value,
                "low": entry.ratio.low,
                "high": entry.ratio.high,
                "verdict": entry.verdict,
                "trusted": entry.trusted,
            }
            for entry in member.latency
        ],
        "seconds": member.seconds,
    }


def _before(member: Member) -> dict[str, Any] | None:
    before = member.recovery.quality_before if member.recovery else None
    return before.model_dump(mode="json") if before else None


def _quality(quality: dict[str, Any] | None) -> str:
    if quality is None:
        return ""
    low, high = quality["interval"]
    return f"{quality['value']:.4g} [{low:.4g}, {high:.4g}]"
