"""Weights in blocks of 4 or 8 bits: how they are rounded, packed, and read back."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from converters.precision.compensated import REACH, Inputs, compensated

BLOCK = 32  # weights that share a scale; the shortest block is the most exact that ONNX Runtime's kernels are fast at
BLOCKS = (32, 64, 128)
SHARES = (1.0, 1.05, 1.02, *(1 - 0.02 * i for i in range(1, 13)))  # of a block's range, in 4 bits
FURTHEST = REACH + 0.5  # steps that a weight in 4 bits may be stored off its fp32 value
_MIDDLE = 128  # what stands for zero in 8 bits, where no zero points are stored


def packed(
    rows: NDArray[np.float32], bits: int, inputs: Inputs | None = None, block: int = BLOCK
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8] | None]:
    """Weights (N, K), a row an output, as MatMulNBits takes them: q (N, blocks, bytes of one), scales (N, blocks), and
    in 4 bits zero points (N, bytes).

    Round to nearest in each `block` along a row: in 8 bits q = round(w / s) + 128 with s = max|w| / 127, in 4
    bits, where half of an uneven range would be lost, q = round(w / s) + z with s = (max - min) / 15, zero within.
    The last block of a row is filled up with zeros. In 4 bits, with what is known of the layer's `inputs`, the range of
    a block is the one that `fitted_range` finds, and it is rounded as `compensated` says.
    """
    n, k = rows.shape
    blocks = -(-k // block)
    w = np.zeros((n, blocks * block), np.float32)
    w[:, :k] = rows
    w = w.reshape(n, blocks, block)
    if bits == 8:
        scale = _nonzero(np.abs(w).max(-1) / np.float32(127))
        return (np.rint(w / scale[..., None]) + _MIDDLE).astype(np.uint8), scale, None
    if inputs is None:
        scale, zero = _range(w)
        q = _points(w, scale, zero)
    else:
        felt = np.zeros(blocks * block, np.float32)
        felt[:k] = inputs.power
        scale, zero = fitted_range(w, felt.reshape(blocks, block))
        steps, zeros = (np.repeat(part, block, axis=1)[:, :k] for part in (scale, zero))
        q = np.repeat(zero[..., None], block, axis=-1)  # the filling: zeros
        q.reshape(n, -1)[:, :k] = compensated(rows, steps, zeros, 15, inputs)
    return _paired(q.astype(np.uint8)), scale, _paired(zero.astype(np.uint8))


def fitted_range(w: NDArray[np.float32], felt: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scale and zero point (N, blocks) of blocks of weights w (N, blocks, length) whose rounding errors are least in
    squares weighted by `felt` (blocks, length), the power of the inputs: of ranges of `SHARES` of the whole, those that
    put no weight further off than it may be stored."""
    scale, zero = _range(w)
    least = np.full(scale.shape, np.inf, np.float32)
    for share in SHARES:
        s, z = _range(w, share)
        off = w - s[..., None] * (_points(w, s, z) - z[..., None])
        lost = np.where(np.abs(off).max(-1) <= FURTHEST * s, (felt * off * off).sum(-1), np.inf)
        better = lost < least
        least[better], scale[better], zero[better] = lost[better], s[better], z[better]
    return scale, zero


def _range(w: NDArray[np.float32], share: float = 1.0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scale and zero point of 16 values over a share of each block's range, zero within."""
    low, high = np.minimum(w.min(-1), 0), np.maximum(w.max(-1), 0)
    scale = _nonzero((high - low) * np.float32(share / 15))
    return scale, np.clip(np.rint(-low * np.float32(share) / scale), 0, 15)


def _points(w: NDArray[np.float32], scale: NDArray[np.float32], zero: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of 16, the nearest to every weight."""
    return np.asarray(np.clip(np.rint(w / scale[..., None]) + zero[..., None], 0, 15))


def unpacked(
    q: NDArray[np.uint8], scale: NDArray[np.float32], zero: NDArray[np.uint8] | None, length: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """What `packed` stored, and the step of every weight: each (N, `length`). None for shapes that it does not make."""
    n, blocks = scale.shape if scale.ndim == 2 else (0, 0)
    block = 0 if q.ndim != 3 else q.shape[2] if zero is None else 2 * q.shape[2]
    if block not in BLOCKS or q.shape[:2] != (n, blocks) or blocks != -(-length // block) or q.dtype != np.uint8:
        return None
    if zero is None:
        values, zeros = q.astype(np.float64), np.full((n, blocks), float(_MIDDLE))
    elif zero.shape == (n, -(-blocks // 2)):
        values, zeros = _single(q).astype(np.float64), _single(zero)[:, :blocks].astype(np.float64)
    else:
        return None
    step = np.repeat(scale.astype(np.float64), block, axis=1)[:, :length]
    found = (values - zeros[..., None]) * scale.astype(np.float64)[..., None]
    return found.reshape(n, -1)[:, :length], step


def _nonzero(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.maximum(scale, np.finfo(np.float32).tiny)


def _paired(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two 4-bit values a byte along the last axis, the first in the lower half; an odd last one is alone."""
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros_like(values[..., :1])], axis=-1)
    return (values[..., ::2] | (values[..., 1::2] << 4)).astype(np.uint8)


def _single(pairs: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*pairs.shape[:-1], -1)
