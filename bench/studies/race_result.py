"""What a race has found so far: rows as JSON, and beside it the values per example as npz.

A row is one contestant in one form at one size. Both files are written whole after every row, so that a race that was
killed goes on where it was.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_prune.errors import UsageError
from deploy_prune.files import atomic_file, read_json, write_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DENSE = "dense"


def key_of(row: dict[str, Any]) -> str:
    """`obs/refit/0.3`."""
    return f"{row['contestant']}/{row['form']}/{row['asked']:g}"


@dataclass
class RaceResult:
    """`head` describes the race, `rows` are by key. `values` holds what each model's metric is made of, one value per
    judged example; `given` what all models share (human scores, numbers of tokens), empty where there is nothing."""

    path: Path
    head: dict[str, Any]
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    values: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    given: NDArray[np.float64] | None = None

    @staticmethod
    def open(path: Path, head: dict[str, Any], *, fresh: bool) -> RaceResult:
        """The result at `path`, to go on with, or an empty one. Raises UsageError when it is of another race."""
        if fresh or not path.exists():
            return RaceResult(path, head)
        found = RaceResult.load(path)
        different = [key for key in ("identity", "sparsities") if found.head.get(key) != head[key]]
        if different:
            raise UsageError(
                "the file holds another race",
                where=str(path),
                problems=[f"{key}: {found.head.get(key)}, now {head[key]}" for key in different],
                remedy="Give another --out, or start again with --fresh.",
            )
        found.head |= {key: value for key, value in head.items() if key not in found.head}
        return found

    @staticmethod
    def load(path: Path) -> RaceResult:
        import numpy as np

        data = read_json(path)
        with np.load(_values_file(path), allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        given = arrays.pop("given", None)
        return RaceResult(path, data["race"], {key_of(row): row for row in data["rows"]}, arrays, given)

    def add(self, row: dict[str, Any], per_example: NDArray[np.float64] | None = None) -> None:
        """Store a row, and the values its metric is made of: (n,), or (n, 2) with the shared ones in column 1."""
        import numpy as np

        key = key_of(row)
        self.rows[key] = row
        if per_example is not None:
            rows = np.asarray(per_example, np.float64)
            if rows.ndim == 2:
                shared = rows[:, 1]
                if self.given is not None and not np.array_equal(self.given, shared):
                    raise ValueError(f"{key}: judged on other examples than the rows before")
                self.given, rows = shared, rows[:, 0]
            self.values[key] = rows.astype(np.float32)
        self.save()

    def drop(self, contestant: str) -> None:
        """Forget a contestant's rows."""
        for key in [k for k, row in self.rows.items() if row["contestant"] == contestant]:
            self.rows.pop(key)
            self.values.pop(key, None)

    def save(self) -> None:
        import numpy as np

        arrays: dict[str, Any] = dict(sorted(self.values.items())) | (
            {} if self.given is None else {"given": self.given}
        )
        with atomic_file(_values_file(self.path)) as temporary, temporary.open("wb") as stream:
            np.savez_compressed(stream, **arrays)
        write_json(self.path, {"race": self.head, "rows": list(self.rows.values())})

    def per_example(self, key: str) -> NDArray[np.float64]:
        """What the metric of a row is computed from: (n,), or (n, 2) with the shared column."""
        import numpy as np

        values = self.values[key].astype(np.float64)
        return values if self.given is None else np.stack([values, self.given], axis=1)


def _values_file(path: Path) -> Path:
    return path.with_suffix(".npz")
