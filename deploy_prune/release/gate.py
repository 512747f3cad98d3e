"""Gate: a bundle's figures against release rules, one verdict per rule, member and latency cell. No torch.

A figure that nobody measured breaks a rule as a bad one does, unless the rules allow that by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from deploy_prune.errors import ArtifactError, DeployPruneError, ParityError
from deploy_prune.progress import SILENT, Progress
from deploy_prune.release.manifest import MANIFEST, LatencyEntry, Manifest, Member
from deploy_prune.release.rules import LATENCY_RULES, Rules, RuleSet
from deploy_prune.release.scores import drop_from_dense

Outcome = Literal["passed", "failed", "not measured", "allowed"]
BUNDLE = "(bundle)"


@dataclass(frozen=True)
class Verdict:
    """`Verdict("max_drop", "s50", "failed", "0.021 [0.009, 0.034]", "1% of 0.98")`; `cell` is a latency cell such as
    "ort-cpu b8". "allowed" is a figure that nobody measured and the rules do without."""

    rule: str
    member: str
    outcome: Outcome
    figure: str
    limit: str
    cell: str = ""
    reason: str = ""

    @property
    def holds(self) -> bool:
        return self.outcome in ("passed", "allowed")

    @property
    def name(self) -> str:
        return f"{self.rule} ({self.cell})" if self.cell else self.rule


@dataclass(frozen=True)
class GateReport:
    """All verdicts on one bundle. `error` is what made verification fail, if anything did."""

    bundle: str
    manifest_sha256: str
    verdicts: tuple[Verdict, ...]
    error: DeployPruneError | None = None

    @property
    def passed(self) -> bool:
        return all(verdict.holds for verdict in self.verdicts)

    @property
    def failures(self) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if not verdict.holds]

    def to_json(self) -> dict[str, Any]:
        return {
            "bundle": self.bundle,
            "manifest_sha256": self.manifest_sha256,
            "passed": self.passed,
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
        }


def gate(bundle: Path | str, rules: Rules, *, progress: Progress = SILENT) -> GateReport:
    """Judge every rule. Raises UnavailableError, ArtifactError when there is no readable manifest to judge, UsageError
    when a rule names members that are not there; broken rules are in the report, not raised."""
    from deploy_prune.files import sha256_file

    bundle = Path(bundle)
    manifest = Manifest.load(bundle / MANIFEST)
    names = [member.name for member in manifest.members]
    chosen = [rule_set.select(names) for rule_set in rules.rules]
    verdicts: list[Verdict] = []
    error, measured = _verify(bundle, rules, verdicts, progress)
    for rule_set in rules.rules:
        if rule_set.license:
            verdicts += [_settle(verdict, rule_set) for verdict in _licenses(manifest)]
    for rule_set, selected in zip(rules.rules, chosen, strict=True):
        for member in manifest.members:
            if member.name in selected:
                verdicts += _judge(bundle, manifest, member, rule_set, measured.get(member.name, 0.0))
    unique = tuple(dict.fromkeys(verdicts))
    return GateReport(manifest.name, sha256_file(bundle / MANIFEST), unique, error)


def _verify(
    bundle: Path, rules: Rules, verdicts: list[Verdict], progress: Progress
) -> tuple[DeployPruneError | None, dict[str, float]]:
    """Add the verdicts on the whole bundle; returns what failed, and each member's parity error measured here."""
    from deploy_prune.release.verify import verify

    error: DeployPruneError | None = None
    measured: dict[str, float] = {}
    for key in dict.fromkeys(rule_set.signature for rule_set in rules.rules if rule_set.signature):
        from deploy_prune.release.signing import check_signature

        try:
            check_signature(bundle, key)
        except ArtifactError as bad:
            error = error or bad
            verdicts.append(Verdict("signature", BUNDLE, "failed", "not good", key, reason=str(bad)))
        else:
            verdicts.append(Verdict("signature", BUNDLE, "passed", "good", key))
    if any(rule_set.verify for rule_set in rules.rules):
        try:
            report = verify(bundle, progress=progress)
        except (ArtifactError, ParityError) as bad:
            error = error or bad
            verdicts.append(Verdict("verify", BUNDLE, "failed", bad.what, "whole and as made", reason=str(bad)))
        else:
            measured = {check.name: check.error for check in report.members}
            verdicts.append(Verdict("verify", BUNDLE, "passed", f"{report.files} files", "whole and as made"))
    return error, measured


def _licenses(manifest: Manifest) -> Iterator[Verdict]:
    """One verdict for the dense model's weights and one for the data. That the licence permits shipping is for people
    to judge."""
    for what, origin in (("weights", manifest.provenance.model), ("data", manifest.provenance.data)):
        if origin.license is None:
            reason = f"neither the recipe (provenance) nor the files of the {what} say"
            yield Verdict("license", BUNDLE, "not measured", "unknown", "known", what, reason)
        else:
            yield Verdict("license", BUNDLE, "passed", origin.license, "known", what, f"by {origin.stated_by}")


def _judge(bundle: Path, manifest: Manifest, member: Member, rules: RuleSet, parity: float) -> Iterator[Verdict]:
    """One verdict per rule of the set, and per cell for latency."""
    if rules.max_drop is not None:
        yield _settle(_drop(bundle, manifest, member, rules), rules)
    for name in LATENCY_RULES:
        if (limit := getattr(rules, name)) is not None:
            for verdict in _latency(name, limit, member, rules):
                yield _settle(verdict, rules)
    dense = manifest.dense
    costs, reference = member.achieved, dense.achieved
    for name, value, whole in (
        ("max_bytes", member.bytes, dense.bytes),
        ("max_macs", costs and costs.macs, reference and reference.macs),
        ("max_params", costs and costs.params, reference and reference.params),
    ):
        if (amount := getattr(rules, name)) is not None:
            limit = amount.resolve(whole)
            text = f"{amount} of {whole:,}" if amount.of_dense and whole is not None else str(amount)
            if value is None or limit is None:
                yield _settle(_unmeasured(name, member, text, "the manifest has no such count"), rules)
            else:
                yield Verdict(name, member.name, "passed" if value <= limit else "failed", f"{value:,}", text)
    if rules.max_parity is not None:
        yield _settle(_parity(member, rules.max_parity, parity), rules)
    if rules.audit:
        yield _settle(_audit(member), rules)
    for runtime in rules.require_runtime:
        yield _settle(_runtime(member, runtime), rules)


def _drop(bundle: Path, manifest: Manifest, member: Member, rules: RuleSet) -> Verdict:
    amount, dense = rules.max_drop, manifest.dense.quality
    assert amount is not None
    text = f"{amount} of {dense.value:.4g}" if amount.of_dense and dense else str(amount)
    try:
        change = drop_from_dense(bundle, manifest, member)
    except DeployPruneError as error:
        return Verdict("max_drop", member.name, "failed", "unreadable", text, reason=str(error))
    limit = amount.resolve(dense.value if dense else None)
    if change is None or limit is None or dense is None:
        return _unmeasured("max_drop", member, text, "the member or the dense model was not judged on data")
    judged = change.high if rules.bound == "interval" else change.value
    figure = f"{change.value:.4g} [{change.low:.4g}, {change.high:.4g}] {dense.metric}"
    how = "" if change.paired else "interval from the two models' own intervals"
    reason = f"{rules.bound}; n={member.quality.n if member.quality else 0}" + (f"; {how}" if how else "")
    return Verdict(
        "max_drop", member.name, "passed" if judged <= limit + 1e-12 else "failed", figure, text, reason=reason
    )


def _latency(name: str, limit: float, member: Member, rules: RuleSet) -> Iterator[Verdict]:
    unit = "x dense" if name == "min_speedup" else "ms"
    text = f"{limit:g} {unit}"
    cells = [
        entry
        for entry in member.latency
        if rules.runtime in (None, entry.runtime)
        and rules.batch in (None, entry.batch)
        and rules.sequence in (None, entry.sequence)
        and (entry.past == rules.past or (rules.past is None and rules.sequence is None))
    ]
    wanted = " ".join(
        part
        for part in (
            rules.runtime or "",
            f"b{rules.batch}" if rules.batch else "",
            f"s{rules.sequence}" if rules.sequence else "",
            "" if rules.past is None else f"past {rules.past}",
        )
        if part
    )
    if not cells:
        timed = ", ".join(map(cell_name, member.latency))
        why = f"no such cell was timed, only {timed}" if timed else "nothing was timed"
        if not timed and member.precision != "fp32":
            why += f": does a runtime of the run compute in {member.precision}?"
        yield _unmeasured(name, member, text, why, wanted)
    for entry in cells:
        cell = cell_name(entry)
        if not entry.trusted:
            yield _unmeasured(name, member, text, "the cell's self-check failed: dense differed from itself", cell)
            continue
        if name == "min_speedup":
            ratio = entry.ratio
            judged = 1 / (ratio.high if rules.bound == "interval" else ratio.value)
            figure = f"{1 / ratio.value:.3g} [{1 / ratio.high:.3g}, {1 / ratio.low:.3g}]"
            good, reason = judged >= limit, str(rules.bound)
        else:
            value = getattr(entry, name.removeprefix("max_"))
            figure, good, reason = f"{value:.4g}", value <= limit, ""
        notes = [note for note in (reason, "" if entry.stable else "not settled in the warm-up") if note]
        yield Verdict(
            name, member.name, "passed" if good else "failed", figure, text, cell, "; ".join([*notes, _device(entry)])
        )


def cell_name(entry: LatencyEntry) -> str:
    """`ort-cpu b8 s128`."""
    return f"{entry.runtime} {sizes_name(entry)}"


def sizes_name(entry: LatencyEntry) -> str:
    """`b8 s128`, `b1 past 128`, `b1 s128 past 0`."""
    parts = (
        f"b{entry.batch}",
        f"s{entry.sequence}" if entry.sequence else "",
        "" if entry.past is None else f"past {entry.past}",
    )
    return " ".join(part for part in parts if part)


def _device(entry: LatencyEntry) -> str:
    return f"on {entry.device}" if entry.device else "on an unnamed device"


def _parity(member: Member, limit: float, measured: float) -> Verdict:
    stated = member.parity.get("error")
    if not isinstance(stated, (int, float)):
        return _unmeasured("max_parity", member, f"{limit:g}", "the manifest states no parity error")
    worst = max(float(stated), measured)
    return Verdict("max_parity", member.name, "passed" if worst <= limit else "failed", f"{worst:.2g}", f"{limit:g}")


def _audit(member: Member) -> Verdict:
    if member.audit is None or not isinstance(member.audit.get("passed"), bool):
        return _unmeasured("audit", member, "passed", "the bundle holds no audit of this graph")
    passed = member.audit["passed"]
    problems = "; ".join(map(str, member.audit.get("problems", [])))
    return Verdict(
        "audit", member.name, "passed" if passed else "failed", "passed" if passed else "failed", "passed", "", problems
    )


def _runtime(member: Member, runtime: str) -> Verdict:
    timed = [entry for entry in member.latency if entry.runtime == runtime]
    if not timed:
        others = ", ".join(sorted({entry.runtime for entry in member.latency})) or "none"
        return _unmeasured("require_runtime", member, runtime, f"timed in: {others}")
    return Verdict("require_runtime", member.name, "passed", f"{len(timed)} cells", runtime)


def _unmeasured(rule: str, member: Member, limit: str, reason: str, cell: str = "") -> Verdict:
    return Verdict(rule, member.name, "not measured", "–", limit, cell, reason)


def _settle(verdict: Verdict, rules: RuleSet) -> Verdict:
    """The same verdict, or "allowed" where the rules do without the figure."""
    if verdict.outcome == "not measured" and verdict.rule in rules.allow_unmeasured:
        return Verdict(**{**asdict(verdict), "outcome": "allowed"})
    return verdict
