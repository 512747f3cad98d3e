"""Hidden states: what each layer adds up to in the residual stream, whose width no plan changes.

A compact model and its dense teacher have the same layers, so their hidden states have equal shapes; a site that
vanished leaves its layer's state to be matched by the sites that stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deploy_prune.units import Site


def layers_of(model: nn.Module, sites: Iterable[Site]) -> list[str]:
    """The modules that hold the sites, in model order: for each site the nearest element of a list of modules around it
    ("blocks.3"), or its output projection where there is none."""
    found: dict[str, None] = {}
    for site in sites:
        parts = site.name.split(".")
        nearest = site.out
        for length in range(len(parts) - 1, 0, -1):
            parent = model.get_submodule(".".join(parts[: length - 1]))
            if isinstance(parent, (nn.ModuleList, nn.Sequential)):
                nearest = ".".join(parts[:length])
                break
        found.setdefault(nearest)
    return list(found)


class Record:
    """What the watched modules gave in the last forward pass, in the order of their calls."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []

    def take(self) -> list[Tensor]:
        """The states so far; the record is empty afterwards."""
        taken, self.states = self.states, []
        return taken


@contextmanager
def recording(model: nn.Module, names: Sequence[str]) -> Iterator[Record]:
    """Within the block every pass leaves the outputs of the named modules in the record."""
    record = Record()

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        record.states.append(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as stack:
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        yield record


def hidden_error(own: Sequence[Tensor], dense: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """Mean over layers of Σ ‖h − h*‖² / Σ ‖h* − mean h*‖², sums over the tokens that are not padding.

    Relative, since the stream grows with depth by orders of magnitude. `mask` is (batch, tokens) or None.
    """
    errors = []
    for h, target in zip(own, dense, strict=True):
        h, target = _tokens(h, mask), _tokens(target, mask)
        scale = (target - target.mean(0)).square().sum()
        errors.append((h - target).square().sum() / scale.clamp(min=1e-12))
    return torch.stack(errors).mean()


def _tokens(states: Tensor, mask: Tensor | None) -> Tensor:
    """(tokens, width) float32, without padding."""
    states = states.float()
    if mask is not None and states.shape[:2] == mask.shape:
        return states[mask.bool()]
    return states.reshape(-1, states.shape[-1])
