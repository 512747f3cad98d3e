"""How much the losses of each unit kind count against those of the others, found by measuring plans.

What a kind loses was measured with all others whole. Once they leave too, and so many of one kind as a runtime's times
suggest, only a plan's measured loss can say. So the weights w_k of a choice

    min Σ_s Σ_k w_k loss_{s,k}(widths)    within the latency

are moved, one kind at a time, by factors that become smaller, while the plan that follows loses less (SPDY, arXiv
2201.13096, searches coefficients of layers so).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

FACTORS = (2.0, 2.0**0.5)
MARGIN = 0.05  # a smaller share of the loss, gained on a few hundred examples, was no gain on others (bench/notes.md)


def weigh(
    kinds: Sequence[str],
    loss_of: Callable[[Mapping[str, float]], float],
    more: Callable[[], bool],
) -> dict[str, float]:
    """The weights of `kinds`, from 1 on, with the least `loss_of` seen as long as `more` allows, if that is less by
    `MARGIN` than with even weights. The last kind is what the others are weighed against."""
    even = best = dict.fromkeys(kinds, 1.0)
    first = least = loss_of(best)
    for factor in FACTORS:
        for kind in kinds[:-1]:
            for step in (factor, 1 / factor):
                moved = False
                while more() and (loss := loss_of(trial := {**best, kind: best[kind] * step})) < least:
                    best, least, moved = trial, loss, True
                if moved:
                    break
    return best if least <= (1 - MARGIN) * first else even
