"""Two bundles of one family: what got worse, what got better, and what is noise. No torch.

Members are matched by name. Counts (bytes, MACs, parameters) are exact: any change is real. Quality and latency have
intervals: only a change whose 95 % interval excludes none is called a regression or an improvement.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from deploy_prune.errors import ArtifactError, UsageError
from deploy_prune.release.gate import cell_name
from deploy_prune.release.manifest import MANIFEST, LatencyEntry, Manifest, Member
from deploy_prune.release.scores import drop, load_scores

Kind = Literal["regression", "improvement", "noise", "equal", "missing", "new", "not comparable"]


@dataclass(frozen=True)
class Finding:
    """`Finding("s50", "top1", "regression", "0.982", "0.961", 0.021, (0.01, 0.03))`: `change` is how much worse the new
    figure is, as a share of the old one; negative is better. `fails` when it is worse than allowed."""

    member: str
    figure: str
    kind: Kind
    old: str
    new: str
    change: float | None = None
    interval: tuple[float, float] | None = None
    fails: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Comparison:
    """Everything that two bundles have in common, and what one of them lacks."""

    old: str
    new: str
    max_regression: float
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        return not any(finding.fails for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def compare_bundles(
    old: Path | str, new: Path | str, *, max_regression: float = 0.0, allow_incomparable: bool = False
) -> Comparison:
    """Compare two bundles figure by figure. A regression of more than `max_regression` (0.03 is 3 %) fails, as do a
    member or figure that the new bundle lacks and, unless allowed, figures that were measured otherwise.

    Raises UnavailableError or ArtifactError for what is no bundle, UsageError when the two share no member.
    """
    folders = Path(old), Path(new)
    before, after = (Manifest.load(folder / MANIFEST) for folder in folders)
    newer = {member.name: member for member in after.members}
    if not any(member.name in newer for member in before.members):
        raise UsageError(
            "the bundles have no member in common",
            where=f"{old} and {new}",
            expected=", ".join(member.name for member in before.members),
            got=", ".join(newer),
        )
    findings: list[Finding] = []
    for member in before.members:
        if member.name not in newer:
            findings.append(Finding(member.name, "member", "missing", "there", "", fails=True))
            continue
        counterpart = newer[member.name]
        findings += _quality(folders, (before, after), member, counterpart, max_regression)
        findings += _counts(member, counterpart, max_regression)
        findings += _latency((before, after), member, counterpart, max_regression)
    known = {member.name for member in before.members}
    findings += [Finding(name, "member", "new", "", "there") for name in newer if name not in known]
    if allow_incomparable:
        findings = [replace(f, fails=False) if f.kind == "not comparable" else f for f in findings]
    return Comparison(before.name, after.name, max_regression, tuple(findings))


def _quality(
    folders: tuple[Path, Path], manifests: tuple[Manifest, Manifest], old: Member, new: Member, limit: float
) -> Iterator[Finding]:
    if old.quality is None:
        if new.quality is not None:
            yield Finding(new.name, new.quality.metric, "new", "", f"{new.quality.value:.4g}")
        return
    metric, text = old.quality.metric, f"{old.quality.value:.4g}"
    if new.quality is None or new.quality.metric != metric:
        yield Finding(old.name, metric, "missing", text, new.quality.metric if new.quality else "", fails=True)
        return
    result = f"{new.quality.value:.4g}"
    asked = [manifest.task.get("evaluation") for manifest in manifests]
    if asked[0] != asked[1] or old.quality.detail != new.quality.detail:
        reason = "judged on other data, or otherwise"
        yield Finding(old.name, metric, "not comparable", text, result, fails=True, reason=reason)
        return
    rows = [
        load_scores(folder / member.scores) if member.scores else None
        for folder, member in zip(folders, (old, new), strict=True)
    ]
    change = drop(old.quality, new.quality, *rows)
    scale = abs(old.quality.value)
    if not scale:
        reason = "a share of 0 says nothing"
        yield Finding(old.name, metric, "not comparable", text, result, fails=True, reason=reason)
        return
    yield _judged(
        old.name,
        metric,
        text,
        result,
        (change.value / scale, change.low / scale, change.high / scale),
        limit,
        "the same examples" if change.paired else "as if on different examples",
    )


def _counts(old: Member, new: Member, limit: float) -> Iterator[Finding]:
    pairs = [("bytes", old.bytes, new.bytes)]
    if old.achieved is not None and new.achieved is not None:
        pairs += [
            ("MACs", old.achieved.macs, new.achieved.macs),
            ("parameters", old.achieved.params, new.achieved.params),
        ]
    for figure, before, after in pairs:
        change = (after - before) / before if before else math.inf * (after > before)
        kind: Kind = "regression" if after > before else "improvement" if after < before else "equal"
        fails = kind == "regression" and change > limit
        yield Finding(old.name, figure, kind, f"{before:,}", f"{after:,}", change if before else None, None, fails)


def _latency(manifests: tuple[Manifest, Manifest], old: Member, new: Member, limit: float) -> Iterator[Finding]:
    """Latency relative to the dense model of the same run: what slowed a whole run (another load, another clock) slowed
    both. The dense models must be the same file, on the same device."""
    after = {cell_name(entry): entry for entry in new.latency}
    before = {cell_name(entry): entry for entry in old.latency}
    baseline = manifests[0].dense.sha256 == manifests[1].dense.sha256
    if old.name == manifests[0].dense.name and baseline:
        return  # its ratio to itself is 1
    for cell, entry in before.items():
        figure = f"time/dense {cell}"
        other = after.get(cell)
        if other is None:
            yield Finding(old.name, figure, "missing", f"{entry.ratio.value:.3f}", "", fails=True)
            continue
        texts = (f"{entry.ratio.value:.3f}", f"{other.ratio.value:.3f}")
        reason = _incomparable(entry, other, baseline)
        if reason:
            yield Finding(old.name, figure, "not comparable", *texts, fails=True, reason=reason)
            continue
        change = _ratio_change(entry, other)
        yield _judged(old.name, figure, *texts, change, limit, f"on {entry.device or 'an unnamed device'}")
    for cell in after.keys() - before.keys():
        yield Finding(new.name, f"time/dense {cell}", "new", "", f"{after[cell].ratio.value:.3f}")


def _incomparable(old: LatencyEntry, new: LatencyEntry, baseline: bool) -> str:
    if not baseline:
        return "the dense models are different files"
    if old.device != new.device:
        return f"measured on {old.device} and on {new.device}"
    if not (old.trusted and new.trusted):
        return "a self-check failed: dense differed from itself"
    return ""


def _ratio_change(old: LatencyEntry, new: LatencyEntry) -> tuple[float, float, float]:
    """new/old - 1 of two ratios of separate runs, with its interval: on the logarithms, where a ratio's interval is
    nearly symmetric, the two intervals are combined as in `scores.drop`."""
    for ratio in (old.ratio, new.ratio):
        if not 0 < ratio.low <= ratio.value <= ratio.high:
            raise ArtifactError("a latency ratio has no sound interval", got=str(ratio))
    a, b = ([math.log(x) for x in (r.low, r.value, r.high)] for r in (old.ratio, new.ratio))
    value = b[1] - a[1]
    low = value - math.hypot(b[1] - b[0], a[2] - a[1])
    high = value + math.hypot(b[2] - b[1], a[1] - a[0])
    return math.expm1(value), math.expm1(low), math.expm1(high)


def _judged(
    member: str, figure: str, old: str, new: str, change: tuple[float, float, float], limit: float, reason: str
) -> Finding:
    value, low, high = change
    kind: Kind = "regression" if low > 0 else "improvement" if high < 0 else "equal" if low == high == 0 else "noise"
    return Finding(member, figure, kind, old, new, value, (low, high), kind == "regression" and value > limit, reason)
