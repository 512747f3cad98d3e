"""Units that somebody removed, gathered by site and kind while a foreign form is read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from deploy_prune.units import Site, UnitKind


@dataclass
class Removed:
    """`add(site, HEAD, [2])`: key/value head 2 is gone, with its queries. Indices are units of the uncut site."""

    _gone: dict[tuple[str, UnitKind], set[int]] = field(default_factory=dict)

    def add(self, site: Site, kind: UnitKind, units: Iterable[int]) -> None:
        self._gone.setdefault((site.name, kind), set()).update(int(unit) for unit in units)

    def units(self, site: Site, kind: UnitKind) -> set[int]:
        return self._gone.get((site.name, kind), set())
