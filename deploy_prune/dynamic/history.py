"""What left and what came back, step by step: JSON data, and a plot of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from deploy_prune.errors import ArtifactError
from deploy_prune.files import read_json, write_json

TYPE, VERSION = "StructureHistory", 1


@dataclass(frozen=True)
class Change:
    """One change of structure. `left` and `came` hold unit indices by unit key ("blocks.0.mlp/neuron"), `gone` the
    share of its prunable parameters that every site lacks afterwards."""

    step: int
    exchanged: float
    left: Mapping[str, list[int]]
    came: Mapping[str, list[int]]
    gone: Mapping[str, float]


@dataclass
class History:
    """`start` is what every site lacked before the first change. `best_step` is the step whose structure was kept."""

    start: dict[str, float]
    changes: list[Change] = field(default_factory=list)
    best_step: int = 0

    def returned(self) -> int:
        """How many units were inactive once and are back at the end of what is recorded."""
        away: set[tuple[str, int]] = set()
        back: set[tuple[str, int]] = set()
        for change in self.changes:
            left = {(key, unit) for key, units in change.left.items() for unit in units}
            came = {(key, unit) for key, units in change.came.items() for unit in units}
            away, back = away | left, (back | (came & away)) - left
        return len(back)

    def to_json(self) -> dict[str, Any]:
        return {
            "_type": TYPE,
            "_version": VERSION,
            "start": self.start,
            "best_step": self.best_step,
            "changes": [asdict(change) for change in self.changes],
        }

    @staticmethod
    def from_json(data: Any, *, where: str = "history") -> History:
        """Raises ArtifactError for anything else."""
        try:
            if data["_type"] != TYPE or data["_version"] != VERSION:
                raise ValueError(f"type {data['_type']!r}, version {data['_version']!r}")
            return History(data["start"], [Change(**change) for change in data["changes"]], data["best_step"])
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                "not a history of structure", where=where, got=str(error)[:200], expected=f"{TYPE} version {VERSION}"
            ) from error

    def save(self, path: Path | str) -> None:
        """Write it as JSON, atomically."""
        write_json(path, self.to_json())

    @staticmethod
    def load(path: Path | str) -> History:
        return History.from_json(read_json(path), where=str(path))


def rows(history: History) -> list[dict[str, Any]]:
    """One row per change for a table: how many units of each kind left and came back."""
    table = []
    for change in history.changes:
        row: dict[str, Any] = {"step": change.step, "exchanged": f"{change.exchanged:.1%}"}
        for name, units in (("left", change.left), ("came", change.came)):
            row |= {f"{kind} {name}": count for kind, count in _by_kind(units).items()}
        table.append(row)
    return table


def plot_history(history: History, file: Path, title: str) -> None:
    """Draw units that left and came at every change, and what every site lacked over the steps.

    Raises UnavailableError without matplotlib.
    """
    from deploy_prune.layer_table import drawing, save_figure

    pyplot = drawing()
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 7), sharex=True)
    steps = [change.step for change in history.changes]
    for name, sign, colour in (("came", 1, "tab:green"), ("left", -1, "tab:red")):
        counts = [sign * sum(map(len, getattr(change, name).values())) for change in history.changes]
        above.bar(steps, counts, width=0.6 * _gap(steps), color=colour, label=name)
    above.axhline(0, color="black", lw=0.8)
    above.axvline(history.best_step, color="0.4", ls="--", lw=1, label="kept")
    above.set_ylabel("units")
    above.legend(fontsize=8)
    above.set_title(title)
    for site, start in history.start.items():
        below.step([0, *steps], [start, *(change.gone[site] for change in history.changes)], where="post", label=site)
    below.set_xlabel("step")
    below.set_ylabel("share of the site's parameters gone")
    below.set_ylim(-0.02, 1.02)
    below.legend(fontsize=6, ncols=2, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    save_figure(figure, file)


def _by_kind(units: Mapping[str, Sequence[int]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for key, own in units.items():
        kind = key.rpartition("/")[2]
        counts[kind] = counts.get(kind, 0) + len(own)
    return counts


def _gap(steps: Sequence[int]) -> float:
    return float(min((b - a for a, b in pairwise(steps)), default=1))
