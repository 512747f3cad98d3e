"""HF encoders of the BERT outline, bare or under any task head: BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from deploy_prune.adapters.base import attention_site, feed_forward_site, module_at
from deploy_prune.adapters.hf_families import Family, HfAdapter, qk_width, vo_width
from deploy_prune.units import Site, SiteKind

if TYPE_CHECKING:
    from torch import Tensor, nn


class HfBert(HfAdapter):
    name = "hf-bert"
    families = (
        Family("bert", "Bert"),
        Family("roberta", "Roberta"),
        Family("xlm_roberta", "XLMRoberta"),
        Family("camembert", "Camembert"),
        Family("electra", "Electra"),
    )
    attention = "attention.self"
    feed_forward = "intermediate"

    def layer_class(self, family: Family) -> type[nn.Module]:
        return family.cls("Layer")

    def attention_class(self, family: Family) -> type[nn.Module]:
        return family.cls("SelfAttention")

    def feed_forward_class(self, family: Family) -> type[nn.Module]:
        return family.cls("Intermediate")

    def forward(self) -> Callable[..., Any]:
        from deploy_prune.adapters.modules.hf_bert import forward

        return forward

    def problems(self, name: str, layer: Any) -> Iterator[str]:
        if hasattr(layer, "crossattention"):
            yield f"{name}.crossattention: cross-attention, expected an encoder"

    def attention_site(self, name: str, layer: Any, attention: Any) -> Site:
        return attention_site(
            f"{name}.attention",
            heads=attention.num_attention_heads,
            head_dim=qk_width(attention, attention.attention_head_size),
            vo_width=vo_width(attention, attention.attention_head_size),
            query=f"{name}.attention.self.query",
            key=f"{name}.attention.self.key",
            value=f"{name}.attention.self.value",
            out=f"{name}.attention.output.dense",
        )

    def feed_forward_site(self, name: str, layer: Any) -> Site:
        return feed_forward_site(
            f"{name}.intermediate",
            neurons=layer.intermediate.dense.out_features,
            out=f"{name}.output.dense",
            inputs=(f"{name}.intermediate.dense",),
        )

    def attention_of(self, model: nn.Module, site: Site) -> Any:
        return module_at(model, f"{site.name}.self")

    def set_heads(self, attention: Any, heads: int) -> None:
        attention.num_attention_heads = heads
        attention.all_head_size = attention.query.out_features

    def vanish(self, model: nn.Module, site: Site, bias: Tensor | None) -> None:
        """The residual connection and its norm live in the output modules and stay."""
        from deploy_prune.adapters.modules.vanished import Passing, Vanished

        if site.kind is SiteKind.ATTENTION:
            place = self.attention_of(model, site).layer_idx
            model.set_submodule(f"{site.name}.self", Passing(extra=1, layer_idx=place))
        else:
            model.set_submodule(site.name, Passing())
        model.set_submodule(site.out, Vanished(bias))
