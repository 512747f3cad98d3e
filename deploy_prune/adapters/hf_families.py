"""What the adapters of transformers' models have in common: families of one outline, and the walk over their layers."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from deploy_prune.adapters.base import Adapter, checked, module_at, uneven_widths
from deploy_prune.units import Site, SiteKind, UnitKind

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Family:
    """`Family("xlm_roberta", "XLMRoberta")`: XLMRobertaLayer and the like in transformers.models.xlm_roberta."""

    module: str
    prefix: str

    def cls(self, suffix: str) -> type[nn.Module]:
        """The class that transformers names prefix + suffix."""
        found: type[nn.Module] = getattr(self._modeling, self.prefix + suffix)
        return found

    def owns(self, model: nn.Module) -> bool:
        """Whether `model` is of this family. Where its code was never imported there can be no such model."""
        return self._modeling is not None and isinstance(model, self.cls("PreTrainedModel"))

    @property
    def _modeling(self) -> Any:
        return sys.modules.get(f"transformers.models.{self.module}.modeling_{self.module}")


class HfAdapter(Adapter):
    """The adapter of all `families` of one outline: layers that hold an attention and a feed-forward.

    `attention` and `feed_forward` say where these lie in a layer. What a subclass adds is the names of the linear
    layers, the attributes that a cut makes stale, and how attention is computed when widths differ.
    """

    families: ClassVar[tuple[Family, ...]]
    attention: ClassVar[str]
    feed_forward: ClassVar[str]

    @abstractmethod
    def layer_class(self, family: Family) -> type[nn.Module]:
        """The class of a whole layer."""

    @abstractmethod
    def attention_class(self, family: Family) -> type[nn.Module]:
        """The library's own attention, as far as a cut knows it; subclasses of it are refused."""

    @abstractmethod
    def feed_forward_class(self, family: Family) -> type[nn.Module]:
        """The same of the module at `feed_forward`."""

    def feed_forward_classes(self, family: Family) -> tuple[type[nn.Module], ...]:
        """All of them, for families with more than one."""
        return (self.feed_forward_class(family),)

    @abstractmethod
    def forward(self) -> Callable[..., Any]:
        """The attention's forward for unlike query/key and value widths."""

    @abstractmethod
    def attention_site(self, name: str, layer: Any, attention: Any) -> Site:
        """The site of the attention in layer `name`."""

    @abstractmethod
    def feed_forward_site(self, name: str, layer: Any) -> Site:
        """The site of the feed-forward in layer `name`."""

    @abstractmethod
    def set_heads(self, attention: Any, heads: int) -> None:
        """Set the attributes that follow the number of key/value heads; the layers are cut already."""

    def problems(self, name: str, layer: Any) -> Iterator[str]:
        """What else in layer `name` is not understood."""
        return iter(())

    def matches(self, model: nn.Module) -> bool:
        return any(family.owns(model) for family in self.families)

    def sites(self, model: nn.Module) -> tuple[Site, ...]:
        from deploy_prune.adapters.modules.vanished import Absent

        family = next(f for f in self.families if f.owns(model))
        stock, inners = self.attention_class(family), self.feed_forward_classes(family)
        known = (stock, self._uneven(family))
        sites: list[Site] = []
        problems: list[str] = []
        for name, layer in model.named_modules():
            if not isinstance(layer, self.layer_class(family)):
                continue
            problems += self.problems(name, layer)
            attention = layer.get_submodule(self.attention)
            if type(attention) in known:
                sites.append(self.attention_site(name, layer, attention))
            elif not isinstance(attention, Absent):
                problems.append(f"{name}.{self.attention}: {type(attention).__name__}, expected plain {stock.__name__}")
            inner = layer.get_submodule(self.feed_forward)
            if type(inner) in inners:
                sites.append(self.feed_forward_site(name, layer))
            elif not isinstance(inner, Absent):
                problems.append(f"{name}.{self.feed_forward}: {type(inner).__name__}, expected {inners[0].__name__}")
        return checked(model, self.name, sites, problems)

    def resize(self, model: nn.Module, site: Site, kept: Mapping[UnitKind, Sequence[int]]) -> None:
        if site.kind is not SiteKind.ATTENTION:
            return
        family = next(f for f in self.families if f.owns(model))
        attention = self.attention_of(model, site)
        self.set_heads(attention, len(kept[UnitKind.HEAD]))
        uneven_widths(attention, site, kept, self._uneven(family))

    def untouched(self, model: nn.Module) -> list[tuple[str, str]]:
        from torch import nn

        from deploy_prune.layers import is_cuttable

        hf: Any = model
        tokens, output = hf.get_input_embeddings(), hf.get_output_embeddings()
        inside = {layer for site in self.sites(model) for layer, _ in site.axes()}
        found = []
        for name, module in model.named_modules():
            if module is tokens:
                found.append((name, "token embedding: its rows are the vocabulary, its width the model's"))
            elif isinstance(module, nn.Embedding):
                found.append((name, "embedding of positions or segments"))
            elif module is output:
                tied = output.weight is tokens.weight
                found.append((name, "output layer, tied to the token embedding" if tied else "output layer"))
            elif is_cuttable(module) and name not in inside:
                found.append((name, "outside of the layers: a projection, pooler or task head"))
        return found

    def attention_of(self, model: nn.Module, site: Site) -> Any:
        """The module that computes the attention of `site`."""
        return module_at(model, site.name)

    def _uneven(self, family: Family) -> type[nn.Module]:
        from deploy_prune.adapters.modules.hf_attention import uneven

        cls: Any = self.attention_class(family)
        return uneven(cls, self.forward())


def qk_width(attention: Any, head_dim: int) -> int:
    """Query/key features of a head: `head_dim` before any cut."""
    return int(getattr(attention, "qk_width", head_dim))


def vo_width(attention: Any, head_dim: int) -> int:
    """Value features of a head: `head_dim` before any cut."""
    return int(getattr(attention, "vo_width", head_dim))
