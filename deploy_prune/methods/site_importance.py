"""How much every site matters: the size of what it adds to the residual stream, and of the loss's gradient there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deploy_prune.methods.base import Context
from deploy_prune.methods.statistics import require_labels
from deploy_prune.tasks.base import Batch

SiteMeasure = Literal["gradient", "activation", "combined"]


def site_importance(context: Context, measure: SiteMeasure) -> dict[str, float]:
    """One number >= 0 per site, from the output y (tokens, width) of its output projection and the loss's gradient g
    there, means over calibration examples:

        gradient:    E ‖g‖_F
        activation:  E over tokens of ‖y_t‖ / √width
        combined:    E Σ_t ‖g_t‖ ‖y_t‖, a bound on the first-order change of the loss when the whole site leaves

    Padding is left out. A site that serves several depths has the sum over them (of activations the mean). Raises
    DataError for unlabeled data unless only activations are asked for.
    """
    backward = measure != "activation"
    if backward:
        require_labels(context, f"the layer importance {measure!r}")

    def step(batch: Batch) -> dict[str, Tensor]:
        with _outputs(context, backward) as seen, torch.set_grad_enabled(backward):
            output = context.output(batch)
            uses = list(seen)
            if backward:
                loss = context.task.loss(output, batch).sum()
                gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
                    loss, [probe for _, _, probe in uses], allow_unused=True
                )
            else:
                gradients = (None,) * len(uses)
        sums: dict[str, Tensor] = {}
        for (name, y, _), g in zip(uses, gradients, strict=True):
            found = _measured(y, g, _valid(context, batch, y), len(batch), measure)
            for part, value in found.items():
                key = f"{name}|{part}"
                sums[key] = sums[key] + value if key in sums else value
        return sums

    sums, rows = context.accumulate(f"layer importance: {measure}", step)
    if measure == "activation":
        return {s.name: float(sums[f"{s.name}|sum"] / sums[f"{s.name}|tokens"]) for s in context.sites}
    return {s.name: float(sums[f"{s.name}|sum"]) / rows for s in context.sites}


def _measured(
    y: Tensor, g: Tensor | None, valid: Tensor | None, examples: int, measure: SiteMeasure
) -> dict[str, Tensor]:
    """Sums over a batch for one use of a site: y and g (rows, ..., width), `valid` (rows, tokens) or None for all."""
    size = y.float().norm(dim=-1)
    if measure == "activation":
        own = size[valid] if valid is not None else size
        total = own.sum(dtype=torch.float64) / y.shape[-1] ** 0.5
        return {"sum": total, "tokens": total.new_tensor(own.numel())}
    slope = torch.zeros_like(size) if g is None else g.float().norm(dim=-1)
    if valid is not None:
        slope = slope * valid
    if measure == "gradient":  # windows of attention: several rows belong to one example
        return {"sum": slope.double().reshape(examples, -1).norm(dim=1).sum()}
    return {"sum": (slope.double() * size.double()).sum()}


def _valid(context: Context, batch: Batch, y: Tensor) -> Tensor | None:
    mask = next((batch.inputs[s.name] for s in context.task.signature.inputs if s.role == "mask"), None)
    return mask.bool() if mask is not None and mask.shape == y.shape[:-1] else None


@contextmanager
def _outputs(context: Context, backward: bool) -> Iterator[list[tuple[str, Tensor, Tensor]]]:
    """Within the block every use of a site leaves (name, y, probe): a zero added to y, whose gradient is that of y."""
    seen: list[tuple[str, Tensor, Tensor]] = []

    def hook_for(name: str) -> Any:
        def hook(_: nn.Module, __: Any, y: Tensor) -> Tensor:
            probe = torch.zeros_like(y, requires_grad=backward)
            seen.append((name, y.detach(), probe))
            return y + probe if backward else y

        return hook

    with ExitStack() as stack:
        for site in context.sites:
            stack.callback(context.model.get_submodule(site.out).register_forward_hook(hook_for(site.name)).remove)
        yield seen
