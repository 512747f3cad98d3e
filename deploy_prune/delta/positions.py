"""Sorted positions in few bytes: Golomb-Rice codes of the gaps between them.

At density p a position holds log2(1/p) + log2(e) bits of information when p is small; a Rice code of the gaps needs a
few per cent more (Golomb, Run-length encodings, IEEE Trans. Inf. Theory 12, 1966; Rice, JPL 79-22, 1979).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from deploy_prune.errors import ArtifactError

Bytes = NDArray[np.uint8]
_MOST_BITS = 32  # of a gap's rest: no tensor has gaps of 2^33


def encode(positions: NDArray[np.int64], size: int) -> tuple[Bytes, int]:
    """Bytes of `positions` (n,), rising, all below `size`, and the parameter k of their code.

    A gap g = q 2^k + r is q ones and a zero in the first part, r in k bits in the second: both parts are read at once,
    without a loop.
    """
    if len(positions) == 0:
        return np.empty(0, np.uint8), 0
    gaps = np.diff(positions, prepend=-1) - 1
    k = _parameter(gaps)
    quotient = gaps >> k
    ends = np.cumsum(quotient + 1) - 1
    unary = np.ones(int(ends[-1]) + 1, np.uint8)
    unary[ends] = 0
    rest = (gaps[:, None] >> np.arange(k - 1, -1, -1)) & 1
    return np.packbits(np.concatenate([unary, rest.astype(np.uint8).ravel()])), k


def decode(data: Bytes, k: int, count: int, size: int) -> NDArray[np.int64]:
    """The `count` positions that `encode` wrote. Raises ArtifactError for bytes that are no such code."""
    if count == 0:
        return np.empty(0, np.int64)
    if not 0 <= k <= _MOST_BITS:
        raise _damaged(f"a code of {k} bits")
    bits = np.unpackbits(data)
    ends = np.flatnonzero(bits == 0)[:count]
    if len(ends) < count or len(bits) < ends[-1] + 1 + count * k:
        raise _damaged(f"{len(data)} bytes, too few for {count} positions")
    quotient = np.diff(ends, prepend=-1) - 1
    rest = bits[ends[-1] + 1 : ends[-1] + 1 + count * k].reshape(count, k).astype(np.int64)
    gaps = (quotient << k) + rest @ (1 << np.arange(k - 1, -1, -1, dtype=np.int64))
    positions = np.cumsum(gaps + 1) - 1
    if positions.min() < 0 or positions.max() >= size:
        raise _damaged(f"positions {positions.min()} to {positions.max()} of {size}")
    return positions


def entropy_bits(count: int, size: int) -> float:
    """log2 of the number of sets of `count` positions below `size`: no code does better on all of them."""
    return (math.lgamma(size + 1) - math.lgamma(count + 1) - math.lgamma(size - count + 1)) / math.log(2)


def _parameter(gaps: NDArray[np.int64]) -> int:
    """The k of the shortest code: the one near log2 of the mean gap, or a neighbour."""
    guess = max(0, int(math.log2(max(1.0, float(gaps.mean())))))
    return min(range(max(0, guess - 1), guess + 2), key=lambda k: int((gaps >> k).sum()) + len(gaps) * (k + 1))


def _damaged(got: str) -> ArtifactError:
    return ArtifactError(
        "positions of a delta cannot be read", got=got, remedy="The file is damaged; get it again or train it again."
    )
