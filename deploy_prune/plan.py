"""A plan says which units each site keeps. It knows nothing of how they were chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError

from deploy_prune.errors import ArtifactError, PlanError
from deploy_prune.files import read_json, write_json
from deploy_prune.units import PER_HEAD, Site, UnitKind, groups

VERSION = 2  # 2: qk and vo units, and sites that vanish


class Costs(BaseModel):
    """Exact figures of a plan: shares removed and what remains. `units` counts kept units by kind."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sparsity: float
    params: int
    macs: int
    bytes: int
    units: dict[str, int]


class Target(BaseModel):
    """What was asked: `Target(budget="sparsity", value=0.3, kinds=("head", "neuron"), align=8)`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    budget: Literal["sparsity", "params", "macs", "bytes", "latency", "speedup"]
    value: float
    kinds: tuple[str, ...]
    align: int


class PrunePlan(BaseModel):
    """Which units every site keeps; the one currency between searches and converters.

    `keep` holds rising indices: {"layers.0.attn": {"head": [0, 2], "qk": [...], "vo": [...]}, "layers.0.mlp": {...}}.
    Heads are named by query head; under grouped queries whole groups stay or go. Unit s of key/value head h is
    h · slots + s for qk and vo; only kept heads have some, and each equally many. Every prunable site is listed; one
    whose lists are all empty vanishes. `basis` is the digest of the basis whose directions the qk and vo units are,
    None when they are the model's own dimensions.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    weights_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    basis: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    keep: dict[str, dict[UnitKind, list[StrictInt]]]
    asked: Target | None = None
    achieved: Costs | None = None

    def kept(self, site: Site, kind: UnitKind) -> list[int]:
        """Indices of the units of `kind` that stay at `site` (key/value groups for heads)."""
        indices = self.keep[site.name][kind]
        if kind is UnitKind.HEAD and site.query_heads_per_unit > 1:
            return sorted({head // site.query_heads_per_unit for head in indices})
        return list(indices)

    def counts(self, sites: Sequence[Site]) -> dict[str, dict[UnitKind, int]]:
        """How many units every site keeps (qk and vo: in every kept head), for cost models."""
        counts = {s.name: {k: len(self.kept(s, k)) for k in s.counts} for s in sites}
        for own in counts.values():
            heads = max(1, own.get(UnitKind.HEAD, 1))
            own.update({k: own[k] // heads for k in PER_HEAD if k in own})
        return counts

    def vanishes(self, site: Site) -> bool:
        """Whether nothing of the site stays."""
        return not any(self.keep[site.name].values())

    def is_nested_in(self, larger: PrunePlan) -> bool:
        """Whether every unit kept here is kept in `larger` too."""
        return all(
            set(indices) <= set(larger.keep.get(site, {}).get(kind, ()))
            for site, kinds in self.keep.items()
            for kind, indices in kinds.items()
        )

    def validate_for(
        self, sites: Sequence[Site], weights_sha256: str | None = None, *, where: str | None = None
    ) -> None:
        """Check the plan against a model. Raises PlanError listing every problem; touches no weight.

        With `weights_sha256` the plan must have been made for exactly those weights.
        """
        problems = list(_problems(self, sites))
        remedy = None
        if weights_sha256 is not None and weights_sha256 != self.weights_sha256:
            problems.append(
                f"weights: the plan was made for sha256 {self.weights_sha256[:12]}…, these are {weights_sha256[:12]}…"
            )
            remedy = "Search again, or pass the checkpoint that the plan names."
        if problems:
            raise PlanError(
                f"{len(problems)} problem{'s' * (len(problems) > 1)}",
                where=f"{where or 'the plan'} for {self.model}",
                problems=problems,
                remedy=remedy,
            )

    def to_json(self) -> dict[str, Any]:
        return {"_type": "PrunePlan", "_version": VERSION, **self.model_dump(mode="json")}

    def save(self, path: Path | str) -> None:
        """Write the plan as JSON, atomically; the same plan is always the same bytes."""
        write_json(path, self.to_json())

    @staticmethod
    def load(path: Path | str) -> PrunePlan:
        """Read a plan. Raises UnavailableError (no file), ArtifactError (not a plan, or a version not known)."""
        return PrunePlan.from_json(read_json(path), where=str(path))

    @staticmethod
    def from_json(data: Any, *, where: str = "plan") -> PrunePlan:
        if not isinstance(data, dict) or data.get("_type") != "PrunePlan":
            raise ArtifactError(
                "not a plan",
                where=where,
                expected='"_type": "PrunePlan"',
                got=repr(data.get("_type") if isinstance(data, dict) else type(data).__name__)[:80],
                remedy="Pass a plans/NAME.json of a bundle.",
            )
        if data.get("_version") != VERSION:
            raise ArtifactError(
                "unknown plan version",
                where=where,
                expected=str(VERSION),
                got=repr(data.get("_version"))[:40],
                remedy="Install a deploy-prune that knows it.",
            )
        try:
            return PrunePlan.model_validate({k: v for k, v in data.items() if k not in ("_type", "_version")})
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:20]]
            raise ArtifactError(
                "not a valid plan",
                where=where,
                problems=problems,
                remedy="The file is damaged or was edited; search again.",
            ) from error


def dense_plan(model: str, weights_sha256: str, sites: Sequence[Site]) -> PrunePlan:
    """The plan that keeps everything."""
    return plan_from_units(model, weights_sha256, sites, {(s.name, k): range(s.units(k)) for s, k in groups(sites)})


def plan_from_units(
    model: str,
    weights_sha256: str,
    sites: Sequence[Site],
    kept: Mapping[tuple[str, UnitKind], Sequence[int]],
    **more: Any,
) -> PrunePlan:
    """A plan from kept unit indices, with head units spelled out as query heads."""
    keep: dict[str, dict[UnitKind, list[int]]] = {}
    for site, kind in groups(sites):
        units = sorted(int(u) for u in kept[site.name, kind])
        if kind is UnitKind.HEAD:
            per = site.query_heads_per_unit
            units = [u * per + i for u in units for i in range(per)]
        keep.setdefault(site.name, {})[kind] = units
    return PrunePlan(model=model, weights_sha256=weights_sha256, keep=keep, **more)


def _problems(plan: PrunePlan, sites: Sequence[Site]) -> Iterator[str]:
    known = {s.name: s for s in sites}
    for name in plan.keep:
        if name not in known:
            yield f"{name}: no such site in the model"
    for name, site in known.items():
        entry = plan.keep.get(name)
        if entry is None:
            yield f"{name}: not in the plan; list every site"
            continue
        for kind in entry:
            if kind not in site.counts:
                yield f"{name}: has no {kind.value} units (it has {', '.join(k.value for k in site.counts)})"
        for kind, units in site.counts.items():
            if kind not in entry:
                yield f"{name}: says nothing of its {kind.value} units"
                continue
            yield from _index_problems(site, kind, units, entry[kind])
        if set(entry) == set(site.counts):
            yield from _emptiness_problems(site, entry)
            yield from _per_head_problems(site, entry)


def _emptiness_problems(site: Site, entry: Mapping[UnitKind, list[int]]) -> Iterator[str]:
    empty = [kind.value for kind in site.counts if not entry[kind]]
    if empty and len(empty) < len(site.counts):
        yield f"{site.name}: keeps no {' and no '.join(empty)} but others; a site that vanishes keeps nothing at all"


def _per_head_problems(site: Site, entry: Mapping[UnitKind, list[int]]) -> Iterator[str]:
    """Every kept head has equally many qk, and equally many vo; a removed one has none."""
    heads = {head // site.query_heads_per_unit for head in entry.get(UnitKind.HEAD, ())}
    for kind in PER_HEAD:
        if kind not in site.counts:
            continue
        have = dict.fromkeys(sorted(heads), 0)
        strangers = set()
        for unit in entry[kind]:
            head = unit // site.counts[kind]
            if head in have:
                have[head] += 1
            else:
                strangers.add(head)
        if strangers:
            yield f"{site.name}: keeps {kind.value} units of the removed heads {_some(sorted(strangers))}"
        if len(set(have.values())) > 1:
            yield f"{site.name}: keeps unequally many {kind.value} in its heads: {_some(list(have.values()))}"


def _index_problems(site: Site, kind: UnitKind, units: int, indices: list[int]) -> Iterator[str]:
    per = site.query_heads_per_unit if kind is UnitKind.HEAD else 1
    have = units * per * site.lanes(kind)
    noun = "query heads" if per > 1 else f"{kind.value} units" if kind in PER_HEAD else f"{kind.value}s"
    outside = [i for i in indices if not 0 <= i < have]
    if outside:
        yield f"{site.name}: keeps {noun} {_some(outside)}, the site has {have} (0-{have - 1})"
    if sorted(set(indices)) != indices:
        yield f"{site.name}: {noun} must be listed once each, in rising order"
    present = set(indices)
    for group in range(units if per > 1 else 0):
        owned = range(group * per, (group + 1) * per)
        part = present.intersection(owned)
        if part and len(part) < per:
            yield (
                f"{site.name}: keeps query heads {_some(sorted(part))} but key/value group {group} owns heads "
                f"{owned[0]}-{owned[-1]}; keep the whole group or none of it"
            )


def _some(indices: Sequence[int]) -> str:
    return ",".join(map(str, indices[:6])) + (f",… ({len(indices)} in all)" if len(indices) > 6 else "")
