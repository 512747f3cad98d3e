"""HF GPT-2 decoders: query, key and value in one transposed layer, learned positions, norms before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from deploy_prune.adapters.base import attention_site, feed_forward_site, module_at
from deploy_prune.adapters.hf_families import Family, HfAdapter, qk_width, vo_width
from deploy_prune.units import Site, SiteKind

if TYPE_CHECKING:
    from torch import Tensor, nn


class HfGpt2(HfAdapter):
    name = "hf-gpt2"
    families = (Family("gpt2", "GPT2"),)
    attention = "attn"
    feed_forward = "mlp"

    def layer_class(self, family: Family) -> type[nn.Module]:
        return family.cls("Block")

    def attention_class(self, family: Family) -> type[nn.Module]:
        return family.cls("Attention")

    def feed_forward_class(self, family: Family) -> type[nn.Module]:
        return family.cls("MLP")

    def forward(self) -> Callable[..., Any]:
        from deploy_prune.adapters.modules.hf_gpt2 import forward

        return forward

    def problems(self, name: str, layer: Any) -> Iterator[str]:
        if hasattr(layer, "crossattention"):
            yield f"{name}.crossattention: cross-attention, expected a plain decoder"

    def attention_site(self, name: str, layer: Any, attention: Any) -> Site:
        own = f"{name}.attn"
        return attention_site(
            own,
            heads=attention.num_heads,
            head_dim=qk_width(attention, attention.head_dim),
            vo_width=vo_width(attention, attention.head_dim),
            query=f"{own}.c_attn",
            key=f"{own}.c_attn",
            value=f"{own}.c_attn",
            stacked=True,
            out=f"{own}.c_proj",
            alone=(f"{name}.ln_1",),
        )

    def feed_forward_site(self, name: str, layer: Any) -> Site:
        own = f"{name}.mlp"
        return feed_forward_site(
            own,
            neurons=layer.mlp.c_fc.nf,
            out=f"{own}.c_proj",
            inputs=(f"{own}.c_fc",),
            alone=(f"{name}.ln_2",),
        )

    def set_heads(self, attention: Any, heads: int) -> None:
        attention.num_heads = heads
        attention.split_size = attention.c_proj.nx

    def vanish(self, model: nn.Module, site: Site, bias: Tensor | None) -> None:
        from deploy_prune.adapters.modules.vanished import Vanished

        if site.kind is SiteKind.ATTENTION:
            gone = Vanished(bias, extra=1, layer_idx=module_at(model, site.name).layer_idx)
        else:
            gone = Vanished(bias)
        model.set_submodule(site.name, gone)
