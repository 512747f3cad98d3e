"""Sites and units: what a transformer is made of, as far as pruning is concerned.

A *site* is one attention or feed-forward sublayer. A *unit* is the smallest thing that can be removed there.
Where a unit's weights lie is data (`Slice`), so that gating, scoring, costing and cutting need no code per model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal


class UnitKind(StrEnum):
    """What can be removed. `qk` and `vo` have their place in plans and paths; no adapter offers them yet."""

    HEAD = "head"
    QK = "qk"
    VO = "vo"
    NEURON = "neuron"


class SiteKind(StrEnum):
    ATTENTION = "attention"
    FEED_FORWARD = "feed_forward"


@dataclass(frozen=True)
class Slice:
    """The features of one linear layer that belong to a site's units.

    `Slice("blocks.0.attn.qkv", "out", block=64, parts=3)`: unit u owns output features u*64 .. u*64+63 in each of
    the 3 equal parts stacked in the layer. `axis` is "out" for features the layer makes, "in" for features it reads.
    """

    module: str
    axis: Literal["out", "in"]
    block: int = 1
    parts: int = 1

    def features(self, units: Iterable[int], count: int) -> list[int]:
        """Feature indices of the given `units` when the site has `count` of them, in the layer's own order."""
        units = list(units)
        return [
            part * count * self.block + unit * self.block + offset
            for part in range(self.parts)
            for unit in units
            for offset in range(self.block)
        ]


@dataclass(frozen=True)
class Site:
    """One prunable sublayer: `Site("blocks.3.attn", ATTENTION, {HEAD: 3}, ..., out="blocks.3.attn.proj", heads=3)`.

    `counts` says how many units of each kind it has, `slices` where they lie. `out` names the output projection:
    its input features are the units' activations, the place of gates and of the refit. Attention sites carry
    `heads` query heads sharing `kv_heads` key/value heads of width `head_dim`; one `head` unit is a key/value head
    with its `heads // kv_heads` query heads.
    """

    name: str
    kind: SiteKind
    counts: Mapping[UnitKind, int]
    slices: Mapping[UnitKind, tuple[Slice, ...]]
    out: str
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0

    @property
    def query_heads_per_unit(self) -> int:
        return self.heads // self.kv_heads if self.kv_heads else 1

    def reading_slice(self, kind: UnitKind) -> Slice:
        """The slice of `out`: how the units of `kind` appear in the activations that the output projection reads."""
        return next(s for s in self.slices[kind] if s.module == self.out and s.axis == "in")


def unit_key(site: str, kind: UnitKind) -> str:
    """The name of one group of units in paths, gates and tensors: "blocks.3.attn/head"."""
    return f"{site}/{kind.value}"


def groups(sites: Iterable[Site], kinds: Iterable[UnitKind] | None = None) -> list[tuple[Site, UnitKind]]:
    """Every (site, kind) with units, in model order, restricted to `kinds` when given."""
    wanted = None if kinds is None else set(kinds)
    return [(s, k) for s in sites for k in s.counts if wanted is None or k in wanted]
