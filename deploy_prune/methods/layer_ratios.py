"""How much every layer gives up: from layer importances to removal ratios that meet a global amount exactly.

Pure functions of numbers. The ratios of all amounts are one schedule: a ratio never falls when the amount rises, so
that what they lead to is nested.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from deploy_prune.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]

# A layer whose 1 - I is below this gives nothing until all others are empty: a rounding error of the most important
# one's is no reason to cut it.
_NOTHING = 1e-12


def normalised(raw: ArrayLike, power: float = 1.0) -> Floats:
    """I = ((raw − min) / (max − min))^power, one number in [0, 1] per layer; all 0 where all are equal.

    A power above 1 spreads the important layers apart, below 1 the unimportant. Raises UsageError for raw importances
    that are not finite, negative or none, and for a power that is not positive.
    """
    values = _checked("importance", raw)
    if not (np.isfinite(power) and power > 0):
        raise UsageError("importance_power must be positive", got=f"{power:g}")
    if not len(values):
        raise UsageError("no layer to share an amount out over")
    scale = values.max()  # first: the difference of two tiny numbers divided by itself keeps no digit
    if scale > 0:
        values = values / scale
    span = values.max() - values.min()
    if span <= 0:
        return np.zeros(len(values))
    return np.asarray(((values - values.min()) / span) ** power, dtype=np.float64)


def removal_ratios(importance: ArrayLike, sizes: ArrayLike, amount: float) -> Floats:
    """The share of each layer that leaves, (n,) in [0, 1], with Σ ratio_l · size_l = amount · Σ size_l.

    The rule for layers of one size,
        ratio_l = amount · (1 − I_l) / Σ_k (1 − I_k) · n,
    gives ratios above 1 and misses the amount where sizes differ. Here ratio_l = min(1, τ (1 − I_l)): what a full layer
    cannot give is taken from the others in the rule's own proportions, and τ is the one number that meets the amount.
    Layers with I = 1 give nothing until all others are empty, and then all the same share.

    `importance` is (n,) in [0, 1] (`normalised`), `sizes` what each layer can give in any unit, `amount` in [0, 1].
    Raises UsageError for anything else.
    """
    own, s = _checked("importance", importance), _checked("sizes", sizes)
    if own.shape != s.shape or (own > 1).any():
        raise UsageError("not importances of layers", expected="one in [0, 1] for each size", got=f"{own}, {s}")
    if not 0 <= amount <= 1:
        raise UsageError("amount out of range", expected="a share between 0 and 1", got=f"{amount:g}")
    w = _weights(own)
    target = amount * s.sum()
    ratios = np.zeros(len(own))
    giving = w > 0
    first = s[giving].sum()
    if target >= first:
        ratios[giving] = 1.0
        rest = s[~giving].sum()
        if rest > 0:
            ratios[~giving] = min(1.0, (target - first) / rest)
        return ratios
    full = 1 / w[giving]  # τ at which a layer is empty
    order = np.argsort(full, kind="stable")
    flow, left, before = (s[giving] * w[giving]).sum(), target, 0.0
    tau = 0.0
    for layer in order:
        if flow <= 0 or left <= flow * (full[layer] - before):
            break
        left -= flow * (full[layer] - before)
        tau = before = float(full[layer])
        flow -= s[giving][layer] * w[giving][layer]
    if flow > 0:
        tau = before + left / flow
    ratios[giving] = np.minimum(1.0, tau * w[giving])
    return ratios


def removed_units(importance: ArrayLike, units: ArrayLike, amount: int) -> NDArray[np.int64]:
    """How many of each layer's equal `units` leave so that exactly `amount` leave in all: whole `removal_ratios`.

    The units of all layers stand in one queue by the time at which they leave (`leaving_order`); a larger amount only
    takes more of it. Raises UsageError when there are not so many.
    """
    counts = np.asarray(units, dtype=np.int64)
    if not 0 <= amount <= counts.sum():
        raise UsageError("amount out of range", expected=f"0 to {counts.sum()} units", got=str(amount))
    layer = np.repeat(np.arange(len(counts)), counts)
    share = np.concatenate([(np.arange(n) + 0.5) / n for n in counts]) if len(counts) else np.zeros(0)
    queue = leaving_order(importance, layer, share)
    return np.bincount(layer[queue[:amount]], minlength=len(counts))


def leaving_order(importance: ArrayLike, layer: NDArray[np.int64], share: Floats) -> NDArray[np.int64]:
    """Indices of all slots in the order in which they leave as the amount of `removal_ratios` rises from 0 to 1.

    Slot i belongs to layer[i] and leaves when that layer's ratio reaches share[i], that is at τ = share / (1 − I_l);
    those of layers with I = 1 come last, by share. Equal times go by index.
    """
    w = _weights(_checked("importance", importance))[layer]
    last = w <= 0
    time = np.where(last, share, share / np.where(last, 1.0, w))
    return np.lexsort((np.arange(len(layer)), time, last))


def _weights(importance: Floats) -> Floats:
    """1 − I, exactly 0 where it is nothing but rounding; where all are, all give alike."""
    w = np.where(1 - importance < _NOTHING, 0.0, 1 - importance)
    return w if (w > 0).any() else np.ones_like(w)


def _checked(what: str, values: ArrayLike) -> Floats:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not np.isfinite(found).all() or (found < 0).any():
        raise UsageError(
            f"{what} of layers must be finite and not negative",
            got=str(found.tolist())[:200],
            remedy="The model or its data produces NaN; try precision: fp32.",
        )
    return found
