"""HF BERT encoders, bare or under any task head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from deploy_prune.adapters.base import Adapter, attention_site, checked, feed_forward_site, module_at, uneven_widths
from deploy_prune.units import Site, SiteKind, UnitKind

if TYPE_CHECKING:
    from torch import Tensor, nn


class HfBert(Adapter):
    name = "hf-bert"

    def matches(self, model: nn.Module) -> bool:
        from transformers import BertPreTrainedModel

        return isinstance(model, BertPreTrainedModel)

    def sites(self, model: nn.Module) -> tuple[Site, ...]:
        from transformers.models.bert.modeling_bert import BertLayer, BertSelfAttention

        from deploy_prune.adapters.modules.hf_bert import UnevenBertSelfAttention
        from deploy_prune.adapters.modules.vanished import Passing

        sites: list[Site] = []
        problems: list[str] = []
        for name, layer in model.named_modules():
            if not isinstance(layer, BertLayer):
                continue
            attention = layer.attention.self
            own = f"{name}.attention"
            if type(attention) is Passing:
                pass
            elif type(attention) not in (BertSelfAttention, UnevenBertSelfAttention) or hasattr(
                layer, "crossattention"
            ):
                problems.append(
                    f"{name}: {type(attention).__name__} with or without cross-attention, "
                    "expected plain BertSelfAttention"
                )
            else:
                sites.append(
                    attention_site(
                        own,
                        heads=attention.num_attention_heads,
                        head_dim=getattr(attention, "qk_width", attention.attention_head_size),
                        vo_width=getattr(attention, "vo_width", attention.attention_head_size),
                        query=f"{own}.self.query",
                        key=f"{own}.self.key",
                        value=f"{own}.self.value",
                        out=f"{own}.output.dense",
                    )
                )
            if type(layer.intermediate) is not Passing:
                sites.append(
                    feed_forward_site(
                        f"{name}.intermediate",
                        neurons=layer.intermediate.dense.out_features,
                        out=f"{name}.output.dense",
                        inputs=(f"{name}.intermediate.dense",),
                    )
                )
        return checked(model, self.name, sites, problems)

    def resize(self, model: nn.Module, site: Site, kept: Mapping[UnitKind, Sequence[int]]) -> None:
        if site.kind is not SiteKind.ATTENTION:
            return
        from deploy_prune.adapters.modules.hf_bert import UnevenBertSelfAttention

        attention = module_at(model, f"{site.name}.self")
        attention.num_attention_heads = len(kept[UnitKind.HEAD])
        attention.all_head_size = attention.query.out_features
        uneven_widths(attention, site, kept, UnevenBertSelfAttention)

    def vanish(self, model: nn.Module, site: Site, bias: Tensor | None) -> None:
        """The residual connection and its norm live in the output modules and stay."""
        from deploy_prune.adapters.modules.vanished import Passing, Vanished

        attention = site.kind is SiteKind.ATTENTION
        model.set_submodule(f"{site.name}.self" if attention else site.name, Passing(extra=int(attention)))
        model.set_submodule(site.out, Vanished(bias))
