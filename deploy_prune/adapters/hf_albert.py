"""HF ALBERT encoders, bare or under any task head. A layer serves several depths and is cut once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from deploy_prune.adapters.base import attention_site, feed_forward_site, module_at
from deploy_prune.adapters.hf_families import Family, HfAdapter, qk_width, vo_width
from deploy_prune.units import Site, SiteKind

if TYPE_CHECKING:
    from torch import Tensor, nn


class HfAlbert(HfAdapter):
    name = "hf-albert"
    families = (Family("albert", "Albert"),)
    attention = "attention"
    feed_forward = "ffn"

    def layer_class(self, family: Family) -> type[nn.Module]:
        return family.cls("Layer")

    def attention_class(self, family: Family) -> type[nn.Module]:
        return family.cls("Attention")

    def feed_forward_class(self, family: Family) -> type[nn.Module]:
        from torch import nn

        return nn.Linear

    def forward(self) -> Callable[..., Any]:
        from deploy_prune.adapters.modules.hf_albert import forward

        return forward

    def attention_site(self, name: str, layer: Any, attention: Any) -> Site:
        return attention_site(
            f"{name}.attention",
            heads=attention.num_attention_heads,
            head_dim=qk_width(attention, attention.attention_head_size),
            vo_width=vo_width(attention, attention.attention_head_size),
            query=f"{name}.attention.query",
            key=f"{name}.attention.key",
            value=f"{name}.attention.value",
            out=f"{name}.attention.dense",
        )

    def feed_forward_site(self, name: str, layer: Any) -> Site:
        return feed_forward_site(
            f"{name}.ffn", neurons=layer.ffn.out_features, out=f"{name}.ffn_output", inputs=(f"{name}.ffn",)
        )

    def set_heads(self, attention: Any, heads: int) -> None:
        attention.num_attention_heads = heads
        attention.all_head_size = attention.query.out_features

    def vanish(self, model: nn.Module, site: Site, bias: Tensor | None) -> None:
        """The residual connections and their norms stay."""
        from torch import nn

        from deploy_prune.adapters.modules.hf_albert import VanishedAlbertAttention
        from deploy_prune.adapters.modules.vanished import Passing, Vanished

        if site.kind is SiteKind.ATTENTION:
            norm = module_at(model, site.name).LayerNorm
            model.set_submodule(site.name, VanishedAlbertAttention(norm, bias))
            return
        layer = module_at(model, site.name.rpartition(".")[0])
        layer.ffn, layer.activation, layer.ffn_output = Passing(), nn.Identity(), Vanished(bias)
