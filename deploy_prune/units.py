"""Sites and units: what a transformer is made of, as far as pruning is concerned.

A *site* is one attention or feed-forward sublayer. A *unit* is the smallest thing that can be removed there.
Where a unit's weights lie is data (`Slice`), so that gating, scoring, costing and cutting need no code per model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Axis = Literal["out", "in"]


class UnitKind(StrEnum):
    """What can be removed.

    `head`: a head; under grouped queries a key/value head with its query heads. `qk`: a query/key dimension of one head
    (under rotary embedding a pair of them). `vo`: a value/output dimension of one head. `neuron`: a hidden dimension of
    a feed-forward.
    """

    HEAD = "head"
    QK = "qk"
    VO = "vo"
    NEURON = "neuron"


PER_HEAD = (UnitKind.QK, UnitKind.VO)  # their units lie in every head, and every head keeps equally many


class SiteKind(StrEnum):
    ATTENTION = "attention"
    FEED_FORWARD = "feed_forward"


@dataclass(frozen=True)
class Slice:
    """The features of one layer that belong to a site's units.

    Unit u of a kind with `slots` units in every head lies in lane l = u // slots (a head) at slot s = u % slots, and
    owns the features  start + l·lane + s·step + Σ_i k_i·stride_i  for all 0 <= k_i < count_i, with `repeat` the
    (count, stride) pairs. `Slice("blocks.0.attn.qkv", "out", step=64, repeat=((64, 1), (3, 192)))`: head u owns
    64 neighbouring output features in each of three stacked parts.

    A slice without features (a count of 0) says that the layer serves the site, is never cut and leaves with it.

    `layer` is a module with a weight (torch.nn.Linear, transformers' Conv1D) or a parameter by itself (a table of
    position biases, one column a head). `axis` is "out" for features the layer makes (rows of its weight and bias; a
    parameter's first dimension), "in" for features it reads.
    """

    layer: str
    axis: Axis
    step: int = 1
    lane: int = 0
    start: int = 0
    repeat: tuple[tuple[int, int], ...] = ()

    @property
    def per_unit(self) -> int:
        """Features of one unit."""
        return int(np.prod([count for count, _ in self.repeat], dtype=int))

    def table(self, lanes: int, slots: int) -> NDArray[np.int64]:
        """Feature indices of every unit: (lanes · slots, features of a unit), each row rising."""
        unit = np.arange(lanes)[:, None] * self.lane + np.arange(slots)[None, :] * self.step + self.start
        own = np.zeros(1, dtype=np.int64)
        for count, stride in self.repeat:
            own = (own[:, None] + np.arange(count)[None, :] * stride).reshape(-1)
        return np.asarray(unit.reshape(-1, 1) + np.sort(own)[None, :], dtype=np.int64)


# Which units of every kind stay at a site, as rising indices.
Kept = Mapping[UnitKind, Iterable[int]]


@dataclass(frozen=True)
class Site:
    """One prunable sublayer: `Site("blocks.3.attn", ATTENTION, {HEAD: 3, QK: 64, VO: 64}, ..., "blocks.3.attn.proj")`.

    `counts` says how many units of each kind it has: of `qk` and `vo` how many in every head. `slices` says where they
    lie. `out` names the output projection: its input features are what heads, `vo` and neurons make, the place of
    their gates and of the refit. Attention sites carry `heads` query heads sharing `kv_heads` key/value heads; a head
    unit is a key/value head with its queries. `qk_width` and `vo_width` are features per head.

    A site may lose all of its units: what then remains is the bias of `out`. `alone` names modules that serve only this
    site and leave with it (the norm before it, the norms of its queries and keys). `limits` says of a kind that is not
    offered why not.
    """

    name: str
    kind: SiteKind
    counts: Mapping[UnitKind, int]
    slices: Mapping[UnitKind, tuple[Slice, ...]]
    out: str
    heads: int = 0
    kv_heads: int = 0
    qk_width: int = 0
    vo_width: int = 0
    alone: tuple[str, ...] = ()
    limits: Mapping[UnitKind, str] | None = None

    @property
    def query_heads_per_unit(self) -> int:
        return self.heads // self.kv_heads if self.kv_heads else 1

    @property
    def vanishing_kind(self) -> UnitKind:
        """The kind without whose units there is no sublayer."""
        return UnitKind.HEAD if self.kind is SiteKind.ATTENTION else UnitKind.NEURON

    def lanes(self, kind: UnitKind) -> int:
        """In how many places the slots of `kind` lie: one per key/value head for qk and vo, else 1."""
        return self.kv_heads if kind in PER_HEAD else 1

    def units(self, kind: UnitKind) -> int:
        """Units of `kind` in all: the length of a gate or importance tensor."""
        return self.lanes(kind) * self.counts[kind]

    def gate_slice(self, kind: UnitKind) -> Slice:
        """Where a gate on the units of `kind` acts: what `out` reads, and for qk what the query layer makes."""
        if kind is UnitKind.QK:
            return self.slices[kind][0]
        return next(s for s in self.slices[kind] if s.layer == self.out and s.axis == "in")

    def owner(self, s: Slice, kind: UnitKind, width: int) -> NDArray[np.int64]:
        """The unit that owns each of the `width` features of a slice's layer, -1 where none does."""
        owner = np.full(width, -1, dtype=np.int64)
        table = s.table(self.lanes(kind), self.counts[kind])
        owner[table] = np.arange(len(table))[:, None]
        return owner

    def axes(self) -> list[tuple[str, Axis]]:
        """Every (layer, axis) that a cut at this site shortens, once each, in order of appearance."""
        return list(dict.fromkeys((s.layer, s.axis) for slices in self.slices.values() for s in slices))

    def kept_features(self, layer: str, axis: Axis, width: int, kept: Kept) -> NDArray[np.bool_]:
        """Which of a layer's `width` features stay when the units `kept` do."""
        stays = np.ones(width, dtype=bool)
        for kind, slices in self.slices.items():
            for s in slices:
                if (s.layer, s.axis) == (layer, axis):
                    table = s.table(self.lanes(kind), self.counts[kind])
                    gone = np.ones(len(table), dtype=bool)
                    gone[np.fromiter(kept[kind], dtype=np.int64)] = False
                    stays[table[gone]] = False
        return stays


def unit_key(site: str, kind: UnitKind) -> str:
    """The name of one group of units in paths, gates and tensors: "blocks.3.attn/head"."""
    return f"{site}/{kind.value}"


def groups(sites: Iterable[Site], kinds: Iterable[UnitKind] | None = None) -> list[tuple[Site, UnitKind]]:
    """Every (site, kind) with units, in model order, restricted to `kinds` when given."""
    wanted = None if kinds is None else set(kinds)
    return [(s, k) for s in sites for k in s.counts if wanted is None or k in wanted]


def site_to_json(site: Site) -> dict[str, Any]:
    """A site as plain JSON data."""
    return {
        "name": site.name,
        "kind": site.kind.value,
        "counts": {k.value: n for k, n in site.counts.items()},
        "slices": {
            k.value: [[s.layer, s.axis, s.step, s.lane, s.start, [list(r) for r in s.repeat]] for s in v]
            for k, v in site.slices.items()
        },
        "out": site.out,
        "heads": site.heads,
        "kv_heads": site.kv_heads,
        "qk_width": site.qk_width,
        "vo_width": site.vo_width,
        "alone": list(site.alone),
        "limits": None if site.limits is None else {k.value: why for k, why in site.limits.items()},
    }


def site_from_json(data: dict[str, Any]) -> Site:
    """The site that `site_to_json` described. Raises KeyError, TypeError or ValueError for anything else."""

    def one(layer: str, axis: Axis, step: int, lane: int, start: int, repeat: list[list[int]]) -> Slice:
        return Slice(layer, axis, step, lane, start, tuple((count, stride) for count, stride in repeat))

    return Site(
        name=data["name"],
        kind=SiteKind(data["kind"]),
        counts={UnitKind(k): n for k, n in data["counts"].items()},
        slices={UnitKind(k): tuple(one(*s) for s in v) for k, v in data["slices"].items()},
        out=data["out"],
        heads=data["heads"],
        kv_heads=data["kv_heads"],
        qk_width=data["qk_width"],
        vo_width=data["vo_width"],
        alone=tuple(data["alone"]),
        limits=None if data["limits"] is None else {UnitKind(k): why for k, why in data["limits"].items()},
    )
