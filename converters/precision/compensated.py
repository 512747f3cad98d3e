"""Rounding of a layer's weights that makes up, in the weights still to be rounded, for the error of those that were.

With X the inputs that a layer has on calibration data, H = XᵀX + λ I the curvature of its output's squared error and
U the upper Cholesky factor of H⁻¹ = UᵀU, column i is rounded to ŵ_i on its grid, and the later ones take up

    w_j ← w_j − (w_i − ŵ_i) U_ij / U_ii        for all j > i

(GPTQ, arXiv 2210.17323, equations 2 to 4 and section 3.3). Columns go in order of falling H_ii, each on its block's
grid, which was chosen before anything was moved. Unlike there, no weight is moved further than `REACH` steps of its
grid from its fp32 value before it is rounded, so that a file can still be held against its twin weight by weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DAMPING = 0.01  # λ, of the mean of H's diagonal
REACH = 1.5
_COLUMNS = 128  # rounded before the rest of the matrix is moved by their errors


@dataclass(frozen=True)
class Inputs:
    """What rounding must know of a layer's inputs: their `power` (K,), mean squares up to a factor, the `order` in
    which columns are rounded (K,), and `upper`, U (K, K) in that order."""

    power: NDArray[np.float32]
    order: NDArray[np.int64]
    upper: NDArray[np.float32]

    @staticmethod
    def of(second: NDArray[np.floating], vectors: int) -> Inputs:
        """From second moments (K, K), up to a factor, of so many `vectors`. Inputs that are always zero count as small
        ones; of fewer vectors than dimensions what goes together is chance, and only their power counts."""
        h = second.astype(np.float64)
        if vectors < len(h):
            h = np.diag(np.diag(h))
        power = np.diag(h).astype(np.float32)
        mean = float(np.mean(power))
        h[np.diag_indices_from(h)] += DAMPING * mean if mean > 0 else 1.0
        order = np.argsort(-np.diag(h), kind="stable")
        inverse = np.linalg.inv(h[np.ix_(order, order)])
        return Inputs(power, order, np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float32))


def compensated(
    rows: NDArray[np.float32], step: NDArray[np.float32], zero: NDArray[np.float32], top: int, inputs: Inputs
) -> NDArray[np.uint8]:
    """Grid points q in 0 … `top` of weights (N, K), ŵ = s (q − z), with `step` and `zero` of every weight (N, K)."""
    fixed, s, z = (np.ascontiguousarray(part.T[inputs.order], np.float32) for part in (rows, step, zero))
    w = fixed.copy()  # (K, N): a column of the layer lies in one piece
    low, high = fixed - REACH * s, fixed + REACH * s
    q = np.empty(rows.shape, np.uint8)
    for start in range(0, len(w), _COLUMNS):
        end = min(start + _COLUMNS, len(w))
        errors = np.empty((end - start, w.shape[1]), np.float32)
        for i in range(start, end):
            found = np.clip(np.rint(np.clip(w[i], low[i], high[i]) / s[i]) + z[i], 0, top)
            q[:, inputs.order[i]] = found
            errors[i - start] = (w[i] - s[i] * (found - z[i])) / inputs.upper[i, i]
            w[i + 1 : end] -= np.outer(inputs.upper[i, i + 1 : end], errors[i - start])
        w[end:] -= inputs.upper[start:end, end:].T @ errors
    return q
