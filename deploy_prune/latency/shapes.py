"""Sites of equal shape cost equally much: which those are, and models that hold only some sites at some widths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from deploy_prune.budget import CostModel
from deploy_prune.plan import PrunePlan, plan_from_units
from deploy_prune.units import PER_HEAD, Site, UnitKind, groups

if TYPE_CHECKING:
    from torch import nn

    from bench.latency_table import Widths

# Sites of one shape that a probe holds. Several, because a graph with one site would keep its weights in the caches,
# and because what is measured is the difference to a graph with none.
COPIES = 4


@dataclass(frozen=True)
class Shape:
    """Sites that differ in nothing a runtime could see. `steps` are the units per kind that make an aligned width."""

    kinds: tuple[UnitKind, ...]
    full: Widths
    steps: Widths
    sites: tuple[Site, ...]

    @property
    def probed(self) -> tuple[Site, ...]:
        """The sites that a probe of this shape holds, spread over the model."""
        count = min(COPIES, len(self.sites))
        return tuple(self.sites[i * len(self.sites) // count] for i in range(count))


def shapes_of(sites: Sequence[Site], costs: CostModel, align: int) -> list[Shape]:
    """The sites grouped by shape, in model order."""
    found: dict[str, list[Site]] = {}
    for site in sites:
        found.setdefault(repr(_form(site, costs)), []).append(site)
    return [
        Shape(
            kinds := _kinds(group[0]),
            tuple(group[0].counts[kind] for kind in kinds),
            tuple(aligned_step(group[0], kind, align) for kind in kinds),
            tuple(group),
        )
        for group in found.values()
    ]


def aligned_step(site: Site, kind: UnitKind, align: int) -> int:
    """Units of `kind` that make `align` features of a layer; heads are not aligned."""
    if kind is UnitKind.HEAD:
        return 1
    width = {UnitKind.QK: site.qk_width, UnitKind.VO: site.vo_width}.get(kind, site.counts[kind])
    return min(site.counts[kind], max(1, -(-align // max(1, width // site.counts[kind]))))


def probe_plan(sites: Sequence[Site], held: Mapping[str, Mapping[UnitKind, int]]) -> PrunePlan:
    """The plan under which the sites `held` keep their first so many units and all others vanish."""
    kept: dict[tuple[str, UnitKind], list[int]] = {}
    for site, kind in groups(sites):
        own = held.get(site.name, {})
        count = own.get(kind, 0)
        heads = own.get(UnitKind.HEAD, 0) if kind in PER_HEAD else 1
        kept[site.name, kind] = [lane * site.counts[kind] + slot for lane in range(heads) for slot in range(count)]
    return plan_from_units("a probe for the latency table", "0" * 64, sites, kept)


def probe(model: nn.Module, sites: Sequence[Site], held: Mapping[str, Mapping[UnitKind, int]]) -> nn.Module:
    """The model that `probe_plan` cuts; its answers mean nothing."""
    from converters.surgery import compact

    return compact(model, probe_plan(sites, held), check_weights=False)


def at_widths(shape: Shape, widths: Sequence[int]) -> dict[str, dict[UnitKind, int]]:
    """What a probe of one shape holds."""
    return {site.name: dict(zip(shape.kinds, widths, strict=True)) for site in shape.probed}


def _kinds(site: Site) -> tuple[UnitKind, ...]:
    """The kind without which there is no sublayer first."""
    return (site.vanishing_kind, *(kind for kind in site.counts if kind is not site.vanishing_kind))


def _form(site: Site, costs: CostModel) -> Any:
    layers = [asdict(costs.layers[name]) for name in dict.fromkeys(name for name, _ in site.axes())]
    return (
        site.kind.value,
        sorted((kind.value, n) for kind, n in site.counts.items()),
        (site.heads, site.kv_heads, site.qk_width, site.vo_width),
        layers,
        costs.pairs.get(site.name),
        costs.alone[site.name],
    )
