"""Surgery undone: a compact model's weights back in the dense shape, so that the next, smaller plan can cut them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from converters.surgery import compact
from deploy_prune.errors import PlanError
from deploy_prune.plan import PrunePlan


@torch.no_grad()
def expand(small: nn.Module, plan: PrunePlan, dense: nn.Module) -> nn.Module:
    """A copy of `dense` that computes what `small` computes: its weights where `plan` kept a unit, zeros elsewhere.

    `small` has the shape that `plan` gives `dense`; its weights may be any. Where each weight belongs is found by
    cutting a model whose weights are their own places. Raises PlanError when `small` is not of that shape.
    """
    places = copy.deepcopy(dense).double()  # exact up to 2^53 weights
    start = 0
    offsets: dict[str, int] = {}
    for name, parameter in places.named_parameters():
        offsets[name] = start
        parameter.copy_(torch.arange(start, start + parameter.numel(), dtype=torch.float64).view(parameter.shape))
        start += parameter.numel()
    places = compact(places, plan, inplace=True, check_weights=False)

    flat = torch.zeros(start, dtype=next(small.parameters()).dtype)
    own = dict(small.named_parameters())
    wanted = {name: tuple(place.shape) for name, place in places.named_parameters()}
    if problems := _differences(wanted, {name: tuple(p.shape) for name, p in own.items()}):
        raise PlanError("the model is not the one this plan cuts", problems=problems)
    for name, place in places.named_parameters():
        flat[place.long().flatten()] = own[name].detach().cpu().flatten()

    result = copy.deepcopy(dense)
    for name, parameter in result.named_parameters():
        part: Tensor = flat[offsets[name] : offsets[name] + parameter.numel()]
        parameter.copy_(part.view(parameter.shape))
    return result


def _differences(wanted: dict[str, tuple[int, ...]], got: dict[str, tuple[int, ...]]) -> list[str]:
    odd = [name for name in sorted(wanted.keys() | got.keys()) if wanted.get(name) != got.get(name)]
    return [f"{name}: {got.get(name, 'none')}, the plan gives {wanted.get(name, 'none')}" for name in odd]
