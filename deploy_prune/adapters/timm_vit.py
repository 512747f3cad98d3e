"""timm VisionTransformer: ViT, DeiT, DeiT-III, DINOv2, CLIP's image tower; with fused qkv."""

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
        from timm.models.vision_transformer import Block

        from deploy_prune.adapters.modules.vanished import Vanished

        sites: list[Site] = []
        problems: list[str] = []
        for i, block in enumerate(model.blocks):  # type: ignore[arg-type, union-attr]
            before = isinstance(block, Block)  # its norms feed one sublayer each; elsewhere they follow it and stay
            for own, norm, find in (("attn", "norm1", _attention), ("mlp", "norm2", feed_forward)):
                module: Any = getattr(block, own, None)
                if type(module) is Vanished:
                    continue
                found = find(f"blocks.{i}.{own}", module, (f"blocks.{i}.{norm}",) if before else ())
                if isinstance(found, Site):
                    sites.append(found)
                else:
                    problems.append(f"blocks.{i}.{own}: {found}")
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

    def untouched(self, model: nn.Module) -> list[tuple[str, str]]:
        found = [("patch_embed", PATCHES)]
        if getattr(model, "attn_pool", None) is not None:
            found.append(("attn_pool", "pools all tokens with one query: its width is the width of the whole model"))
        return found + [(name, CLASSIFIER) for name in ("head", "head_dist") if hasattr(model, name)]


PATCHES = "makes the width that every block reads and writes"
CLASSIFIER = "its inputs are the width of the whole model, its outputs the classes"


def _attention(name: str, attention: Any, alone: tuple[str, ...]) -> Site | str:
    """The site of a timm attention module, or what it is that no cut understands."""
    from timm.layers import Attention
    from torch import nn

    from deploy_prune.adapters.modules.timm_attention import UnevenAttention

    if type(attention) not in (Attention, UnevenAttention):
        return f"{type(attention).__name__}, expected timm.layers.Attention"
    if attention.gate is not None or not isinstance(attention.norm, nn.Identity):
        return "gated attention or a norm over all heads"
    normed = not isinstance(attention.q_norm, nn.Identity)
    return attention_site(
        name,
        heads=attention.num_heads,
        head_dim=getattr(attention, "qk_width", attention.head_dim),
        vo_width=getattr(attention, "vo_width", attention.head_dim),
        query=f"{name}.qkv",
        key=f"{name}.qkv",
        value=f"{name}.qkv",
        stacked=True,
        out=f"{name}.proj",
        alone=(*alone, f"{name}.q_norm", f"{name}.k_norm") if normed else alone,
        limits={UnitKind.QK: NORMED} if normed else None,
    )


def feed_forward(name: str, mlp: Any, alone: tuple[str, ...]) -> Site | str:
    """The site of a timm feed-forward, plain or gated, or what it is that no cut understands."""
    from timm.layers import GluMlp, Mlp, SwiGLU
    from torch import nn

    inputs = {Mlp: ("fc1",), GluMlp: ("fc1",), SwiGLU: ("fc1_g", "fc1_x")}.get(type(mlp))
    if inputs is None:
        return f"{type(mlp).__name__}, expected timm.layers.Mlp, GluMlp or SwiGLU"
    if not isinstance(mlp.norm, nn.Identity):
        return "a norm over the hidden neurons"
    return feed_forward_site(
        name,
        neurons=mlp.fc2.in_features,
        out=f"{name}.fc2",
        inputs=tuple(f"{name}.{layer}" for layer in inputs),
        stacked=type(mlp) is GluMlp,
        alone=alone,
    )
