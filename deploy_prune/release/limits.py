"""A limit as people write it: `3`, `20MB`, `1.2G`, or `1%` of what the dense model has."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

_UNITS = {
    "": 1.0,
    "K": 1e3,
    "M": 1e6,
    "G": 1e9,
    "T": 1e12,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "KIB": 2.0**10,
    "MIB": 2.0**20,
    "GIB": 2.0**30,
}
_WRITTEN = re.compile(r"^\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(%|[A-Za-z]*)\s*$")
_EXPECTED = "a number, a share of dense (1%), or a number with K, M, G, MB, GB, MiB or GiB"


@dataclass(frozen=True)
class Limit:
    """`Limit(0.01, of_dense=True)` is 1 % of the dense model's figure; else `value` is in the figure's own unit."""

    value: float
    of_dense: bool = False
    text: str = ""

    def resolve(self, dense: float | None) -> float | None:
        """The limit as a plain number; None when it is a share of a figure that the dense model lacks."""
        if not self.of_dense:
            return self.value
        return None if dense is None else self.value * abs(dense)

    def __str__(self) -> str:
        return self.text or (f"{100 * self.value:g}%" if self.of_dense else f"{self.value:g}")


def parse_limit(written: Any) -> Limit:
    """`"1%"`, `"20MB"`, `3` -> Limit. Raises ValueError for anything else."""
    if isinstance(written, Limit):
        return written
    if isinstance(written, bool) or not isinstance(written, (int, float, str)):
        raise ValueError(f"expected {_EXPECTED}; got {written!r}")
    text = str(written).strip()
    found = _WRITTEN.match(text)
    if found is None or not (found[2] == "%" or found[2].upper() in _UNITS):
        raise ValueError(f"expected {_EXPECTED}; got {text[:60]!r}")
    number = float(found[1])
    if not -1e30 < number < 1e30:
        raise ValueError(f"expected a finite number; got {text[:60]!r}")
    if found[2] == "%":
        return Limit(number / 100, True, text)
    return Limit(number * _UNITS[found[2].upper()], False, text)


Amount = Annotated[
    Limit,
    BeforeValidator(parse_limit),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string"}], "description": _EXPECTED}),
]
