"""An adapter knows one architecture family: where its sites are and which attributes follow a cut."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from deploy_prune.errors import UnsupportedModelError
from deploy_prune.units import Site, SiteKind, Slice, UnitKind

if TYPE_CHECKING:
    from torch import nn


class Adapter(ABC):
    """Stateless; one instance per family in the registry."""

    name: ClassVar[str]

    @abstractmethod
    def matches(self, model: nn.Module) -> bool:
        """Whether `model` is of this family, decided by class, never by guessing attribute names."""

    @abstractmethod
    def sites(self, model: nn.Module) -> tuple[Site, ...]:
        """Every prunable site in model order. Raises UnsupportedModelError listing the sites not understood."""

    @abstractmethod
    def resize(self, model: nn.Module, site: Site, kept: dict[UnitKind, int]) -> None:
        """Set the attributes (head counts, widths) that the cut at `site` made stale; its layers are cut already."""


def module_at(model: nn.Module, name: str) -> Any:
    """The submodule `name`, untyped: an adapter knows its class and its attributes, the type checker does not."""
    return model.get_submodule(name)


def attention_site(
    name: str, *, heads: int, head_dim: int, out: str, query: str, key: str, value: str, kv_heads: int | None = None
) -> Site:
    """An attention site with separate query, key and value layers; a unit is one key/value head and its queries."""
    kv_heads = kv_heads or heads
    wide = heads // kv_heads * head_dim
    head = (
        Slice(query, "out", wide),
        Slice(key, "out", head_dim),
        Slice(value, "out", head_dim),
        Slice(out, "in", wide),
    )
    return Site(
        name,
        SiteKind.ATTENTION,
        {UnitKind.HEAD: kv_heads},
        {UnitKind.HEAD: head},
        out,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
    )


def feed_forward_site(name: str, *, neurons: int, out: str, inputs: tuple[str, ...]) -> Site:
    """A feed-forward site; a unit is one hidden dimension, made by every layer of `inputs` (two when gated)."""
    neuron = (*(Slice(layer, "out") for layer in inputs), Slice(out, "in"))
    return Site(name, SiteKind.FEED_FORWARD, {UnitKind.NEURON: neurons}, {UnitKind.NEURON: neuron}, out)


def linear_problems(model: nn.Module, site: Site) -> list[str]:
    """Reasons why the layers of `site` are not the plain linear layers that a cut understands."""
    import torch

    problems = []
    for kind, slices in site.slices.items():
        for s in slices:
            layer = model.get_submodule(s.module)
            if type(layer) is not torch.nn.Linear:
                problems.append(f"{site.name}: {s.module} is a {type(layer).__name__}, expected torch.nn.Linear")
                continue
            width = layer.out_features if s.axis == "out" else layer.in_features
            expected = site.counts[kind] * s.block * s.parts
            if width != expected:
                problems.append(f"{site.name}: {s.module} has {width} {s.axis}put features, expected {expected}")
    return problems


def checked(model: nn.Module, family: str, sites: list[Site], problems: list[str]) -> tuple[Site, ...]:
    """`sites` when nothing is wrong. Raises UnsupportedModelError with every problem otherwise."""
    problems = problems + [p for site in sites for p in linear_problems(model, site)]
    if problems or not sites:
        raise UnsupportedModelError(
            f"{len(problems) or 'all'} sites not understood",
            where=f"{type(model).__name__} (adapter {family})",
            problems=problems or ["the model has no attention or feed-forward site"],
            remedy="Write an adapter for this variant (CONTRIBUTING.md, 'To add an architecture').",
        )
    return tuple(sites)
