"""HF DistilBERT encoders, bare or under any task head."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from deploy_prune.adapters.base import attention_site, feed_forward_site
from deploy_prune.adapters.hf_families import Family, HfAdapter, qk_width, vo_width
from deploy_prune.units import Site, SiteKind

if TYPE_CHECKING:
    from torch import Tensor, nn


class HfDistilBert(HfAdapter):
    name = "hf-distilbert"
    families = (Family("distilbert", "DistilBert"),)
    attention = "attention"
    feed_forward = "ffn"

    def layer_class(self, family: Family) -> type[nn.Module]:
        from transformers.models.distilbert.modeling_distilbert import TransformerBlock

        return TransformerBlock

    def attention_class(self, family: Family) -> type[nn.Module]:
        return family.cls("SelfAttention")

    def feed_forward_class(self, family: Family) -> type[nn.Module]:
        from transformers.models.distilbert.modeling_distilbert import FFN

        return FFN

    def forward(self) -> Callable[..., Any]:
        from deploy_prune.adapters.modules.hf_distilbert import forward

        return forward

    def attention_site(self, name: str, layer: Any, attention: Any) -> Site:
        return attention_site(
            f"{name}.attention",
            heads=attention.n_heads,
            head_dim=qk_width(attention, attention.attention_head_size),
            vo_width=vo_width(attention, attention.attention_head_size),
            query=f"{name}.attention.q_lin",
            key=f"{name}.attention.k_lin",
            value=f"{name}.attention.v_lin",
            out=f"{name}.attention.out_lin",
        )

    def feed_forward_site(self, name: str, layer: Any) -> Site:
        return feed_forward_site(
            f"{name}.ffn",
            neurons=layer.ffn.lin1.out_features,
            out=f"{name}.ffn.lin2",
            inputs=(f"{name}.ffn.lin1",),
        )

    def set_heads(self, attention: Any, heads: int) -> None:
        attention.n_heads = heads
        attention.dim = attention.out_lin.in_features

    def vanish(self, model: nn.Module, site: Site, bias: Tensor | None) -> None:
        from deploy_prune.adapters.modules.vanished import Vanished

        model.set_submodule(site.name, Vanished(bias, extra=int(site.kind is SiteKind.ATTENTION)))
