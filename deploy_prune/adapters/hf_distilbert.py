"""HF DistilBERT encoders, bare or under any task head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from deploy_prune.adapters.base import Adapter, attention_site, checked, feed_forward_site, module_at, uneven_widths
from deploy_prune.units import Site, SiteKind, UnitKind

if TYPE_CHECKING:
    from torch import Tensor, nn


class HfDistilBert(Adapter):
    name = "hf-distilbert"

    def matches(self, model: nn.Module) -> bool:
        from transformers import DistilBertPreTrainedModel

        return isinstance(model, DistilBertPreTrainedModel)

    def sites(self, model: nn.Module) -> tuple[Site, ...]:
        from transformers.models.distilbert.modeling_distilbert import DistilBertSelfAttention, TransformerBlock

        from deploy_prune.adapters.modules.hf_distilbert import UnevenDistilBertSelfAttention
        from deploy_prune.adapters.modules.vanished import Vanished

        sites: list[Site] = []
        problems: list[str] = []
        for name, layer in model.named_modules():
            if not isinstance(layer, TransformerBlock):
                continue
            attention = layer.attention
            own = f"{name}.attention"
            if type(attention) is Vanished:
                pass
            elif type(attention) not in (DistilBertSelfAttention, UnevenDistilBertSelfAttention):
                problems.append(f"{own}: {type(attention).__name__}, expected DistilBertSelfAttention")
            else:
                sites.append(
                    attention_site(
                        own,
                        heads=attention.n_heads,
                        head_dim=getattr(attention, "qk_width", attention.attention_head_size),
                        vo_width=getattr(attention, "vo_width", attention.attention_head_size),
                        query=f"{own}.q_lin",
                        key=f"{own}.k_lin",
                        value=f"{own}.v_lin",
                        out=f"{own}.out_lin",
                    )
                )
            if type(layer.ffn) is not Vanished:
                sites.append(
                    feed_forward_site(
                        f"{name}.ffn",
                        neurons=layer.ffn.lin1.out_features,
                        out=f"{name}.ffn.lin2",
                        inputs=(f"{name}.ffn.lin1",),
                    )
                )
        return checked(model, self.name, sites, problems)

    def resize(self, model: nn.Module, site: Site, kept: Mapping[UnitKind, Sequence[int]]) -> None:
        if site.kind is not SiteKind.ATTENTION:
            return
        from deploy_prune.adapters.modules.hf_distilbert import UnevenDistilBertSelfAttention

        attention = module_at(model, site.name)
        attention.n_heads = len(kept[UnitKind.HEAD])
        attention.dim = attention.out_lin.in_features
        uneven_widths(attention, site, kept, UnevenDistilBertSelfAttention)

    def vanish(self, model: nn.Module, site: Site, bias: Tensor | None) -> None:
        from deploy_prune.adapters.modules.vanished import Vanished

        model.set_submodule(site.name, Vanished(bias, extra=int(site.kind is SiteKind.ATTENTION)))
