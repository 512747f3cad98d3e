"""HF BERT encoders, bare or under any task head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploy_prune.adapters.base import Adapter, attention_site, checked, feed_forward_site, module_at
from deploy_prune.units import Site, SiteKind, UnitKind

if TYPE_CHECKING:
    from torch import nn


class HfBert(Adapter):
    name = "hf-bert"

    def matches(self, model: nn.Module) -> bool:
        from transformers import BertPreTrainedModel

        return isinstance(model, BertPreTrainedModel)

    def sites(self, model: nn.Module) -> tuple[Site, ...]:
        from transformers.models.bert.modeling_bert import BertLayer, BertSelfAttention

        sites: list[Site] = []
        problems: list[str] = []
        for name, layer in model.named_modules():
            if not isinstance(layer, BertLayer):
                continue
            attention = layer.attention.self
            if type(attention) is not BertSelfAttention or hasattr(layer, "crossattention"):
                problems.append(
                    f"{name}: {type(attention).__name__} with or without cross-attention, "
                    "expected plain BertSelfAttention"
                )
                continue
            own = f"{name}.attention"
            sites.append(
                attention_site(
                    own,
                    heads=attention.num_attention_heads,
                    head_dim=attention.attention_head_size,
                    query=f"{own}.self.query",
                    key=f"{own}.self.key",
                    value=f"{own}.self.value",
                    out=f"{own}.output.dense",
                )
            )
            sites.append(
                feed_forward_site(
                    f"{name}.intermediate",
                    neurons=layer.intermediate.dense.out_features,
                    out=f"{name}.output.dense",
                    inputs=(f"{name}.intermediate.dense",),
                )
            )
        return checked(model, self.name, sites, problems)

    def resize(self, model: nn.Module, site: Site, kept: dict[UnitKind, int]) -> None:
        if site.kind is SiteKind.ATTENTION:
            attention = module_at(model, f"{site.name}.self")
            attention.num_attention_heads = kept[UnitKind.HEAD]
            attention.all_head_size = kept[UnitKind.HEAD] * site.head_dim
