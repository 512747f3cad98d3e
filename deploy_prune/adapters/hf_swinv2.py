"""HF Swin v2: cosine attention within windows, position biases made by a small network, norms after the sublayers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from deploy_prune.adapters.base import attention_site, feed_forward_site, module_at
from deploy_prune.adapters.hf_families import Family, HfAdapter, qk_width, vo_width
from deploy_prune.adapters.hf_vit import HfViT
from deploy_prune.adapters.timm_swin import COSINE
from deploy_prune.units import Site, SiteKind, Slice, UnitKind

if TYPE_CHECKING:
    from torch import Tensor, nn


class HfSwinv2(HfAdapter):
    name = "hf-swinv2"
    families = (Family("swinv2", "Swinv2"),)
    attention = "attention.self"
    feed_forward = "intermediate"
    untouched = HfViT.untouched

    def layer_class(self, family: Family) -> type[nn.Module]:
        return family.cls("Layer")

    def attention_class(self, family: Family) -> type[nn.Module]:
        return family.cls("SelfAttention")

    def feed_forward_class(self, family: Family) -> type[nn.Module]:
        return family.cls("Intermediate")

    def forward(self) -> Callable[..., Any]:
        from deploy_prune.adapters.modules.hf_swinv2 import forward

        return forward

    def attention_site(self, name: str, layer: Any, attention: Any) -> Site:
        own = f"{name}.attention.self"
        return attention_site(
            f"{name}.attention",
            heads=attention.num_attention_heads,
            head_dim=qk_width(attention, attention.attention_head_size),
            vo_width=vo_width(attention, attention.attention_head_size),
            query=f"{own}.query",
            key=f"{own}.key",
            value=f"{own}.value",
            out=f"{name}.attention.output.dense",
            serving=(f"{own}.continuous_position_bias_mlp.0",),
            with_heads=(
                Slice(f"{own}.logit_scale", "out"),
                Slice(f"{own}.continuous_position_bias_mlp.2", "out"),
            ),
            limits={UnitKind.QK: COSINE},
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
        from deploy_prune.adapters.modules.vanished import Passing, Vanished

        attention = site.kind is SiteKind.ATTENTION
        model.set_submodule(f"{site.name}.self" if attention else site.name, Passing(extra=int(attention)))
        model.set_submodule(site.out, Vanished(bias))
