"""HF DistilBERT encoders, bare or under any task head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploy_prune.adapters.base import Adapter, attention_site, checked, feed_forward_site, module_at
from deploy_prune.units import Site, SiteKind, UnitKind

if TYPE_CHECKING:
    from torch import nn


class HfDistilBert(Adapter):
    name = "hf-distilbert"

    def matches(self, model: nn.Module) -> bool:
        from transformers import DistilBertPreTrainedModel

        return isinstance(model, DistilBertPreTrainedModel)

    def sites(self, model: nn.Module) -> tuple[Site, ...]:
        from transformers.models.distilbert.modeling_distilbert import DistilBertSelfAttention, TransformerBlock

        sites: list[Site] = []
        problems: list[str] = []
        for name, layer in model.named_modules():
            if not isinstance(layer, TransformerBlock):
                continue
            attention = layer.attention
            if type(attention) is not DistilBertSelfAttention:
                problems.append(f"{name}.attention: {type(attention).__name__}, expected DistilBertSelfAttention")
                continue
            own = f"{name}.attention"
            sites.append(
                attention_site(
                    own,
                    heads=attention.n_heads,
                    head_dim=attention.attention_head_size,
                    query=f"{own}.q_lin",
                    key=f"{own}.k_lin",
                    value=f"{own}.v_lin",
                    out=f"{own}.out_lin",
                )
            )
            sites.append(
                feed_forward_site(
                    f"{name}.ffn",
                    neurons=layer.ffn.lin1.out_features,
                    out=f"{name}.ffn.lin2",
                    inputs=(f"{name}.ffn.lin1",),
                )
            )
        return checked(model, self.name, sites, problems)

    def resize(self, model: nn.Module, site: Site, kept: dict[UnitKind, int]) -> None:
        if site.kind is SiteKind.ATTENTION:
            attention = module_at(model, site.name)
            attention.n_heads = kept[UnitKind.HEAD]
            attention.dim = kept[UnitKind.HEAD] * site.head_dim
