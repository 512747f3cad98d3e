"""timm VisionTransformer: ViT and DeiT, with fused qkv."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deploy_prune.adapters.base import (
    NORMED,
    Adapter,
    attention_site,
    checked,
    feed_forward_site,
    module_at,
    uneven_widths,
)
from deploy_prune.units import Site, SiteKind, UnitKind

if TYPE_CHECKING:
    from torch import Tensor, nn


class TimmViT(Adapter):
    name = "timm-vit"

    def matches(self, model: nn.Module) -> bool:
        from timm.models.vision_transformer import VisionTransformer

        return isinstance(model, VisionTransformer)

    def sites(self, model: nn.Module) -> tuple[Site, ...]:
        from timm.layers import Attention, Mlp
        from torch import nn

        from deploy_prune.adapters.modules.timm_attention import UnevenAttention
        from deploy_prune.adapters.modules.vanished import Vanished

        sites: list[Site] = []
        problems: list[str] = []
        for i, block in enumerate(model.blocks):  # type: ignore[arg-type, union-attr]
            attention: Any = getattr(block, "attn", None)
            mlp: Any = getattr(block, "mlp", None)
            name = f"blocks.{i}.attn"
            if type(attention) is Vanished:
                pass
            elif type(attention) not in (Attention, UnevenAttention):
                problems.append(f"{name}: {type(attention).__name__}, expected timm.layers.Attention")
            elif getattr(attention, "gate", None) is not None or not isinstance(
                getattr(attention, "norm", nn.Identity()), nn.Identity
            ):
                problems.append(f"{name}: gated attention or a norm over all heads")
            else:
                normed = not isinstance(attention.q_norm, nn.Identity)
                sites.append(
                    attention_site(
                        name,
                        heads=attention.num_heads,
                        head_dim=getattr(attention, "qk_width", attention.head_dim),
                        vo_width=getattr(attention, "vo_width", attention.head_dim),
                        query=f"{name}.qkv",
                        key=f"{name}.qkv",
                        value=f"{name}.qkv",
                        stacked=True,
                        out=f"{name}.proj",
                        alone=(f"blocks.{i}.norm1",),
                        limits={UnitKind.QK: NORMED} if normed else None,
                    )
                )
            name = f"blocks.{i}.mlp"
            if type(mlp) is Vanished:
                pass
            elif type(mlp) is not Mlp:
                problems.append(f"{name}: {type(mlp).__name__}, expected timm.layers.Mlp")
            elif not isinstance(mlp.norm, nn.Identity):
                problems.append(f"{name}: a norm over the hidden neurons")
            else:
                sites.append(
                    feed_forward_site(
                        name,
                        neurons=mlp.fc1.out_features,
                        out=f"{name}.fc2",
                        inputs=(f"{name}.fc1",),
                        alone=(f"blocks.{i}.norm2",),
                    )
                )
        return checked(model, self.name, sites, problems)

    def resize(self, model: nn.Module, site: Site, kept: Mapping[UnitKind, Sequence[int]]) -> None:
        if site.kind is not SiteKind.ATTENTION:
            return
        from deploy_prune.adapters.modules.timm_attention import UnevenAttention

        attention = module_at(model, site.name)
        attention.num_heads = len(kept[UnitKind.HEAD])
        attention.attn_dim = attention.proj.in_features
        uneven_widths(attention, site, kept, UnevenAttention)

    def vanish(self, model: nn.Module, site: Site, bias: Tensor | None) -> None:
        from deploy_prune.adapters.modules.vanished import Vanished

        model.set_submodule(site.name, Vanished(bias))
