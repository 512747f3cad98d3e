"""A plan says which units each site keeps. It knows nothing of how they were chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError

from deploy_prune.errors import ArtifactError, PlanError
from deploy_prune.files import read_json, write_json
from deploy_prune.units import Site, UnitKind, groups

VERSION = 1


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

    budget: Literal["sparsity", "params", "macs", "bytes"]
    value: float
    kinds: tuple[str, ...]
    align: int


class PrunePlan(BaseModel):
    """Which units every site keeps; the one currency between searches and converters.

    `keep` holds sorted indices: {"layers.0.attn": {"head": [0, 1, 2]}, "layers.0.mlp": {"neuron": [...]}}.
    Heads are named by query head; under grouped queries whole groups stay or go. Every prunable site is listed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    weights_sha256: str = Field(pattern="^[0-9a-f]{64}$")
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
        """How many units every site keeps, for cost models and adapters."""
        return {s.name: {k: len(self.kept(s, k)) for k in s.counts} for s in sites}

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
    return plan_from_units(model, weights_sha256, sites, {(s.name, k): range(s.counts[k]) for s, k in groups(sites)})


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


def _index_problems(site: Site, kind: UnitKind, units: int, indices: list[int]) -> Iterator[str]:
    per = site.query_heads_per_unit if kind is UnitKind.HEAD else 1
    have, noun = units * per, "query heads" if per > 1 else f"{kind.value}s"
    if not indices:
        yield f"{site.name}: keeps no {noun}; at least one must stay"
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
