"""How an initialiser's name tells which parameters it holds: a weight whole, transposed, in part, or beside others.

    fc1.weight.T                              the parameter as MatMul reads it, (in, out)
    qkv.weight[0:192].T                       rows 0 to 191 of the parameter, transposed
    q.weight.T|k.weight.T|v.weight.T          three parameters side by side along the last axis

Whoever counts, compares or converts weights reads them by these names; nothing else says what a tensor is made of.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

TRANSPOSED = ".T"  # suffix of a weight stored (in, out), as MatMul reads it, where torch keeps (out, in)
BESIDE = "|"
_PART = re.compile(r"(?P<parameter>[^\[\]|]+?)(\[(?P<start>\d+):(?P<stop>\d+)\])?(?P<transposed>\.T)?")


@dataclass(frozen=True)
class Part:
    """Rows `start` to `stop` of a parameter's first axis (None: all of it), stored transposed or not."""

    parameter: str
    start: int | None = None
    stop: int | None = None
    transposed: bool = False

    @property
    def name(self) -> str:
        rows = "" if self.start is None else f"[{self.start}:{self.stop}]"
        return f"{self.parameter}{rows}{TRANSPOSED if self.transposed else ''}"

    def rows(self, length: int) -> tuple[int, int]:
        return (0, length) if self.start is None or self.stop is None else (self.start, self.stop)

    def take(self, parameter: np.ndarray) -> np.ndarray:
        """What is stored of the parameter's values."""
        start, stop = self.rows(parameter.shape[0]) if parameter.ndim else (0, 0)
        rows = parameter[start:stop] if parameter.ndim else parameter
        return rows.T if self.transposed else rows


def parts_of(name: str) -> tuple[Part, ...]:
    """The parts that an initialiser of this name holds, in order along its last axis."""
    found = []
    for text in name.split(BESIDE):
        match = _PART.fullmatch(text)
        if match is None:  # not a name of ours; a tensor that holds no parameter
            return (Part(name),)
        start, stop = (None if match[edge] is None else int(match[edge]) for edge in ("start", "stop"))
        found.append(Part(match["parameter"], start, stop, match["transposed"] is not None))
    return tuple(found)


def side_by_side(parts: Sequence[Part], lengths: Callable[[str], int]) -> str:
    """The name of `parts` joined along the last axis; rows of one parameter that follow each other become one part.

    `lengths` gives the length of a parameter's first axis.
    """
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if last is not None and (last.parameter, last.transposed) == (part.parameter, part.transposed):
            length = lengths(part.parameter)
            (start, middle), (after, stop) = last.rows(length), part.rows(length)
            if middle == after:
                whole = (start, stop) == (0, length)
                rows = (None, None) if whole else (start, stop)
                joined[-1] = Part(part.parameter, rows[0], rows[1], part.transposed)
                continue
        joined.append(part)
    return BESIDE.join(part.name for part in joined)


def holds(name: str | None, weights: Any) -> bool:
    """Whether an initialiser of this name holds any of the parameters named in `weights`."""
    return name is not None and any(part.parameter in weights for part in parts_of(name))


def assemble(name: str, parameters: Mapping[str, np.ndarray]) -> np.ndarray:
    """The values an initialiser of this name must have. Raises KeyError for a parameter that is not there."""
    import numpy as np

    return np.concatenate([part.take(parameters[part.parameter]) for part in parts_of(name)], axis=-1)
