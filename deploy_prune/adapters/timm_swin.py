"""timm Swin Transformer, v1 and v2: attention within windows, with a bias per head and relative position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deploy_prune.adapters.base import Adapter, attention_site, checked, module_at, uneven_widths
from deploy_prune.adapters.timm_vit import CLASSIFIER, PATCHES, feed_forward
from deploy_prune.units import Site, SiteKind, Slice, UnitKind

if TYPE_CHECKING:
    from torch import Tensor, nn

COSINE = "scores are cosines: the length of a query or key is made of all of its dimensions"
MERGING = "joins neighbouring patches into the next stage's width"


class TimmSwin(Adapter):
    name = "timm-swin"

    def matches(self, model: nn.Module) -> bool:
        from timm.models.swin_transformer import SwinTransformer
        from timm.models.swin_transformer_v2 import SwinTransformerV2

        return isinstance(model, SwinTransformer | SwinTransformerV2)

    def sites(self, model: nn.Module) -> tuple[Site, ...]:
        from timm.models.swin_transformer import SwinTransformerBlock
        from timm.models.swin_transformer_v2 import SwinTransformerV2Block

        from deploy_prune.adapters.modules.vanished import Vanished

        sites: list[Site] = []
        problems: list[str] = []
        for name, block in model.named_modules():
            if not isinstance(block, SwinTransformerBlock | SwinTransformerV2Block):
                continue
            first = isinstance(block, SwinTransformerBlock)  # v2 norms what a sublayer wrote: its norms stay
            for own, norm, find in (("attn", "norm1", _attention), ("mlp", "norm2", feed_forward)):
                module = getattr(block, own)
                if type(module) is Vanished:
                    continue
                found = find(f"{name}.{own}", module, (f"{name}.{norm}",) if first else ())
                if isinstance(found, Site):
                    sites.append(found)
                else:
                    problems.append(f"{name}.{own}: {found}")
        return checked(model, self.name, sites, problems)

    def resize(self, model: nn.Module, site: Site, kept: Mapping[UnitKind, Sequence[int]]) -> None:
        if site.kind is not SiteKind.ATTENTION:
            return
        from deploy_prune.adapters.modules.timm_swin import UnevenWindowAttention, UnevenWindowAttentionV2

        attention = module_at(model, site.name)
        attention.num_heads = len(kept[UnitKind.HEAD])
        if UnitKind.QK in site.counts:
            uneven_widths(attention, site, kept, UnevenWindowAttention)
            return
        attention.__class__ = UnevenWindowAttentionV2  # v2's own views its output with the width of the block
        attention.qk_width, attention.vo_width = site.qk_width, attention.proj.in_features // attention.num_heads
        if attention.k_bias is not None:
            attention.k_bias = attention.k_bias.new_zeros(attention.num_heads * site.qk_width)

    def vanish(self, model: nn.Module, site: Site, bias: Tensor | None) -> None:
        from deploy_prune.adapters.modules.vanished import Vanished

        model.set_submodule(site.name, Vanished(bias))

    def untouched(self, model: nn.Module) -> list[tuple[str, str]]:
        merging = [(name, MERGING) for name, _ in model.named_modules() if name.endswith(".downsample")]
        return [("patch_embed", PATCHES), *merging, ("head", CLASSIFIER)]


def _attention(name: str, attention: Any, alone: tuple[str, ...]) -> Site | str:
    from timm.models.swin_transformer import WindowAttention
    from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2

    from deploy_prune.adapters.modules.timm_swin import UnevenWindowAttention, UnevenWindowAttentionV2

    qkv = f"{name}.qkv"
    if type(attention) in (WindowAttention, UnevenWindowAttention):
        qk_width = getattr(attention, "qk_width", attention.proj.in_features // attention.num_heads)
        return attention_site(
            name,
            heads=attention.num_heads,
            head_dim=qk_width,
            vo_width=attention.proj.in_features // attention.num_heads,
            query=qkv,
            key=qkv,
            value=qkv,
            stacked=True,
            out=f"{name}.proj",
            alone=alone,
            with_heads=(Slice(f"{name}.relative_position_bias_table", "in"),),
        )
    if type(attention) not in (WindowAttentionV2, UnevenWindowAttentionV2):
        return f"{type(attention).__name__}, expected timm's WindowAttention"
    qk_width = getattr(attention, "qk_width", attention.proj.in_features // attention.num_heads)
    biased = attention.q_bias is not None
    bias = (Slice(f"{name}.q_bias", "out", qk_width, repeat=((qk_width, 1),)),) if biased else ()
    return attention_site(
        name,
        heads=attention.num_heads,
        head_dim=qk_width,
        vo_width=attention.proj.in_features // attention.num_heads,
        query=qkv,
        key=qkv,
        value=qkv,
        stacked=True,
        out=f"{name}.proj",
        alone=alone,
        value_bias=f"{name}.v_bias" if biased else None,
        serving=(f"{name}.cpb_mlp.0",),
        with_heads=(Slice(f"{name}.logit_scale", "out"), Slice(f"{name}.cpb_mlp.2", "out"), *bias),
        limits={UnitKind.QK: COSINE},
    )
