"""A solution path: for every unit the share of the way at which it leaves. Thresholding it gives nested plans."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from deploy_prune.budget import BUDGETS, BYTES_PER_PARAMETER, Budget, CostModel
from deploy_prune.errors import ArtifactError, BudgetError, UsageError, did_you_mean
from deploy_prune.files import atomic_file, existing_file
from deploy_prune.plan import Costs, PrunePlan, Target, plan_from_units
from deploy_prune.slots import Slots, by_slot, rank_in_lane
from deploy_prune.units import PER_HEAD, Site, UnitKind, groups, site_from_json, site_to_json, unit_key

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deploy_prune.basis import Basis

VERSION = 2  # 2: qk and vo units, and sites that vanish
_BASIS = "basis:"  # before the unit key, in the names of a file's tensors
# How importance becomes an order of leaving.
#   global: by importance per parameter, over all sites and kinds (thresholded together at equal cost);
#   separate: the same within each kind, every kind giving up the same share of its parameters (the paper's quantiles);
#   uniform: the same within each site, every site giving up the same share.
Allocation = Literal["global", "separate", "uniform"]
ALLOCATIONS: tuple[str, ...] = get_args(Allocation)


@dataclass(frozen=True)
class SolutionPath:
    """`scores` maps a unit key ("blocks.3.attn/head") to float64 (units,) in (0, 1]: small leaves first.

    A score is the share of prunable parameters gone once that unit has left, so a threshold is a sparsity; where units
    of two kinds share parameters (a head and its dimensions) they count for both, and it is a little more than that.
    qk and vo leave in slots, one unit of every head at once, each head's least important first: the units of a slot
    have one score. `plan` finds the exact costs. `basis` holds the directions that the qk and vo units are, None when
    they are the model's own dimensions.
    """

    model: str
    weights_sha256: str
    sites: tuple[Site, ...]
    costs: CostModel
    scores: Mapping[str, NDArray[np.float64]]
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    basis: Basis | None = None

    @staticmethod
    def from_importance(
        importance: Mapping[str, NDArray[Any]],
        *,
        allocation: Allocation = "global",
        model: str,
        weights_sha256: str,
        sites: Sequence[Site],
        costs: CostModel,
        method: str,
        options: Mapping[str, Any] | None = None,
        basis: Basis | None = None,
    ) -> SolutionPath:
        """Order the units by `importance` (larger stays longer; (units,) per key) under an allocation.

        Raises UsageError for an unknown allocation or when an importance is not finite.
        """
        if allocation not in ALLOCATIONS:
            raise UsageError(f"unknown allocation {allocation!r}", remedy=did_you_mean(allocation, ALLOCATIONS))
        bad = [key for key, values in importance.items() if not np.isfinite(values).all()]
        if bad:
            raise UsageError(
                "importance is not finite",
                problems=bad,
                where=method,
                remedy="The model or its data produces NaN; try precision: fp32.",
            )
        units = Slots.of(sites, costs, None)
        rank = {
            unit_key(s.name, k): rank_in_lane(np.asarray(importance[unit_key(s.name, k)], np.float64), s.lanes(k))
            for s, k in units.groups
        }
        slots = [by_slot(np.asarray(importance[key], np.float64), rank[key]) for key in units.keys]
        raw = np.concatenate(slots)
        pool = {"global": np.zeros_like(units.group), "separate": units.kind, "uniform": units.group}[allocation]
        within = np.zeros(len(raw))
        for p in np.unique(pool):
            members = np.flatnonzero(pool == p)
            order = members[np.argsort((raw / units.params)[members], kind="stable")]
            within[order] = np.cumsum(units.params[order]) / units.params[order].sum()
        order = np.argsort(within, kind="stable")
        score = np.empty(len(raw))
        score[order] = np.cumsum(units.params[order]) / units.params.sum()
        scores = {key: score[units.group == g][rank[key]] for g, key in enumerate(units.keys)}
        options = {"allocation": allocation, **(options or {})}
        return SolutionPath(model, weights_sha256, tuple(sites), costs, scores, method, options, basis)

    def plan(
        self,
        sparsity: float | None = None,
        *,
        budget: Budget = "sparsity",
        value: float | None = None,
        kinds: Sequence[str] | None = None,
        align: int = 1,
    ) -> PrunePlan:
        """The first plan along the path that meets the target; plans of one path, kinds and alignment are nested.

        `sparsity` (or budget="sparsity", value=...) is the share of prunable parameters, of the given unit `kinds`,
        to remove: the least plan that removes at least so much. For `params`, `macs` and `bytes`, `value` is the most
        that may remain, as a number or, below 1, as a share of the dense model. `align` keeps every site's neurons, and
        the query/key and value widths of its heads, at a multiple of it (or whole). A site may vanish; one that stays
        keeps at least one unit of every kind.

        Raises UsageError for a target outside its range, BudgetError naming the best reachable.
        """
        value = self.check_target(sparsity, budget, value, align)
        chosen = self.kinds(kinds)
        units = Slots.of(self.sites, self.costs, chosen)
        score = np.concatenate(
            [np.sort(self.scores[key])[:: s.lanes(k)] for (s, k), key in zip(units.groups, units.keys, strict=True)]
        )
        order = np.argsort(score, kind="stable")
        groups_in_order = units.group[order]
        sizes = np.bincount(units.group, minlength=len(units.keys))
        prunable = self.costs.prunable(self.sites, chosen)

        def counts_after(leaving: int) -> NDArray[np.int64]:
            kept = sizes - np.bincount(groups_in_order[:leaving], minlength=len(units.keys))
            kept = np.maximum(kept, units.least)
            step = units.steps(align)
            return np.minimum(sizes, -(-kept // step) * step)

        def costs_after(leaving: int) -> Costs:
            return self._costs(counts_after(leaving), units, chosen, prunable)

        def met(costs: Costs) -> bool:
            if budget == "sparsity":
                return costs.sparsity >= value - 1e-12
            return bool(getattr(costs, budget) <= value)

        best = costs_after(len(order))
        if not met(best):
            figure = f"{best.sparsity:.4f} sparsity" if budget == "sparsity" else f"{getattr(best, budget)} {budget}"
            raise BudgetError(
                f"no plan of this path reaches {budget} {value:g}",
                expected=f"{budget} {value:g}",
                got=f"best reachable: {figure} (kinds {', '.join(k.value for k in chosen)}, align {align})",
                remedy="Ask for less, allow more unit kinds, or lower the alignment.",
            )
        low, high = 0, len(order)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if met(costs_after(middle)) else (middle + 1, high)
        return self._cut(
            counts_after(low),
            units,
            Target(budget=budget, value=value, kinds=tuple(k.value for k in chosen), align=align),
            costs_after(low),
        )

    def plan_keeping(self, counts: Mapping[str, Mapping[UnitKind, int]], asked: Target) -> PrunePlan:
        """The plan under which every site keeps so many units of each kind (qk, vo: in every kept head), the last of
        them to leave along the path; for choices between sites that are made elsewhere."""
        units = Slots.of(self.sites, self.costs, None)
        kept = np.array([counts[site.name][kind] for site, kind in units.groups], np.int64)
        kinds = self.kinds(asked.kinds)
        return self._cut(kept, units, asked, self._costs(kept, units, kinds, self.costs.prunable(self.sites, kinds)))

    def _cut(self, counts: NDArray[np.int64], units: Slots, asked: Target, achieved: Costs) -> PrunePlan:
        """The plan that keeps the last `counts` slots of every group to leave."""
        from deploy_prune.basis import basis_digest

        kept = {(s.name, k): np.arange(s.units(k)) for s, k in groups(self.sites)}
        for g, (site, kind) in enumerate(units.groups):
            rank = rank_in_lane(self.scores[units.keys[g]], site.lanes(kind))
            kept[site.name, kind] = np.flatnonzero(rank >= site.counts[kind] - int(counts[g]))
        for site in self.sites:  # what is not of a kept head leaves with its head
            heads = kept.get((site.name, UnitKind.HEAD))
            for kind in PER_HEAD:
                if heads is not None and kind in site.counts:
                    own = kept[site.name, kind]
                    kept[site.name, kind] = own[np.isin(own // site.counts[kind], heads)]
        return plan_from_units(
            self.model,
            self.weights_sha256,
            self.sites,
            {key: units.tolist() for key, units in kept.items()},
            asked=asked,
            achieved=achieved,
            basis=None if self.basis is None else basis_digest(self.basis),
        )

    def _costs(self, counts: NDArray[np.int64], units: Slots, kinds: Sequence[UnitKind], prunable: int) -> Costs:
        of: dict[str, dict[UnitKind, int]] = {s.name: dict(s.counts) for s in self.sites}
        for (site, kind), count in zip(units.groups, counts, strict=True):
            of[site.name][kind] = int(count)
        for site in self.sites:
            if not of[site.name][site.vanishing_kind]:
                of[site.name] = dict.fromkeys(of[site.name], 0)
        params = self.costs.params_of(self.sites, of)
        by_kind: dict[str, int] = {}
        for site, kind in groups(self.sites):
            lanes = of[site.name][UnitKind.HEAD] if kind in PER_HEAD else 1
            by_kind[kind.value] = by_kind.get(kind.value, 0) + lanes * of[site.name][kind]
        return Costs(
            sparsity=(self.costs.params - params) / prunable,
            params=params,
            macs=self.costs.macs_of(self.sites, of),
            bytes=BYTES_PER_PARAMETER * params,
            units=by_kind,
        )

    def check_target(self, sparsity: float | None, budget: str, value: float | None, align: int) -> float:
        if budget not in BUDGETS:
            raise UsageError(f"unknown budget {budget!r}", remedy=did_you_mean(budget, BUDGETS))
        if sparsity is not None:
            if value is not None or budget != "sparsity":
                raise UsageError("two targets given", expected="sparsity, or budget and value", remedy="Give one.")
            value = sparsity
        if value is None:
            raise UsageError("no target given", expected="sparsity=0.3, or budget='macs', value=...")
        if align < 1:
            raise UsageError("alignment must be at least 1", got=str(align))
        if budget == "sparsity":
            if not 0 < value < 1:
                raise UsageError(
                    "sparsity out of range",
                    expected="a share between 0 and 1, both excluded",
                    got=f"{value:g}",
                    remedy="0.3 removes 30 % of the prunable parameters.",
                )
            return float(value)
        dense = {
            "params": self.costs.params,
            "macs": self.costs.macs,
            "bytes": BYTES_PER_PARAMETER * self.costs.params,
        }[budget]
        if not value > 0:
            raise UsageError(
                f"{budget} out of range", expected="a positive number or a share of the dense model", got=f"{value:g}"
            )
        if value > dense:
            raise UsageError(
                f"{budget} out of range",
                expected=f"at most the dense model's {dense}",
                got=f"{value:g}",
                remedy="A value below 1 is a share of the dense model.",
            )
        return float(value * dense if value < 1 else value)

    def kinds(self, kinds: Sequence[str] | None = None) -> tuple[UnitKind, ...]:
        """The kinds of units that are named, in model order; all by default. Raises UsageError."""
        have = tuple(dict.fromkeys(k for _, k in groups(self.sites)))
        if kinds is None:
            return have
        unknown = [k for k in kinds if k not in have]
        if unknown or not kinds:
            raise UsageError(
                f"the model has no units of kind {', '.join(map(repr, unknown)) or 'nothing'}",
                remedy=did_you_mean(unknown[0] if unknown else "", [k.value for k in have]),
            )
        return tuple(k for k in have if k in kinds)

    def named(self, model: str) -> SolutionPath:
        """The same path under another model reference."""
        return replace(self, model=model)

    def content_sha256(self) -> str:
        """Hex SHA-256 of everything the path says."""
        return _digest(self._meta(), self._tensors())

    def save(self, path: Path | str) -> None:
        """Write the path as safetensors, atomically; the same path is always the same bytes."""
        from safetensors.numpy import save

        meta, tensors = self._meta(), self._tensors()
        meta["sha256"] = _digest(meta, tensors)
        data = save(
            {key: np.ascontiguousarray(v) for key, v in sorted(tensors.items())},
            {"deploy_prune": json.dumps(meta, sort_keys=True)},
        )
        with atomic_file(path) as temporary:
            temporary.write_bytes(data)

    def _tensors(self) -> dict[str, NDArray[Any]]:
        return {**self.scores, **{_BASIS + key: rows.numpy() for key, rows in (self.basis or {}).items()}}

    def _meta(self) -> dict[str, Any]:
        return {
            "_type": "SolutionPath",
            "_version": VERSION,
            "model": self.model,
            "weights_sha256": self.weights_sha256,
            "method": self.method,
            "options": dict(self.options),
            "costs": self.costs.to_json(),
            "sites": [site_to_json(s) for s in self.sites],
        }

    @staticmethod
    def load(path: Path | str) -> SolutionPath:
        """Read a path. Raises UnavailableError (no file), ArtifactError (damaged, or not a path)."""
        from safetensors import SafetensorError, safe_open

        path = existing_file(path, "path file")
        try:
            with safe_open(path, framework="np") as file:
                meta = json.loads((file.metadata() or {})["deploy_prune"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if meta["_type"] != "SolutionPath" or meta["_version"] != VERSION:
                raise ValueError(f"type {meta['_type']!r}, version {meta['_version']!r}")
            if meta.pop("sha256") != _digest(meta, tensors):
                raise ValueError("the content is not what its sha256 says")
            scores = {key: values for key, values in tensors.items() if not key.startswith(_BASIS)}
            loaded = SolutionPath(
                meta["model"],
                meta["weights_sha256"],
                tuple(site_from_json(s) for s in meta["sites"]),
                CostModel.from_json(meta["costs"]),
                scores,
                meta["method"],
                meta["options"],
                _basis_of(tensors),
            )
            for site, kind in groups(loaded.sites):
                values = scores[unit_key(site.name, kind)]
                if values.shape != (site.units(kind),) or not np.isfinite(values).all():
                    raise ValueError(f"scores of {site.name}/{kind.value} have shape {values.shape}")
        except (
            SafetensorError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
            RecursionError,
        ) as error:
            raise ArtifactError(
                "not a whole solution path",
                where=str(path),
                got=f"{type(error).__name__}: {error}"[:200],
                remedy="The file is damaged or something else; search again.",
            ) from error
        return loaded


def _basis_of(tensors: Mapping[str, NDArray[Any]]) -> Basis | None:
    import torch

    rows = {key.removeprefix(_BASIS): torch.from_numpy(v) for key, v in tensors.items() if key.startswith(_BASIS)}
    return rows or None


def _digest(meta: Mapping[str, Any], scores: Mapping[str, NDArray[Any]]) -> str:
    """Hex SHA-256 of everything a path file says, so that a flipped bit anywhere is seen."""
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for key, values in sorted(scores.items()):
        digest.update(f"{key}|{values.dtype}|{values.shape}|".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()
