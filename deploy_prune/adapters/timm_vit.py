"""timm VisionTransformer: ViT and DeiT, with fused qkv."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deploy_prune.adapters.base import Adapter, checked, feed_forward_site, module_at
from deploy_prune.units import Site, SiteKind, Slice, UnitKind

if TYPE_CHECKING:
    from torch import nn


class TimmViT(Adapter):
    name = "timm-vit"

    def matches(self, model: nn.Module) -> bool:
        from timm.models.vision_transformer import VisionTransformer

        return isinstance(model, VisionTransformer)

    def sites(self, model: nn.Module) -> tuple[Site, ...]:
        from timm.layers import Attention, Mlp
        from torch import nn

        sites: list[Site] = []
        problems: list[str] = []
        for i, block in enumerate(model.blocks):  # type: ignore[arg-type, union-attr]
            attention: Any = getattr(block, "attn", None)
            mlp: Any = getattr(block, "mlp", None)
            name = f"blocks.{i}.attn"
            if type(attention) is not Attention:
                problems.append(f"{name}: {type(attention).__name__}, expected timm.layers.Attention")
            elif getattr(attention, "gate", None) is not None or not isinstance(
                getattr(attention, "norm", nn.Identity()), nn.Identity
            ):
                problems.append(f"{name}: gated attention or a norm over all heads")
            else:
                sites.append(fused_attention_site(name, attention.num_heads, attention.head_dim))
            name = f"blocks.{i}.mlp"
            if type(mlp) is not Mlp:
                problems.append(f"{name}: {type(mlp).__name__}, expected timm.layers.Mlp")
            elif not isinstance(mlp.norm, nn.Identity):
                problems.append(f"{name}: a norm over the hidden neurons")
            else:
                sites.append(
                    feed_forward_site(name, neurons=mlp.fc1.out_features, out=f"{name}.fc2", inputs=(f"{name}.fc1",))
                )
        return checked(model, self.name, sites, problems)

    def resize(self, model: nn.Module, site: Site, kept: dict[UnitKind, int]) -> None:
        if site.kind is SiteKind.ATTENTION:
            attention = module_at(model, site.name)
            attention.num_heads = kept[UnitKind.HEAD]
            attention.attn_dim = kept[UnitKind.HEAD] * site.head_dim


def fused_attention_site(name: str, heads: int, head_dim: int) -> Site:
    """An attention site whose query, key and value are three equal parts of one layer `qkv`."""
    head = (Slice(f"{name}.qkv", "out", head_dim, parts=3), Slice(f"{name}.proj", "in", head_dim))
    return Site(
        name,
        SiteKind.ATTENTION,
        {UnitKind.HEAD: heads},
        {UnitKind.HEAD: head},
        f"{name}.proj",
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
    )
