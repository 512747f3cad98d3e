"""Bundles with made-up figures: what a gate judges, without anything having been measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy_prune.files import sha256_file
from deploy_prune.release.bundle import walk
from deploy_prune.release.manifest import FileEntry, LatencyEntry, Manifest, RatioEntry


def latency(ratio: float, low: float, high: float, **other: Any) -> LatencyEntry:
    """A line of the latency table; dense takes 4 ms."""
    fields = {"runtime": "ort-cpu", "device": "some CPU", "batch": 1, "trusted": True, "stable": True, **other}
    p50 = 4.0 * ratio
    return LatencyEntry(
        p50_ms=p50,
        p90_ms=1.5 * p50,
        p99_ms=2 * p50,
        mean_ms=p50,
        throughput=1000 / p50,
        ratio=RatioEntry(value=ratio, low=low, high=high),
        verdict="faster",
        **fields,
    )


def changed(bundle: Path, **members: dict[str, Any]) -> Path:
    """Give members other fields and write the manifest anew, over files as they are now."""
    manifest = Manifest.load(bundle / "manifest.json")
    files = {
        name: FileEntry(sha256=sha256_file(path), bytes=path.stat().st_size)
        for name, path in walk(bundle)
        if name not in ("manifest.json", "model.sig")
    }
    updated = [m.model_copy(update=members.get(m.name, {})) for m in manifest.members]
    manifest.model_copy(update={"files": files, "members": updated}).save(bundle / "manifest.json")
    return bundle


def judged(bundle: Path, name: str, hits: Sequence[float]) -> dict[str, Any]:
    """Fields of a member that hit and missed these examples, the scores stored."""
    import numpy as np

    from deploy_prune.release.manifest import QualityEntry
    from deploy_prune.release.scores import save_scores
    from deploy_prune.tasks.quality import share

    rows = np.asarray(hits, float)
    value, interval = share(rows)
    (bundle / "scores").mkdir(exist_ok=True)
    save_scores(bundle / f"scores/{name}.safetensors", rows)
    quality = QualityEntry(metric="top1", value=value, n=len(rows), interval=interval, higher_is_better=True)
    return {"quality": quality, "scores": f"scores/{name}.safetensors"}
