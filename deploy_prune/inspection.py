"""What a model offers to pruning, as plain data: its sites with their costs, and what stays with the reason why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deploy_prune.budget import CostModel, count_params
from deploy_prune.signature import Signature, TensorSpec
from deploy_prune.tasks.tokens import longest_text
from deploy_prune.units import Site, UnitKind, groups

if TYPE_CHECKING:
    from torch import Tensor, nn

TOKENS = 128  # of the text that multiplications are counted for, or as many as the model takes


def offers(model: nn.Module) -> dict[str, Any]:
    """Parameters, multiplications, sites, unit costs and what stays of `model`.

    A row of `units` is one kind at one site: `params` and `MACs` are what all its units hold, `per unit` what leaves
    with one alone (of qk and vo: one of every head). Raises UnsupportedModelError.
    """
    from deploy_prune.adapters import adapter_for

    adapter = adapter_for(model)
    sites = adapter.sites(model)
    signature, sizes = reference(model)
    costs = CostModel.measure(model, sites, signature, signature.random_inputs(sizes, seed=0))
    full = {site.name: dict(site.counts) for site in sites}
    prunable = costs.prunable(sites)
    return {
        "adapter": adapter.name,
        "parameters": costs.params,
        "prunable": f"{prunable} ({100 * prunable / costs.params:.0f} %)",
        "MACs": costs.macs,
        "counted for": ", ".join(f"{spec.name} {spec.sized(sizes)}" for spec in signature.inputs),
        "units": [_row(costs, sites, full, site, kind) for site, kind in groups(sites)],
        "not offered": [
            {"site": site.name, "kind": kind.value, "why": why}
            for site in sites
            for kind, why in (site.limits or {}).items()
        ],
        "stays": _stays(model, sites, adapter.untouched(model)),
    }


def reference(model: nn.Module) -> tuple[Signature, dict[str, int]]:
    """A forward pass to count: one image, one text, or one of both, by the inputs that the model takes.

    The signature computes whatever the model returns; it is for counting, not for export.
    """
    config: Any = getattr(model, "config", None)
    vision, text = getattr(config, "vision_config", config), getattr(config, "text_config", config)
    takes = _inputs(model)
    specs: list[TensorSpec] = []
    sizes = {"batch": 1}
    if "input_ids" in takes:
        sizes["sequence"] = min(TOKENS, longest_text(text) or TOKENS)
        shape = ("batch", "sequence")
        specs += [
            TensorSpec("input_ids", "int64", shape, "ids", high=text.vocab_size),
            TensorSpec("attention_mask", "int64", shape, "mask"),
        ]
    if "pixel_values" in takes:
        specs.append(TensorSpec("pixel_values", "float32", ("batch", *_image_shape(model, vision))))

    def call(model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
        return model(inputs["pixel_values"]) if config is None else model(**inputs)

    return Signature(tuple(specs), TensorSpec("output", "float32", ("batch",)), call), sizes


def _inputs(model: nn.Module) -> Sequence[str]:
    import inspect

    if getattr(model, "config", None) is None:
        return ["pixel_values"]
    return list(inspect.signature(model.forward).parameters)


def _image_shape(model: nn.Module, config: Any) -> tuple[int, int, int]:
    """(channels, height, width) of the images that a timm model or a transformers config was made for."""
    embedding: Any = getattr(model, "patch_embed", None)
    if embedding is not None:
        height, width = embedding.img_size
        return embedding.proj.in_channels, height, width
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return config.num_channels, height, width


def _row(
    costs: CostModel, sites: Sequence[Site], full: Mapping[str, Mapping[UnitKind, int]], site: Site, kind: UnitKind
) -> dict[str, Any]:
    def saved(left: int) -> tuple[int, int]:
        counts = {**full, site.name: {**full[site.name], kind: left}}
        return costs.params - costs.params_of(sites, counts), costs.macs - costs.macs_of(sites, counts)

    count = site.counts[kind]
    (params, macs), (all_params, all_macs) = saved(count - 1), saved(0)
    return {
        "site": site.name,
        "kind": kind.value,
        "units": f"{site.lanes(kind)}×{count}" if site.lanes(kind) > 1 else str(count),
        "params": all_params,
        "MACs": all_macs,
        "params per unit": params,
        "MACs per unit": macs,
    }


def _stays(model: nn.Module, sites: Sequence[Site], reasons: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Every module that holds parameters outside of all sites, as the adapter names them, then the rest as one row."""
    inside = {id(p) for site in sites for name, _ in site.axes() for p in _parameters(model, name)}
    inside |= {id(p) for site in sites for name in site.alone for p in _parameters(model, name)}
    rows = []
    seen = set(inside)
    for name, why in reasons:
        own = {id(p): p.numel() for p in _parameters(model, name) if id(p) not in seen}
        seen |= own.keys()
        rows.append({"module": name, "params": sum(own.values()), "why": why})
    left = sum(p.numel() for p in model.parameters() if id(p) not in seen)
    if left:
        rows.append({"module": "everything else", "params": left, "why": "norms, embeddings and scales of the width"})
    assert sum(row["params"] for row in rows) == count_params(model) - sum(
        p.numel() for p in model.parameters() if id(p) in inside
    )
    return rows


def _parameters(model: nn.Module, name: str) -> list[Any]:
    from torch import nn

    from deploy_prune.layers import layer_at

    found = layer_at(model, name)
    return [found] if isinstance(found, nn.Parameter) else list(found.parameters())
