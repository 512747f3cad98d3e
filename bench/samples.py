"""Raw timings: every call of every model, in the order taken. Every figure and table can be made from them again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_prune.errors import ArtifactError
from deploy_prune.files import atomic_file, read_json

if TYPE_CHECKING:
    import numpy as np

TYPE, VERSION = "latency-samples", 1


@dataclass(frozen=True)
class Samples:
    """Timings of one cell: one runtime at one batch and sequence size.

    `names[0]` is the baseline and `names[1]` a second session of the same file. `ns` is int64 (rounds, models, calls),
    nanoseconds per call; `order` is int64 (rounds, models), the models' indices in the order they ran in. The rounds
    are `sessions` equal runs, between which every model was loaded afresh. `sizes` is {"batch": 8} or
    {"batch": 8, "sequence": 128}; `warm_up` maps a name to {"calls", "stable"}; `runtime` maps a name to what its
    session said of itself; `environment` is that of `bench.environment`.
    """

    names: tuple[str, ...]
    ns: np.ndarray
    order: np.ndarray
    sizes: Mapping[str, int]
    seed: int
    sessions: int = 1
    warm_up: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    runtime: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)

    def of(self, name: str) -> np.ndarray:
        """The (rounds, calls) timings of one model."""
        timings: np.ndarray = self.ns[:, self.names.index(name), :]
        return timings

    def to_json(self) -> dict[str, Any]:
        return {
            "_type": TYPE,
            "_version": VERSION,
            "unit": "ns",
            "names": list(self.names),
            "sizes": dict(self.sizes),
            "seed": self.seed,
            "sessions": self.sessions,
            "order": self.order.tolist(),
            "ns": self.ns.tolist(),
            "warm_up": dict(self.warm_up),
            "runtime": dict(self.runtime),
            "environment": dict(self.environment),
        }

    @classmethod
    def from_json(cls, data: Any, where: str = "samples") -> Samples:
        """Raises ArtifactError when `data` is not what `to_json` makes."""
        import numpy as np

        if not isinstance(data, dict) or (data.get("_type"), data.get("_version")) != (TYPE, VERSION):
            found = data if isinstance(data, dict) else {"_type": type(data).__name__}
            got = f"{found.get('_type')} version {found.get('_version')}"
            raise ArtifactError("not raw timings", where=where, expected=f"{TYPE!r} version {VERSION}", got=got)
        try:
            samples = cls(
                tuple(data["names"]),
                np.array(data["ns"], np.int64),
                np.array(data["order"], np.int64),
                data["sizes"],
                data["seed"],
                data["sessions"],
                data["warm_up"],
                data["runtime"],
                data["environment"],
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ArtifactError("raw timings are incomplete", where=where, got=repr(error)) from error
        shape = samples.ns.shape
        if (
            len(shape) != 3
            or not all(shape)
            or samples.order.shape != shape[:2]
            or len(samples.names) != shape[1]
            or len(samples.names) < 2
            or samples.sessions < 1
            or shape[0] % samples.sessions
        ):
            raise ArtifactError(
                "raw timings do not fit together",
                where=where,
                expected="ns (rounds, models, calls), order (rounds, models)",
                got=f"ns {shape}, order {samples.order.shape}, {len(samples.names)} names, {samples.sessions} sessions",
            )
        return samples

    def save(self, path: Path | str) -> None:
        """Compact JSON; the same samples are the same bytes."""
        with atomic_file(path) as temporary:
            temporary.write_text(compact(self.to_json()), encoding="utf-8")

    @classmethod
    def load(cls, path: Path | str) -> Samples:
        """Raises UnavailableError or ArtifactError."""
        return cls.from_json(read_json(path), str(path))


def compact(data: Any) -> str:
    """Sorted JSON without spaces: thousands of integers, one per line, would help nobody."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False) + "\n"
